"""Where the node keeps its sockets, and where a client looks for them."""

import os
import stat
from pathlib import Path

from ramster.constants import CONTROL_SOCKET, NBD_SOCKET, REGION_SOCKET, SOCKET_PATH_BYTES_MAX
from ramster.errors import UsageError

#: What `default_run_dir` does, for help texts.
DEFAULT_RUN_DIR_RULE = "/run/ramster as root, else $XDG_RUNTIME_DIR/ramster, else /run/user/UID/ramster, else none"


def default_run_dir() -> Path:
    """The run directory that a node and its clients agree on without being told; it may not exist.

    UsageError: there is none, as nobody made this user a folder that is safe from others. One below /tmp would not be:
    whoever makes it first owns it.
    """
    uid = os.geteuid()
    if uid == 0:
        return canonical_run_dir(Path("/run/ramster"))
    given, usual = os.environ.get("XDG_RUNTIME_DIR"), Path(f"/run/user/{uid}")
    for runtime in (Path(given) if given else usual, usual):
        if runtime.is_absolute() and _is_ours(runtime, uid):
            return canonical_run_dir(runtime / "ramster")
    why = f"XDG_RUNTIME_DIR is {given}, which is no folder of user {uid}" if given else "XDG_RUNTIME_DIR is not set"
    raise UsageError(
        f"there is no default folder for the sockets of a node: {why}, and there is no {usual} of this user; "
        "set run_dir in [node] of the node's file, then name the node: --config FILE for a command, RAMSTER_SOCKET for "
        "a program"
    )


def _is_ours(folder: Path, uid: int) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def canonical(path: Path) -> Path:
    """Without symlinks and `..`, as the kernel shows paths; it need not exist."""
    return Path(os.path.realpath(path))


def canonical_run_dir(run_dir: Path) -> Path:
    """Every run directory passes here once, when it is read. Where the canonical path is too long for a socket and the
    one that was given is not, the latter stays: somebody made a short link for this very reason.
    """
    found = canonical(run_dir)
    return found if _fits(found) else run_dir.absolute()


def canonical_socket(path: Path) -> Path:
    """As `canonical_run_dir`, for a socket that a user names: also a link to the socket itself is followed."""
    found = canonical(path)
    return found if len(os.fsencode(found)) <= SOCKET_PATH_BYTES_MAX else path.absolute()


def _fits(run_dir: Path) -> bool:
    return len(os.fsencode(control_socket(run_dir))) <= SOCKET_PATH_BYTES_MAX


def region_socket(run_dir: Path) -> Path:
    """Where applications connect."""
    return run_dir / REGION_SOCKET


def control_socket(run_dir: Path) -> Path:
    """Where `ramster status` and `ramster stop` connect."""
    return run_dir / CONTROL_SOCKET


def nbd_socket(run_dir: Path) -> Path:
    """Where NBD clients connect."""
    return run_dir / NBD_SOCKET
