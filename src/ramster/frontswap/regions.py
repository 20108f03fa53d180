"""Arrays larger than their RAM budget: the application's API.

A `Region` is memory of which only a part is in RAM; the node keeps the rest compressed, here or on other nodes, and
brings a page back when it is touched. Sizes and ranges are bytes here; the node works in pages of 4096 bytes and
ranges are rounded outwards to them.

Everything acts in the process that made it. After `fork` every method raises ForkedError in the child and a touch of
the memory is SIGSEGV; the parent does not notice.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import functools
import itertools
import math
import os
import socket
import stat
import struct
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self, SupportsIndex, TypeVar, cast, get_args

import msgspec

from ramster import limits
from ramster.config.paths import canonical_socket, default_run_dir
from ramster.constants import PAGE_BYTES, REGION_MESSAGE_BYTES_MAX, REGION_SOCKET
from ramster.errors import (
    ForkedError,
    NodeUnreachable,
    PermissionMissing,
    ProtocolError,
    RamsterError,
    RegionBusy,
    RegionLost,
    UntrustedNode,
    UsageError,
    from_code,
)
from ramster.frontswap import arguments, capacity, messages, trust
from ramster.frontswap._client import Entered, Mapping
from ramster.frontswap.capacity import Capacity
from ramster.frontswap.discarding import discard
from ramster.frontswap.under_way import UnderWay, Use

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from ramster.frontswap.arguments import Range, Shape, Size

# A node answers each request within its own, shorter waits (region.full_wait, links.give_up); this catches one that
# hangs.
REQUEST_DEADLINE_S: Final = 30.0
CONNECT_DEADLINE_S: Final = 5.0
# From a view to its owner in turn; numpy itself keeps it to two or three.
_OWNERS_MAX: Final = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionStatistics:
    """A region's counters at one moment; pages of 4096 bytes, times in microseconds."""

    pages: int = 0
    """Pages of the region: the sum of resident, local, remote, lost and never touched ones, up to pages on their
    way.
    """
    resident_pages: int = 0
    """Pages in RAM now."""
    budget_pages: int = 0
    """Pages that may be in RAM."""
    pinned_pages: int = 0
    attached_processes: int = 0
    """Processes that have the region mapped, this one included."""
    local_pages: int = 0
    """Pages kept compressed by the node of this machine."""
    remote_pages: int = 0
    """Pages kept by other nodes."""
    lost_pages: int = 0
    never_touched_pages: int = 0
    faults: int = 0
    faults_local: int = 0
    faults_remote: int = 0
    faults_zero: int = 0
    """First touches."""
    faults_wp: int = 0
    """First writes to a page that was mapped clean."""
    faults_minor: int = 0
    """Touches of a page that was in RAM but not mapped: as a rule brought in by another process."""
    faults_parked: int = 0
    """Faults that had to wait for an eviction."""
    prefetched: int = 0
    """Pages brought in without a fault of their own."""
    prefetch_hits: int = 0
    """Of them, pages whose stream went on behind them."""
    prefetch_wasted: int = 0
    """Of them, pages whose stream ended, or that were evicted and then asked for. Pages that are used within their
    window and never again leave no trace, so a part of these were of use.
    """
    evictions: int = 0
    evictions_clean: int = 0
    """Evictions that stored nothing, because the stored copy was still right; the others are puts."""
    refused: int = 0
    """Faults that waited for room in vain and ended by SIGBUS."""
    thrashing: bool = False
    """Threads spend their time waiting for pages that left not long before, as it was in the last two seconds."""
    enough_pages: int = 0
    """Where it is thrashing: a budget with which that would end, estimated from how soon pages come back."""
    polled_us: int = 0
    """CPU time that fault threads spent asking for faults instead of sleeping (`busy_poll_us`)."""
    full: bool = False
    """The node has no room for a further page now."""
    fault_local_p50_us: int = 0
    fault_local_p99_us: int = 0
    fault_remote_p50_us: int = 0
    fault_remote_p99_us: int = 0


class _Control:
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


