"""An arena in a file: never in what lies there and is not the node's own."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramster.constants import PAGE_BYTES
from ramster.engine.layout import ARENA_MARK
from ramster.engine.store import Store
from ramster.errors import UsageError

SEGMENT = 65536
ARENA = 16 * SEGMENT


def make(path: Path) -> Store:
    return Store(ARENA, segment_bytes=SEGMENT, path=str(path), lock=False, cleaner=False)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "arena"


def refused(path: Path, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(path)


def test_it_is_private_and_marked_and_taken_again(path: Path) -> None:
    for _ in range(2):
        store = make(path)
        pool = store.create_pool(pages=8)
        store.put(pool, 3, bytes(range(256)) * 16)
        assert store.get(pool, 3) == bytes(range(256)) * 16
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o600, ARENA + PAGE_BYTES)
        assert path.read_bytes()[ARENA:].startswith(ARENA_MARK)
        refused(path, "in use by another node")
        store.close()
        del store  # with it goes the lock


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"years of work")
    path.symlink_to(target)
    refused(path, "symbolic link")
    path.unlink()
    path.symlink_to(tmp_path / "none")
    refused(path, "symbolic link")
    assert target.read_bytes() == b"years of work" and not (tmp_path / "none").exists()


def test_what_has_another_name_too_is_refused(path: Path, tmp_path: Path) -> None:
    make(path).close()
    os.link(path, tmp_path / "other")
    refused(path, "has 2 names")


@pytest.mark.parametrize("content", [b"years of work", b"x" * (2 * PAGE_BYTES), bytes(ARENA)])
def test_what_is_no_arena_is_not_touched(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    refused(path, "no arena file")
    assert path.read_bytes() == content


def test_what_others_may_have_opened_is_refused(path: Path) -> None:
    make(path).close()
    path.chmod(0o640)
    refused(path, "mode 0640")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file of another user")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    make(path).close()
    os.chown(path, 12345, 12345)
    refused(path, "belongs to user 12345")


def test_what_is_no_file_is_refused(path: Path) -> None:
    path.mkdir()
    refused(path, "directory")
    path.rmdir()
    os.mkfifo(path)
    refused(path, "not an ordinary file")
