"""A region's connection to its node: one request at a time, each with a deadline."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ramster import limits
from ramster.constants import REGION_MESSAGE_BYTES_MAX, REGION_SOCKET
from ramster.errors import (
    NodeUnreachable,
    PermissionMissing,
    ProtocolError,
    RamsterError,
    UntrustedNode,
    UsageError,
    from_code,
)
from ramster.frontswap import messages, trust

# A node answers each request within its own, shorter waits (region.full_wait, links.give_up); this catches one that
# hangs.
REQUEST_DEADLINE_S: Final = 30.0
CONNECT_DEADLINE_S: Final = 5.0


class Control:
    """The region's connection to its node: one request at a time, each with a deadline."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: Any = threading.RLock()  # never taken twice; it knows whose it is
        self._last = 0
        self._groups = itertools.count(1)
        self._owed: list[int] = []  # groups that are to be taken back
        with limits.named(f"connect to {path}"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            # A connect() with Python's timeout fails at once where the node's queue is full; this one waits its turn.
            timeout = struct.pack("@ll", int(CONNECT_DEADLINE_S), 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            self._socket.connect(os.fspath(path))
            trust.check(self._socket, path)
        except UntrustedNode:
            self._socket.close()
            raise
        except PermissionError as error:
            self._socket.close()
            raise PermissionMissing(
                f"may not connect to {path}: join the group that owns it, or run as the node's user"
            ) from error
        except OSError as error:
            self._socket.close()
            if (other := _other_than_a_region_socket(path, error)) is not None:
                raise UsageError(
                    f"socket: {str(path)!r} is {other}; a node's region socket is {REGION_SOCKET} in its run directory"
                ) from error
            raise NodeUnreachable(
                f"no node answers at {path} ({error.strerror or error}): start one with 'ramster node --config FILE', "
                "or name its socket in RAMSTER_SOCKET"
            ) from error

    def ask(self, request: messages.Request, fds: Sequence[int] = ()) -> messages.Reply:
        """Send and wait. Raises the error that the node reports, NodeUnreachable, ProtocolError."""
        try:
            with self._lock:
                return self._result(self._wait(self._send(request, fds)))
        finally:
            self._settle()

    def ask_for_descriptors(self, request: messages.Request, count: int) -> tuple[messages.Reply, list[int]]:
        """As `ask`, for an answer that brings `count` descriptors, which the caller then owns."""
        with self._lock:
            fds: list[int] = []
            try:
                reply = self._result(self._wait(self._send(request), fds))
                if len(fds) != count:
                    raise ProtocolError(f"the node sent {len(fds)} descriptors, expected {count}")
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
            return reply, fds

    def group(self) -> int:
        """A number for pins that are taken back together."""
        return next(self._groups)

    def take_back(self, group: int) -> None:
        """Whatever the node has granted, or is about to grant, to this group. Without waiting for it: an interrupt
        (Ctrl-C) may have come at any moment of a request. Where another thread asks just now, that one says it.
        """
        self._owed.append(group)
        self._settle()

    def _settle(self) -> None:
        while self._owed:
            try:
                if not self._lock.acquire(blocking=False):
                    return
                with contextlib.suppress(RamsterError):  # a node that is gone holds nothing
                    while self._owed:
                        self._send(messages.Undo(group=self._owed[0]))
                        del self._owed[0]
                self._owed.clear()
            finally:
                # An interrupt may come between getting it and knowing that.
                if self._lock._is_owned():
                    self._lock.release()

    def _send(self, request: messages.Request, fds: Sequence[int] = ()) -> int:
        self._last += 1
        data = messages.encode(msgspec.structs.replace(request, id=self._last))
        try:
            self._socket.settimeout(REQUEST_DEADLINE_S)
            socket.send_fds(self._socket, [data], fds, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._gone(error) from error
        return self._last

    def _wait(self, number: int, fds: list[int] | None = None) -> messages.Reply:
        deadline = time.monotonic() + REQUEST_DEADLINE_S
        while True:
            try:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                data, received, flags, _ = socket.recv_fds(
                    self._socket, REGION_MESSAGE_BYTES_MAX, 4, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise NodeUnreachable(f"the node did not answer within {REQUEST_DEADLINE_S:.0f} s") from None
            except OSError as error:
                raise self._gone(error) from error
            reply: messages.Reply | None = None
            try:
                if not data:
                    raise self._gone(None)
                if flags & socket.MSG_TRUNC:
                    raise ProtocolError("the node's answer is too long")
                if flags & socket.MSG_CTRUNC:  # it never sends more descriptors than are waited for here
                    raise limits.descriptors("take the descriptors of a region from the node")
                try:
                    reply = messages.decode_reply(data)
                except msgspec.DecodeError as error:
                    raise ProtocolError(f"the node's answer makes no sense: {error}") from error
                if reply.id == messages.ANY_ID:
                    return reply
                if fds is not None and reply.id == number:
                    # In this order: an interrupt in between leaves one open, but never closes one twice.
                    taken, received = received, []
                    fds.extend(taken)
            finally:
                for fd in received:
                    os.close(fd)
            # An older number: the answer to a request that was given up.
            if reply.id == number:
                return reply

    def _gone(self, error: OSError | None) -> RamsterError:
        if error is not None:  # it may have said why before it closed
            with contextlib.suppress(OSError, msgspec.DecodeError):
                reply = messages.decode_reply(self._socket.recv(REGION_MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT))
                if reply.id == messages.ANY_ID:
                    return from_code(reply.error, reply.message)
        reason = f" ({error.strerror or error})" if error else ""
        return NodeUnreachable(f"the node at {self._path} closed the connection{reason}")

    @staticmethod
    def _result(reply: messages.Reply) -> messages.Reply:
        if not reply.ok:
            raise from_code(reply.error, reply.message, reply.runs)
        return reply

    def drop(self) -> None:
        """Close this process's copy of the socket without a word to the other side."""
        self._socket.close()

    def hang_up(self) -> None:
        """Tell the other side that we are gone, also where a forked child holds a copy of the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _other_than_a_region_socket(path: Path, error: OSError) -> str | None:
    """What a connection was tried to, where it is certainly no region socket."""
    if error.errno == errno.EPROTOTYPE:
        return "a socket of another kind (the control socket?)"
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        return None if stat.S_ISSOCK(mode) else "a directory" if stat.S_ISDIR(mode) else "no socket"
    return None