class Pin(Entered):
    """Pages that stay in RAM and in place until `unpin` or the end of the `with` block."""

    def __init__(self, region: Region, first: int, count: int, group: int) -> None:
        self._region = region
        self._first = first
        self._count = count
        self._group = group
        self._active = True

    def unpin(self) -> None:
        """Let the pages go; again: does nothing. Raises ForkedError, NodeUnreachable."""
        try:
            if self._active:
                self._region._unpin(self._first, self._count, self._group)
                self._active = False
        except RamsterError:
            raise
        except BaseException:  # interrupted: it goes all the same, and nobody waits for that
            self._region._take_back(self._group)
            self._active = False
            raise

    def __del__(self) -> None:
        # An interrupt may come before the first line of __exit__. A pin that was never entered is somebody's to unpin.
        if self.entered and getattr(self, "_active", False):
            self._region._take_back(self._group)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.unpin()
        except RamsterError as failure:
            if error is None:
                raise
            error.add_note(f"ramster: not unpinned, {failure}")


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _under_way(method: Callable[Concatenate[Region, _P], _T]) -> Callable[Concatenate[Region, _P], _T]:
    """A method that holds off `close`, and that a closed region refuses."""

    def call(self: Region, /, *args: _P.args, **options: _P.kwargs) -> _T:
        self._own()
        use = Use(method.__name__.lstrip("_"))
        try:
            self._uses.enter(use)
            return method(self, *args, **options)
        finally:
            self._uses.leave(use)

    functools.update_wrapper(call, method)
    return call


