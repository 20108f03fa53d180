"""The demo's bytes: files of this system in a seeded order, or one file of the user's."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ramster.errors import UsageError

SYSTEM_ROOTS = (Path("/usr/lib"), Path("/usr/bin"), Path("/usr/share"))
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes came from. `repeats` is how often the input was begun again because it was too short."""

    description: str
    bytes: int
    files: int
    repeats: int


def system_files(roots: tuple[Path, ...], seed: int) -> list[str]:
    """Paths of the non-empty regular files under `roots`, shuffled by `seed`; the same files give the same order."""
    found: list[str] = []
    pending = [str(root) for root in roots]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        continue
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif entry.is_file():
                        found.append(entry.path)
        except OSError:
            continue  # unreadable or gone: the demo takes what this user may read
    found.sort()
    random.Random(seed).shuffle(found)
    return found


def user_file(path: Path) -> Path:
    """Checks the user's file. Raises UsageError if it is missing, not a regular file, empty or unreadable."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"--file {path} is not a regular file; give a file with at least one byte")
        if status.st_size == 0:
            raise UsageError(f"--file {path} is empty; give a file with at least one byte")
        with path.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"--file {path} cannot be read ({error.strerror}); give a file that you may read") from None
    return path


def write_source(
    out: Path,
    size: int,
    *,
    file: Path | None,
    seed: int,
    roots: tuple[Path, ...] = SYSTEM_ROOTS,
    progress: Callable[[int], None] = lambda done: None,
) -> Source:
    """Writes exactly `size` bytes to `out` and says where they came from.

    Input that is too short is repeated. Raises UsageError when there is nothing to read or the disk is full.
    """
    if file is not None:
        paths, what = [str(user_file(file))], str(file)
    else:
        paths, what = system_files(roots, seed), "files of this system under " + ", ".join(map(str, roots))
    written, files, repeats = 0, 0, 0
    try:
        with out.open("xb") as sink:
            while written < size:
                before = written
                for path in paths:
                    if written == size:
                        break
                    files += 1
                    for chunk in _chunks(path, size - written):
                        _write(sink, chunk)
                        written += len(chunk)
                    progress(written)
                if written == before:
                    raise UsageError(f"no readable bytes in {what}; give a file with --file")
                if written < size:
                    repeats += 1
    except OSError as error:
        raise UsageError(
            f"cannot write {size >> 20} MiB to {out.parent} ({error.strerror}); "
            "free space there, set TMPDIR or make --size smaller"
        ) from None
    return Source(what, written, files, repeats)


def _chunks(path: str, limit: int) -> Iterator[bytes]:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - 60 000 Path objects are a second of nothing
            while limit and (chunk := file.read(min(_CHUNK, limit))):
                limit -= len(chunk)
                yield chunk
    except OSError:
        return  # vanished or not ours to read; the next file goes on


def _write(sink: BinaryIO, chunk: bytes) -> None:
    if sink.write(chunk) != len(chunk):
        raise OSError(28, "short write")
