"""Opening a file at a configured path that this node will overwrite: its own, or none that exists.

A path in a configuration may lead anywhere: to a link that somebody else has put there, to a document, to a file that
another user made to read what the node writes. So a file is made anew, or it is an ordinary one of this user, under one
name, that begins (or ends) with the mark of its kind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ramster.errors import PermissionMissing, UsageError

FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file: what messages call it, the knob that names it, its mark, which stands `mark_from_end` bytes
    before the end (None: at the beginning), and whether it must be private already: what is in it can be read.
    """

    what: str
    knob: str
    mark: bytes
    mark_from_end: int | None = None
    private: bool = False


def open_own(path: Path, kind: Kind) -> tuple[int, bool]:
    """The file at `path`, locked against other nodes and of mode 0600, and whether it was made now.

    UsageError, PermissionMissing: it is no file of ours, or cannot be opened.
    """
    try:
        try:
            fd, made = os.open(path, FLAGS | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            fd, made = os.open(path, FLAGS), False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(
                f"the {kind.what} {path} is a symbolic link, which is not followed; "
                f"name the file itself in {kind.knob}, or set another path"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionMissing(
                f"cannot write the {kind.what} {path}: {words(error)}; "
                f"let this user write there or set another {kind.knob}"
            ) from error
        raise UsageError(f"cannot open the {kind.what} {path}: {words(error)}; set another {kind.knob}") from error
    try:
        _look(fd, path, kind, made)
    except OSError as error:
        os.close(fd)
        raise UsageError(f"cannot prepare the {kind.what} {path}: {words(error)}; set another {kind.knob}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd, made


def _look(fd: int, path: Path, kind: Kind, made: bool) -> None:
    status = os.fstat(fd)
    another = f"set another {kind.knob}"
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"the {kind.what} {path} is not an ordinary file; {another}")
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"the {kind.what} {path} belongs to user {status.st_uid}, and this node runs as user {os.geteuid()}; "
            f"remove it or {another}"
        )
    if status.st_nlink > 1:
        raise UsageError(f"the {kind.what} {path} has {status.st_nlink} names; remove it or {another}")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"the {kind.what} {path} is in use by another node; give each node one of its own") from error
    if made:
        return
    at = 0 if kind.mark_from_end is None else status.st_size - kind.mark_from_end
    if status.st_size and (at < 0 or os.pread(fd, len(kind.mark), at) != kind.mark):
        raise UsageError(
            f"{path} holds something that is no {kind.what}, and would be overwritten; remove it or {another}"
        )
    if kind.private and stat.S_IMODE(status.st_mode) & 0o077:
        # Who has opened it before can read what will be written, whatever its mode is then.
        raise UsageError(
            f"the {kind.what} {path} has mode {stat.S_IMODE(status.st_mode):04o}, others may have opened it; "
            f"remove it or {another}"
        )
    os.fchmod(fd, 0o600)


def words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