class Region(Mapping):
    """`nbytes` of memory (rounded up to whole pages), of which at most `resident` bytes are in RAM.

    A writable buffer: `memoryview(region)` and numpy work on it. Fresh memory reads as zeros. A page whose only copy
    was lost is SIGBUS when touched, never wrong bytes. The memory lives until `close`, or until the region and the
    last array on it are gone; where other processes are attached, until the last of them is through with it.

    socket: the node's region socket. nbytes: size in bytes, at least 1, or a size such as "64GiB". resident: RAM budget
    in bytes, or a size such as "64MiB"; None: the node's default. name: shown by `ramster status`. full: what becomes
    of a write when neither arena, lenders nor spill file take a page: "fail", SIGBUS after the node's `[region]
    full_wait`; "wait", it waits for room, and is SIGBUS after `[region] full_hold`. A CapacityWarning says so now
    where the region may outgrow what there is (`Client.capacity`).

    Raises NodeUnreachable, PermissionMissing (userfaultfd is not permitted), KernelUnsupported, Refused (over the
    node's limits), RegionFull, UsageError. Nothing is left behind then.
    """

    def __init__(
        self,
        socket: str | Path,
        nbytes: Size,
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> None:
        super().__init__()
        pages = arguments.region_pages("nbytes", nbytes)
        request = messages.Create(
            version=messages.VERSION,
            pages=pages,
            resident_pages=arguments.resident_pages(resident, pages),
            name=arguments.name(name),
            full=cast(messages.WhenFull, arguments.word("full", full, get_args(messages.WhenFull))),
        )
        room = self._open(socket, request)
        if room and (text := capacity.outgrows(self.nbytes - self.resident, capacity.decode(room), full)):
            _warn(text, capacity.CapacityWarning)

    @classmethod
    def attached(cls, socket: str | Path, name: str | SupportsIndex) -> Self:
        """A region that another process of this user has made, by its name or its number; see Client.attach."""
        region = cls.__new__(cls)
        Mapping.__init__(region)
        region._open(socket, messages.Join(version=messages.VERSION, region=arguments.which(name)))
        return region

    def _open(self, socket: str | Path, request: messages.Create | messages.Join) -> dict[str, int]:
        self._uses = UnderWay()
        self._control = _Control(arguments.path("socket", socket))
        try:
            made, (memfd, channel) = self._control.ask_for_descriptors(request, 2)
            with limits.named("map a region"):
                self.map(memfd, channel, made.pages * PAGE_BYTES, made.node_wait_ms, made.poison != "guard", made.name)
            self._control.ask(
                messages.Attach(base=self.address, features=self.features, user_mode_only=self.user_mode_only),
                [self.fault_fd],
            )
        except BaseException:
            self._control.hang_up()
            self.unmap()
            raise
        self.name: str = made.name
        self.nbytes: int = made.pages * PAGE_BYTES
        self.resident: int = made.resident_pages * PAGE_BYTES
        self.number: int = made.region
        _open_regions.add(self)
        if self.user_mode_only:
            _warn_user_mode_only()
        return made.capacity

    def array(
        self, shape: Shape, dtype: DTypeLike = float, offset: Size = 0, *, order: arguments.Order = "C"
    ) -> NDArray[Any]:
        """A numpy array over the region's bytes from `offset` on. It keeps the region alive.

        shape, dtype, order ("C" or "F"): as for numpy.empty.

        Raises UsageError where the array does not fit in, or the type holds Python objects.
        """
        import numpy as np

        sides, kind = arguments.layout(shape, dtype)
        placed, start = arguments.order(order), arguments.size("offset", offset)
        self._own()
        size = kind.itemsize * math.prod(sides)
        if start + size > self.nbytes:
            raise UsageError(
                f"an array of {size} bytes at byte {arguments.shown(start)} does not fit in a region of {self.nbytes}"
            )
        # frombuffer holds the buffer for as long as the array lives; ndarray(buffer=...) takes the address and lets go.
        # The base has the items that the array has: libraries (scipy.sparse) take an array whose base has far more of
        # them for a small part of a large one, and copy it.
        return np.frombuffer(memoryview(self), kind, math.prod(sides), start).reshape(sides, order=placed)

    @_under_way
    def touch(self, first: int, count: int) -> None:
        super().touch(first, count)

    def pin(self, where: Range = None) -> Pin:
        """Bring a range in and keep it: present, writable, never moved, until unpinned. Pins nest; they belong to this
        process and end with it.

        Needed before anything that writes to the memory other than this process's own instructions and plain read()
        or write(): O_DIRECT, io_uring with registered buffers, RDMA, CUDA. Without a pin an eviction in between
        loses such writes.

        Raises RegionLost (`runs` in pages), RegionFull (more than the budget would be pinned), NodeUnreachable,
        ForkedError; nothing is pinned then.
        """
        first, count = self._span(where)
        group = self._control.group()
        try:
            self._pin(first, count, group)
            return Pin(self, first, count, group)
        except BaseException:
            self._take_back(group)
            raise

    @_under_way
    def _pin(self, first: int, count: int, group: int) -> None:
        for at, size in _chunks(first, count):
            self._control.ask(messages.Pin(first=at, count=size, group=group))
            # Maps each page writable in this process, so that no system call has to fault on it.
            self.touch(at, size)

    @_under_way
    def unpin(self, where: Range = None) -> None:
        """Take back one pin of the same range. Raises UsageError where it was not pinned, NodeUnreachable,
        ForkedError.
        """
        self._unpin(*self._span(where))

    @_under_way
    def _unpin(self, first: int, count: int, group: int = 0) -> None:
        self._own()
        if group and self._control.ask(messages.Undo(group=group)).pages:
            return
        for at, size in _chunks(first, count):
            self._control.ask(messages.Unpin(first=at, count=size))

    def _take_back(self, group: int) -> None:
        if group and self.creator == os.getpid() and not self.closed:
            self._control.take_back(group)

    @_under_way
    def prefetch(self, where: Range = None) -> int:
        """Bring in what of a range fits in the budget; bytes of it that are in RAM afterwards.

        Raises RegionLost (`runs` in pages; the other pages stay usable), NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        pages = 0
        for at, size in _chunks(first, count):
            resident = self._control.ask(messages.Prefetch(first=at, count=size)).pages
            pages += resident
            if resident < size:
                break
        return pages * PAGE_BYTES

    @_under_way
    def evict(self, where: Range = None) -> int:
        """Move a range out of RAM now; bytes written out. Pinned pages stay.

        Raises RegionFull (the rest stays resident and right), NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        return sum(
            self._control.ask(messages.Evict(first=at, count=size)).pages for at, size in _chunks(first, count)
        ) * PAGE_BYTES  # fmt: skip

    @_under_way
    def discard(self, where: Range = None) -> int:
        """Make a range zeros and keep nothing of it: whole pages leave RAM, arena and lenders at once. Nothing is
        fetched or stored for it, so it works where the node is full and a lender is gone, and what was lost of the
        range is zeros, too. Bytes of whole pages of the range; the rest, of pages that it has only in part, is written
        as by a pinned assignment.

        A range as in `evict`, but rounded to nothing: an array must be contiguous. Raises UsageError, Refused where
        a page stays in other hands; for the parts of pages RegionFull, RegionLost; NodeUnreachable, ForkedError.
        """
        self._own()
        return discard(self, self._control.ask, arguments.whole_range(where, self.address, self.nbytes))

    @_under_way
    def advise(self, kind: messages.Advice, where: Range = None) -> None:
        """Say how a range will be used: "normal", "sequential", "random" or "cyclic".

        It changes how much comes in with a fault and what is evicted first, never what is read. It replaces what was
        said of these pages before and lasts as long as the region. See "Telling how it will be used" in
        docs/regions.md.

        Raises UsageError for another word, and where more than 64 ranges of the region would have an advice of their
        own (nothing changes then); NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        arguments.word("kind", kind, get_args(messages.Advice))
        if count:
            self._control.ask(messages.Advise(kind=kind, first=first, count=count))

    @_under_way
    def check(self, where: Range = None) -> None:
        """Return if a touch of any page of a range would get it; moves nothing. Where a page's lender is out of reach
        it waits until that is decided, for the node's `give_up` at most.

        Raises RegionLost with `runs`, (first page, pages) each, NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        end = first + count
        lost: list[tuple[int, int]] = []
        at: int | None = first
        while at is not None and at < end:
            reply = self._control.ask(messages.Check(first=at, count=end - at))
            lost += reply.runs
            if reply.next_page is not None and reply.next_page <= at:
                raise ProtocolError("the node's answer to check does not advance")
            at = reply.next_page
        if lost:
            pages = sum(size for _, size in lost)
            raise RegionLost(f"{pages} of {count} pages are lost, the first is page {lost[0][0]}", lost)

    @_under_way
    def statistics(self) -> RegionStatistics:
        """The node's counters for this region. Raises NodeUnreachable, ForkedError."""
        self._own()
        values: dict[str, Any] = self._control.ask(messages.Statistics()).statistics
        known = {
            field.name: values[field.name] for field in dataclasses.fields(RegionStatistics) if field.name in values
        }
        for flag in ("full", "thrashing"):
            known[flag] = bool(known.get(flag, 0))
        return RegionStatistics(**known)

    def close(self) -> None:
        """Give the memory back; again: does nothing. Once no other process has the region any more, what it held is
        gone, here and on every node.

        Raises RegionBusy (a BufferError) while arrays or memoryviews of it exist, or another thread stays inside
        one of its methods; nothing changes then. ForkedError. At the end of a `with` block that an exception leaves,
        that exception goes on, with a note where the region is still in use; it is closed with its last array then.
        """
        if self.closed or self.creator != os.getpid():
            self.begin_close()
            return
        self._uses.shut()
        try:
            begun = self.begin_close()
        except BaseException:
            self._uses.reopen()
            raise
        if not begun:
            return
        try:
            with contextlib.suppress(RamsterError):  # a node that is gone has nothing to close
                self._control.ask(messages.Close())
        finally:
            self.unmap()
            self._control.hang_up()
            _open_regions.discard(self)

    def _own(self) -> None:
        if self.creator != os.getpid():
            raise ForkedError("a region belongs to the process that made it; a forked child must make its own")
        if self.closed:
            raise UsageError("the region is closed")

    def _span(self, where: Range) -> tuple[int, int]:
        """(first page, pages) of a range, rounded outwards."""
        self._own()
        start, stop = arguments.byte_range(where, self.address, self.nbytes)
        if start == stop:
            return start // PAGE_BYTES, 0
        first = start // PAGE_BYTES
        return first, -(-stop // PAGE_BYTES) - first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _close_after(self, error)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes} bytes, {self.resident} resident"
        return f"<ramster.Region {self.name!r}: {state}>"

    def __del__(self) -> None:
        # The memory itself goes with the base class. From a forked child nothing may reach the node.
        control = getattr(self, "_control", None)
        if control is None:
            return
        if self.creator == os.getpid():
            control.hang_up()
        else:
            control.drop()


def _close_after(what: Region | Client, error: BaseException | None) -> None:
    """The end of a `with` block: what went wrong in it matters more than that arrays are left of it."""
    try:
        what.close()
    except RegionBusy as busy:
        if error is None:
            raise
        # The frames of its own traceback hold arrays, as a rule.
        error.add_note(f"ramster: not closed yet, {busy}")


_open_regions: weakref.WeakSet[Region] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    # A region that still has arrays stays mapped and guarded: module globals may be touched until the very end. Its
    # guardian needs nothing of the interpreter and ends with the process.
    for region in list(_open_regions):
        with contextlib.suppress(RamsterError, OSError):
            region.close()


_warned = False


def _warn_user_mode_only() -> None:
    global _warned
    if not _warned:
        _warned = True
        _warn(
            "only page faults from user mode can be served for this process: a system call that touches an away page "
            "(os.write of an array, numpy.save, tofile, readinto) fails with EFAULT or moves less than it was given, "
            "unless Region.pin() holds the range; ramster.save and ramster.load do that. "
            "'sysctl vm.unprivileged_userfaultfd=1', CAP_SYS_PTRACE or access to /dev/userfaultfd lifts this",
            RuntimeWarning,
        )


def _warn(text: str, category: type[Warning]) -> None:
    """As from the line of the user's that led here, however many of ours are between."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ramster":
        frame = frame.f_back
        level += 1
    warnings.warn(text, category, stacklevel=level)


def _chunks(first: int, count: int) -> Iterator[tuple[int, int]]:
    for at in range(first, first + count, messages.SPAN_MAX):
        yield at, min(messages.SPAN_MAX, first + count - at)


class Client:
    """Makes regions at one node, and attaches to those of other processes. Cheap: each region has its own connection.

    socket: path of the node's region socket; None: $RAMSTER_SOCKET, else region.sock in the default run directory.
    Raises NodeUnreachable, PermissionMissing.
    """

    def __init__(self, socket: str | Path | None = None) -> None:
        given = os.environ.get("RAMSTER_SOCKET") or None if socket is None else socket
        self.socket = (
            default_run_dir() / REGION_SOCKET if given is None else canonical_socket(arguments.path("socket", given))
        )
        self.creator = os.getpid()
        self._regions: weakref.WeakSet[Region] = weakref.WeakSet()
        _Control(self.socket).hang_up()

    def region(
        self,
        nbytes: Size,
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> Region:
        """A new region; see Region for arguments and errors. Also raises ForkedError."""
        if self.creator != os.getpid():
            raise ForkedError("a client belongs to the process that made it; connect anew in the child")
        made = Region(self.socket, nbytes, resident=resident, name=name, full=full)
        self._regions.add(made)
        return made

    def attach(self, name: str | SupportsIndex) -> Region:
        """A region that another process of the same user has made, by its name or its number (`Region.number`).

        The same memory, at another address: what one process writes the others read at once, as with any shared memory,
        and it is up to them to take turns. Whichever process ends first, the region lives on with the others.

        Raises UsageError (no such region, or several of that name; the message says which there are),
        PermissionMissing (another user's region, or userfaultfd is not permitted), Refused (too many processes),
        KernelUnsupported, NodeUnreachable, ForkedError. Nothing is left behind then.
        """
        if self.creator != os.getpid():
            raise ForkedError("a client belongs to the process that made it; connect anew in the child")
        found = Region.attached(self.socket, name)
        self._regions.add(found)
        return found

    def empty(
        self,
        shape: Shape,
        dtype: DTypeLike = float,
        order: arguments.Order = "C",
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> NDArray[Any]:
        """A numpy array in a region of its own; see ramster.empty for arguments and errors. Also raises ForkedError."""
        sides, kind = arguments.layout(shape, dtype)
        placed = arguments.order(order)
        size = max(1, kind.itemsize * math.prod(sides))
        return self.region(size, resident=resident, name=name, full=full).array(sides, kind, order=placed)

    def zeros(
        self,
        shape: Shape,
        dtype: DTypeLike = float,
        order: arguments.Order = "C",
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> NDArray[Any]:
        """As `empty`: fresh memory is zeros and costs nothing until touched."""
        return self.empty(shape, dtype, order, resident=resident, name=name, full=full)

    def capacity(self) -> Capacity:
        """What arena, lenders and spill file of the node can take now. Raises NodeUnreachable, Refused."""
        control = _Control(self.socket)
        try:
            return capacity.decode(control.ask(messages.Capacity(version=messages.VERSION)).capacity)
        finally:
            control.hang_up()

    def close(self) -> None:
        """Close every region of this client. Raises RegionBusy where one is in use (the others are closed),
        ForkedError.
        """
        busy: RegionBusy | None = None
        for region in list(self._regions):
            try:
                region.close()
            except RegionBusy as error:
                busy = error
        if busy is not None:
            raise busy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _close_after(self, error)


_default: Client | None = None
_default_lock = threading.Lock()


def _renew_lock() -> None:
    global _default_lock
    _default_lock = threading.Lock()


# Another thread of the parent may hold it at the moment of the fork.
os.register_at_fork(after_in_child=_renew_lock)


def connect(socket: str | Path | None = None) -> Client:
    """A client of the node at `socket`; see Client."""
    return Client(socket)


def default_client() -> Client:
    """The one of this process behind `ramster.empty`; made on first use."""
    global _default
    with _default_lock:
        if _default is None or _default.creator != os.getpid():
            _default = Client()
        return _default


def attach(name: str | SupportsIndex) -> Region:
    """A region that another process of this user has made, by its name or its number: `Client.attach` with the default
    client of this process.
    """
    return default_client().attach(name)


def empty(
    shape: Shape,
    dtype: DTypeLike = float,
    order: arguments.Order = "C",
    *,
    resident: Size | None = None,
    name: str | None = None,
    full: messages.WhenFull = "fail",
) -> NDArray[Any]:
    """A numpy array that may be larger than the RAM it uses, in a region of its own at this machine's node.

    The region lives as long as the array and its views; `ramster.region_of(array)` is it, with `pin`, `prefetch`,
    `evict` and `statistics`. The array reads as zeros until it is written.

    shape, dtype, order ("C" or "F"): as for numpy.empty; types that hold Python objects are refused.
    resident: RAM budget in bytes, or a size such as "64MiB"; None: the node's default.
    name: shown by `ramster status`, and what other processes attach by.
    full: "fail" or "wait": what becomes of a write when no page can leave RAM any more. Either ends in SIGBUS, "wait"
    much later; see ramster.Region. A CapacityWarning comes now where the array may outgrow what there is.

    Uses the default client of this process: $RAMSTER_SOCKET, else the default run directory.

    Raises UsageError (the message names the argument), NodeUnreachable, PermissionMissing (userfaultfd is not
    permitted), KernelUnsupported, Refused (over the node's limits), RegionFull.
    """
    return default_client().empty(shape, dtype, order, resident=resident, name=name, full=full)


def zeros(
    shape: Shape,
    dtype: DTypeLike = float,
    order: arguments.Order = "C",
    *,
    resident: Size | None = None,
    name: str | None = None,
    full: messages.WhenFull = "fail",
) -> NDArray[Any]:
    """As `ramster.empty`, with the same arguments and errors: fresh memory is zeros and costs nothing until touched."""
    return default_client().zeros(shape, dtype, order, resident=resident, name=name, full=full)


def region_of(array: NDArray[Any] | memoryview) -> Region:
    """The region that an array or memoryview lies in. Raises UsageError where it lies in none."""
    owner: Any = array
    for _ in range(_OWNERS_MAX):
        if owner is None:
            break
        if isinstance(owner, Region):
            return owner
        try:
            owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
        except Exception:  # a memoryview that was released, or an object of whatever kind
            break
    raise UsageError(f"array: {arguments.shown(array)}, does not lie in a region")
