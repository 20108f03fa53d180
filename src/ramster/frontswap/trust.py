"""Whether the process behind a node's socket is one that this process should give anything to.

A path proves nothing: whoever makes a folder first decides what listens in it. The kernel says who listens
(SO_PEERCRED), and the folder's owner and mode say who could have put it there. docs/cli.md has the table.
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ramster import limits
from ramster.errors import PermissionMissing, UntrustedNode

_UCRED: Final = struct.Struct("iII")  # pid, uid, gid
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Folder:
    """Owner and mode of a directory."""

    owner: int
    mode: int

    @classmethod
    def of(cls, path: Path) -> Folder:
        found = path.stat()
        return cls(found.st_uid, stat.S_IMODE(found.st_mode))

    @property
    def open(self) -> bool:
        """Whether others than its owner may put something into it."""
        return bool(self.mode & _OTHERS_WRITE)


def objection(own: int, listener: int, folder: Folder, above: Folder) -> str | None:
    """What speaks against giving something to user `listener` as user `own`, in words; None: nothing.

    folder: where the socket is. above: the folder that this one is in.
    """
    if folder.open:
        return f"others than user {user(folder.owner)} may write to its folder (mode {folder.mode:04o})"
    if folder.owner not in (own, 0, listener):
        return f"its folder belongs to user {user(folder.owner)}"
    if listener in (own, 0):
        return None
    # A service with a user of its own: root, or we, made room for it where nobody else could have.
    if above.owner in (own, 0) and not above.open:
        return None
    return f"user {user(listener)} serves it, in a folder that root has not made for that user"


def user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def listener_of(connected: socket.socket) -> int:
    """The user who called listen()."""
    return int(_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])


def check(connected: socket.socket, path: Path) -> None:
    """Raises UntrustedNode, before a byte was sent. path: what was connected to."""
    folder = Path(os.path.realpath(path)).parent
    try:
        found = objection(os.geteuid(), listener_of(connected), Folder.of(folder), Folder.of(folder.parent))
    except OSError as error:
        found = f"its folder cannot be looked at: {error.strerror}"
    if found is not None:
        raise UntrustedNode(
            f"the socket {path} is not trusted by user {user(os.geteuid())}: {found}; "
            "name a node of this user or of root (RAMSTER_SOCKET, --socket or --config), in a folder that nobody else "
            "may write to"
        )


def require_own_folder(directory: Path) -> None:
    """Of a node, before it puts a socket there: made when missing. PermissionMissing where others could meddle."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = Folder.of(directory)
    except OSError as error:
        if (limit := limits.reached(error, f"use {directory}", "the node")) is not None:
            raise limit from error
        raise PermissionMissing(f"cannot use {directory}: {error.strerror}; set another run_dir in [node]") from error
    if found.owner not in (os.geteuid(), 0) or found.open:
        raise PermissionMissing(
            f"{directory} must belong to user {user(os.geteuid())} or root and be writable for its owner only "
            f"(owner {user(found.owner)}, mode {found.mode:04o}): chmod go-w {directory}, or set another run_dir in "
            "[node]"
        )
