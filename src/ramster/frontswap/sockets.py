"""Listening sockets of a node: Unix ones with their final mode from the first moment on, TCP ones with clear errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ramster import limits
from ramster.errors import PortTaken, UsageError

log = logging.getLogger("ramster.sockets")

# For people and programs of this node's user and group.
SOCKET_MODE: Final = 0o660
BACKLOG: Final = 64
# For everybody on the network: who is honest must find a place behind a flood. The kernel caps it (net.core.somaxconn).
BACKLOG_TCP: Final = 1024
# Where the system gives no descriptor, memory ... for a connection, it stays in the queue for so long.
ACCEPT_PAUSE_S: Final = 0.1
# How long the log says no more of it.
QUIET_S: Final = 60.0


def listen_unix(path: Path) -> socket.socket:
    """A stream socket that listens at `path`, in place of whatever socket stood there.

    Bound under another name, then renamed: bind() applies the umask, and a chmod afterwards would leave a gap. The
    other name is not longer than ours, so a length that was checked holds. LimitReached.
    """
    with limits.named(f"listen on {path}", "the node"):
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
    """A socket that listens there, without blocking. PortTaken, UsageError, LimitReached name the knob, such as
    "[links] listen".
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    doing = f"listen on {host}:{port} ({knob})"
    with limits.named(doing, "the node"):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG_TCP)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"port {port} on {host} is taken by another program; set another one with {knob}"
            ) from error
        if (limit := limits.reached(error, doing, "the node")) is not None:
            raise limit from error
        raise UsageError(f"cannot {doing}: {error.strerror}") from error
    return sock


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(process id, user) on the other side of a Unix socket when it connected."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def is_own(uid: int) -> bool:
    """Whether a user could end this node as well: root, or who runs it."""
    return uid in (0, os.geteuid())


class Acceptor:
    """Accepts what comes to a listener, in the event loop, and hands it on. Owns the listener.

    Where descriptors run out it neither spins nor leaves callers waiting: `spares` descriptors are kept, and with them
    a caller is accepted all the same, to be told by `short` (None: to be closed). The log says so once in a while.
    """

    def __init__(
        self,
        listener: socket.socket,
        where: str,
        accepted: Callable[[socket.socket], None],
        *,
        short: Callable[[socket.socket, OSError], None] | None = None,
        spares: int = 1,
    ) -> None:
        self.listener = listener
        self.where = where
        self._accepted = accepted
        self._short = short
        self._count = spares
        self._spares: list[int] = []
        self._quiet_until = 0.0
        self._open = True
        listener.setblocking(False)
        self._restock()
        self._watch()

    def close(self) -> None:
        """Stop listening. Again: does nothing."""
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self.listener)
            self.listener.close()
            while self._spares:
                os.close(self._spares.pop())

    def _watch(self) -> None:
        if self._open:
            asyncio.get_running_loop().add_reader(self.listener, self._accept)

    def _restock(self) -> None:
        with contextlib.suppress(OSError):
            while self._open and len(self._spares) < self._count:
                self._spares.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:
            self._no_room(error)
            return
        self._restock()
        self._accepted(sock)

    def _no_room(self, error: OSError) -> None:
        if (now := time.monotonic()) >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            limit = limits.reached(error, f"accept a connection on {self.where}", "the node")
            log.error("%s", limit or f"cannot accept a connection on {self.where}: {error}")
        if self._spares and error.errno in (errno.EMFILE, errno.ENFILE):
            os.close(self._spares.pop())
            with contextlib.suppress(OSError):  # another thread was faster
                sock, _ = self.listener.accept()
                if self._short is None:
                    sock.close()
                else:
                    self._short(sock, error)
            self._restock()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.listener)
        loop.call_later(ACCEPT_PAUSE_S, self._watch)
