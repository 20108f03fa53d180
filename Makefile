# Every target sets up what it needs first; `make help` lists them.
.DEFAULT_GOAL := help
PYTHON_SOURCES := $(wildcard src tests bench scripts)
VENV := .venv/bin

.PHONY: help setup demo test guest lint bench asan tsan fuzz soak docs lock clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## Install what is missing (system packages as root), create .venv, build the extensions
	@scripts/bootstrap.sh

demo: setup ## Two nodes on this machine, an array larger than its RAM, every page checked
	@$(VENV)/ramster demo

test: ## Run the tests (as root on Debian, programs of others that they use are installed first)
	@scripts/bootstrap.sh --tests
	@$(VENV)/python -m pytest tests

guest: ## A real kernel swaps on an export in QEMU, the long tests too (one kills a lender meanwhile)
	@scripts/bootstrap.sh --tests
	@$(VENV)/python -m pytest tests/guest -m "long or not long" -o faulthandler_timeout=1200

lint: setup ## ruff, formatting, mypy --strict
	@$(VENV)/ruff check $(PYTHON_SOURCES)
	@$(VENV)/ruff format --check $(PYTHON_SOURCES)
	@$(VENV)/mypy --strict $(PYTHON_SOURCES)

bench: setup ## Measure put, get, fault and remotify beside their floors
	@$(VENV)/python bench/run.py

asan: setup ## Run the tests of the native code under AddressSanitizer and UBSan (own build in build/asan)
	@scripts/asan.sh

tsan: setup ## Run the threaded tests of the native code under ThreadSanitizer (own build in build/tsan)
	@scripts/tsan.sh

fuzz: setup ## Fuzz the NBD parser under AddressSanitizer and UBSan (SECONDS=60; own build in build/fuzz)
	@scripts/fuzz.sh $(or $(SECONDS),60)

soak: setup ## Verify every page of regions, exports and pools under full load (SECONDS=60, SOAK="--json --seed 7")
	@$(VENV)/python -m ramster.testing.soak --seconds $(or $(SECONDS),60) $(SOAK)

docs: setup ## Write docs/configuration.md and docs/errors.md from the code
	@$(VENV)/python scripts/docs.py

lock: ## Write scripts/locked anew: what .venv gets, with hashes (needs the package index and Python 3.11)
	@scripts/lock.sh $(LOCK)

clean: ## Remove .venv, builds and caches
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
