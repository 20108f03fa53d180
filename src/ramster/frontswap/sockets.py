"""Listening sockets of a node: Unix ones with their final mode from the first moment on, TCP ones with clear errors."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Final

from ramster.errors import PortTaken, UsageError

# For people and programs of this node's user and group.
SOCKET_MODE: Final = 0o660
BACKLOG: Final = 64


def listen_unix(path: Path) -> socket.socket:
    """A stream socket that listens at `path`, in place of whatever socket stood there.

    Bound under another name, then renamed: bind() applies the umask, and a chmod afterwards would leave a gap. The
    other name is not longer than ours, so a length that was checked holds.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    staging = path.with_name(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        staging.unlink(missing_ok=True)
        sock.bind(str(staging))
        staging.chmod(SOCKET_MODE)
        sock.listen(BACKLOG)
        staging.rename(path)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise
    return sock


def listen_tcp(host: str, port: int, knob: str) -> socket.socket:
    """A socket that listens there, without blocking. PortTaken, UsageError name the knob, such as "[links] listen"."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"port {port} on {host} is taken by another program; set another one with {knob}"
            ) from error
        raise UsageError(f"cannot listen on {host}:{port} ({knob}): {error.strerror}") from error
    return sock
