"""Errors keep their identity across sockets, pickles and documents."""

import pickle
from pathlib import Path

import pytest
from scripts.docs import DOCS, errors

from ramster.errors import PageLost, RamsterError, RegionLost, every_error, from_code

CLASSES = list(every_error())


def test_codes_are_unique_and_kebab_case() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(code.replace("-", "").isalpha() and code == code.lower() for code in codes)


def test_exit_codes_do_not_collide_with_shell_or_success() -> None:
    assert all(0 < cls.exit_code < 64 for cls in CLASSES)


def test_lost_pages_share_an_exit_code() -> None:
    assert PageLost.exit_code == RegionLost.exit_code


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_the_wire(cls: type[RamsterError]) -> None:
    rebuilt = from_code(cls.code, "why")
    assert type(rebuilt) is cls
    assert str(rebuilt) == "why"


def test_lost_runs_survive_the_wire_and_pickle() -> None:
    error = from_code("region-lost", "two runs", [(3, 1), (9, 4)])
    assert isinstance(error, RegionLost)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.runs) == (RegionLost, "two runs", [(3, 1), (9, 4)])


def test_a_code_from_a_newer_version_is_shown() -> None:
    error = from_code("from-the-future", "why")
    assert type(error) is RamsterError
    assert str(error) == "why (from-the-future)"


def test_the_document_has_exactly_the_errors_of_the_code() -> None:
    assert Path(DOCS / "errors.md").read_text() == errors(), "run make docs"
