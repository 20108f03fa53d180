"""The benchmarks run, measure every path, and say why where they cannot. How fast anything is is no test's business."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 600.0  # for a hang alone: with a load of 8 on two cores `nbd` took 230 s

# Beginnings of the names of rows that stand beside a floor, by module.
COMPARED = {
    "store": ["put", "local get", "put over a put"],
    "fault": [
        "local fault, random, one core, p50",
        "local fault, random, one core, p99",
        "local fault, random, two cores, p50",
        "local fault, random, evicting",
        "first touch",
        "sequential pass, reading",
        "sequential pass, writing",
        "eviction of dirty pages",
        "eviction of clean pages",
        "random pass beside a mapped file",
        "sequential pass beside a mapped file",
    ],
    "hog": ["verifying"],
    "scale": ["4 MiB, 1 region, 4 threads", "8 MiB, 4 regions, 4 threads"],
    "tail": ["local fault, random, beside cleaning and remotify, p99.9"],
    "nbd": ["NBD"],
    "swap": ["swap on an export"],
    "remote": [
        "remotify",
        "remote get, one at a time, p50",
        "remote get, one at a time, p99",
        "remote fault, random, p50",
        "remote fault, random, p99",
        "remote sequential pass",
    ],
}
FLOORS = ["bare fault, 1 page", "bare fault, 8 pages", "bare fault, 32 pages", "TCP ping-pong"]

# Makes userfaultfd fail with EPERM, as container runtimes do, for the program that it becomes.
WITHOUT_USERFAULTFD = """
import ctypes, os, struct, sys
steps = ((0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[1])), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
filter = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"""
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}


def bench(*modules: str, before: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    done = subprocess.run(
        [*before, sys.executable, str(ROOT / "bench" / "run.py"), "--quick", "--json", *modules],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return bench()


def has_userfaultfd(rows: list[dict[str, Any]]) -> bool:
    return not any("userfaultfd" in row["note"] for row in rows)


@pytest.mark.parametrize("name", [name for names in COMPARED.values() for name in names])
def test_each_path_stands_beside_its_floor(rows: list[dict[str, Any]], name: str) -> None:
    if not has_userfaultfd(rows) and name not in (*COMPARED["store"], *COMPARED["nbd"], *COMPARED["swap"]):
        pytest.skip("userfaultfd is not permitted here")
    found = [row for row in rows if row["path"].startswith(name)]
    assert found
    for row in found:
        assert row["unit"]
        if row["note"].startswith("skipped: "):
            continue
        assert row["floor_name"]
        for key in ("ours", "floor", "ratio", "lo", "hi"):
            assert math.isfinite(row[key]) and row[key] > 0, f"{key} of {row}"
        assert row["lo"] <= row["hi"]


@pytest.mark.parametrize("name", FLOORS)
def test_each_floor_is_measured(rows: list[dict[str, Any]], name: str) -> None:
    if not has_userfaultfd(rows):
        pytest.skip("userfaultfd is not permitted here")
    found = [row for row in rows if row["path"].startswith(name)]
    assert found
    assert all(math.isfinite(row["floor"]) and row["floor"] > 0 for row in found)


def test_replacement_stands_between_the_best_there_is_and_what_does_not_survive_a_cycle(
    rows: list[dict[str, Any]],
) -> None:
    found = {row["path"].removeprefix("replacement, "): row for row in rows if row["path"].startswith("replacement, ")}
    assert len(found) >= 14
    for row in found.values():
        assert 0 < row["floor"] <= row["ours"] <= 1
        assert row["note"].startswith("LRU ")
    cycles = {name: row for name, row in found.items() if name.startswith("cyclic")}
    assert len(cycles) == 4
    assert all(row["ours"] < 0.9 and "LRU 1.00" in row["note"] for row in cycles.values())


def test_what_is_skipped_says_why(rows: list[dict[str, Any]]) -> None:
    assert all(row["note"] for row in rows if row["ours"] is None and row["floor"] is None)


def test_without_userfaultfd_faults_are_skipped_and_the_rest_is_measured() -> None:
    number = SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of userfaultfd on {platform.machine()} is not known here")
    rows = bench("fault", "remote", before=(sys.executable, "-c", WITHOUT_USERFAULTFD, str(number)))
    skipped = [row for row in rows if "userfaultfd" in row["note"]]
    assert len(skipped) == 2
    assert all(row["note"].startswith("skipped: ") and row["ours"] is None for row in skipped)
    measured = {row["path"] for row in rows if row["ours"] is not None}
    assert {"remotify, sealed bytes", "remote get, one at a time, p50"} <= measured
