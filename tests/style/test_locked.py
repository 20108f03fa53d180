"""What scripts/bootstrap.sh installs is named with hashes, fits pyproject.toml, and says no place that it is from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts" / "locked").glob("*.txt"))


def locked() -> dict[str, str]:
    """Name and version of each release. AssertionError: one without a hash, or something that is no release."""
    found = {}
    for file in FILES:
        for entry in re.split(r"(?<!\\)\n", file.read_text().strip()):
            if entry.startswith("#"):
                continue
            first, *hashes = entry.split("\\\n")
            match = re.fullmatch(r"([a-z0-9._-]+)==([0-9a-z.+!-]+)( ; .+)?", first.strip())
            assert match, entry
            assert hashes and all(re.fullmatch(r" *--hash=sha256:[0-9a-f]{64} *", each) for each in hashes), entry
            found[str(canonicalize_name(match[1]))] = match[2]
    return found


def test_every_requirement_is_locked_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        "cmake>=3.25",
        "ninja",
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    releases = locked()
    for text in wanted:
        requirement = Requirement(text)
        version = releases.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not locked: run scripts/lock.sh"
        assert requirement.specifier.contains(version), f"{text} is locked to {version}: run scripts/lock.sh"


def test_the_lists_name_no_place() -> None:
    assert {file.stem for file in FILES} == {"requirements", "cmake", "ninja"}
    for file in FILES:
        assert not re.search(r"://|index-url|find-links|trusted-host", file.read_text()), file
