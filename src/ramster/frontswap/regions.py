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
import math
import os
import socket
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, SupportsIndex, TypeAlias, get_args

import msgspec

from ramster import limits
from ramster.config.paths import default_run_dir
from ramster.config.units import parse_bytes
from ramster.constants import PAGE_BYTES, POOL_PAGES_MAX, REGION_MESSAGE_BYTES_MAX, REGION_SOCKET
from ramster.errors import (
    ForkedError,
    NodeUnreachable,
    PermissionMissing,
    ProtocolError,
    RamsterError,
    RegionLost,
    UsageError,
    from_code,
)
from ramster.frontswap import messages
from ramster.frontswap._client import Mapping

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

    Range: TypeAlias = slice | tuple[int, int] | NDArray[Any] | None
    """A part of a region: a slice or (start, stop) in bytes, an array that lies in it, or None for all of it."""
    Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex]

# A node answers each request within its own, shorter waits (region.full_wait, links.give_up); this catches one that
# hangs.
REQUEST_DEADLINE_S: Final = 30.0
CONNECT_DEADLINE_S: Final = 5.0


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
        self._lock = threading.Lock()
        self._last = 0
        with limits.named(f"connect to {path}"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            # A connect() with Python's timeout fails at once where the node's queue is full; this one waits its turn.
            timeout = struct.pack("@ll", int(CONNECT_DEADLINE_S), 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            self._socket.connect(os.fspath(path))
        except PermissionError as error:
            self._socket.close()
            raise PermissionMissing(
                f"may not connect to {path}: join the group that owns it, or run as the node's user"
            ) from error
        except OSError as error:
            self._socket.close()
            raise NodeUnreachable(
                f"no node answers at {path} ({error.strerror or error}): start one with 'ramster node --config FILE', "
                "or name its socket in RAMSTER_SOCKET"
            ) from error

    def ask(self, request: messages.Request, fds: Sequence[int] = ()) -> messages.Reply:
        """Send and wait. Raises the error that the node reports, NodeUnreachable, ProtocolError."""
        with self._lock:
            return self._result(self._wait(self._send(request, fds)))

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

    def ask_undoable(self, request: messages.Request, undo: messages.Request) -> messages.Reply:
        """As `ask`, but an interrupt (Ctrl-C) meanwhile waits for the node's answer and takes back what was granted."""
        with self._lock:
            number = self._send(request)
            try:
                return self._result(self._wait(number))
            except RamsterError:
                raise
            except BaseException:
                with contextlib.suppress(RamsterError):
                    self._result(self._wait(number))
                    self._result(self._wait(self._send(undo)))
                raise

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
                    fds.extend(received)
                    received = []
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


class Pin:
    """Pages that stay in RAM and in place until `unpin` or the end of the `with` block."""

    def __init__(self, region: Region, first: int, count: int) -> None:
        self._region = region
        self._first = first
        self._count = count
        self._active = True

    def unpin(self) -> None:
        """Let the pages go; again: does nothing. Raises ForkedError, NodeUnreachable."""
        if self._active:
            self._region._unpin(self._first, self._count)
            self._active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpin()


class Region(Mapping):
    """`nbytes` of memory (rounded up to whole pages), of which at most `resident` bytes are in RAM.

    A writable buffer: `memoryview(region)` and numpy work on it. Fresh memory reads as zeros. A page whose only copy
    was lost is SIGBUS when touched, never wrong bytes. The memory lives until `close`, or until the region and the
    last array on it are gone; where other processes are attached, until the last of them is through with it.

    socket: the node's region socket. nbytes: size in bytes, at least 1. resident: RAM budget in bytes, or a size
    such as "64MiB"; None: the node's default. name: shown by `ramster status`.

    Raises NodeUnreachable, PermissionMissing (userfaultfd is not permitted), KernelUnsupported, Refused (over the
    node's limits), RegionFull, UsageError. Nothing is left behind then.
    """

    def __init__(
        self, socket: str | Path, nbytes: int, *, resident: int | str | None = None, name: str | None = None
    ) -> None:
        super().__init__()
        pages = -(-int(nbytes) // PAGE_BYTES)
        if not 1 <= pages <= POOL_PAGES_MAX:
            raise UsageError(f"nbytes: {nbytes}, must be 1 to {POOL_PAGES_MAX * PAGE_BYTES}")
        resident_pages = None
        if resident is not None:
            try:
                resident_pages = min(pages, parse_bytes(resident) // PAGE_BYTES)
            except ValueError as error:
                raise UsageError(f"resident: {resident!r}, {error}") from error
            if resident_pages < 1:
                raise UsageError(f"resident: {resident}, must be at least one page of {PAGE_BYTES} bytes")
        if name is not None and not 1 <= len(name) <= messages.NAME_MAX:
            raise UsageError(f"name: must have 1 to {messages.NAME_MAX} characters")
        self._open(
            socket, messages.Create(version=messages.VERSION, pages=pages, resident_pages=resident_pages, name=name)
        )

    @classmethod
    def attached(cls, socket: str | Path, name: str | int) -> Self:
        """A region that another process of this user has made, by its name or its number; see Client.attach."""
        if isinstance(name, str) and not 1 <= len(name) <= messages.NAME_MAX:
            raise UsageError(f"name: must have 1 to {messages.NAME_MAX} characters")
        region = cls.__new__(cls)
        Mapping.__init__(region)
        region._open(socket, messages.Join(version=messages.VERSION, region=name))
        return region

    def _open(self, socket: str | Path, request: messages.Create | messages.Join) -> None:
        self._control = _Control(Path(socket))
        try:
            made, (memfd, channel) = self._control.ask_for_descriptors(request, 2)
            with limits.named("map a region"):
                self.map(memfd, channel, made.pages * PAGE_BYTES, made.node_wait_ms, made.poison != "guard")
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

    def array(self, shape: Shape, dtype: DTypeLike = float, offset: int = 0) -> NDArray[Any]:
        """A numpy array over the region's bytes from `offset` on, C order. It keeps the region alive.

        Raises UsageError where the array does not fit in, or the type holds Python objects.
        """
        import numpy as np

        kind, sides = _kind(dtype), _sides(shape)
        size = kind.itemsize * math.prod(sides)
        if not 0 <= offset <= self.nbytes - size:
            raise UsageError(f"an array of {size} bytes at byte {offset} does not fit in a region of {self.nbytes}")
        # frombuffer holds the buffer for as long as the array lives; ndarray(buffer=...) takes the address and lets go.
        return np.frombuffer(memoryview(self), np.uint8)[offset : offset + size].view(kind).reshape(sides)

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
        done = 0
        try:
            for at, size in _chunks(first, count):
                self._control.ask_undoable(
                    messages.Pin(first=at, count=size), undo=messages.Unpin(first=at, count=size)
                )
                done += size
                # Maps each page writable in this process, so that no system call has to fault on it.
                self.touch(at, size)
        except BaseException:
            with contextlib.suppress(RamsterError):
                self._unpin(first, done)
            raise
        return Pin(self, first, count)

    def unpin(self, where: Range = None) -> None:
        """Take back one pin of the same range. Raises UsageError where it was not pinned, NodeUnreachable,
        ForkedError.
        """
        self._unpin(*self._span(where))

    def _unpin(self, first: int, count: int) -> None:
        self._own()
        for at, size in _chunks(first, count):
            self._control.ask(messages.Unpin(first=at, count=size))

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

    def evict(self, where: Range = None) -> int:
        """Move a range out of RAM now; bytes written out. Pinned pages stay.

        Raises RegionFull (the rest stays resident and right), NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        return sum(
            self._control.ask(messages.Evict(first=at, count=size)).pages for at, size in _chunks(first, count)
        ) * PAGE_BYTES  # fmt: skip

    def advise(self, kind: messages.Advice, where: Range = None) -> None:
        """Say how a range will be used: "normal", "sequential", "random" or "cyclic".

        It changes how much comes in with a fault and what is evicted first, never what is read. It replaces what was
        said of these pages before and lasts as long as the region. See "Telling how it will be used" in
        docs/regions.md.

        Raises UsageError for another word, and where more than 64 ranges of the region would have an advice of their
        own (nothing changes then); NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        if kind not in get_args(messages.Advice):
            raise UsageError(f"advice: {kind!r}, must be one of {', '.join(get_args(messages.Advice))}")
        if count:
            self._control.ask(messages.Advise(kind=kind, first=first, count=count))

    def check(self, where: Range = None) -> None:
        """Return if every page of a range can still be had; moves nothing.

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

    def statistics(self) -> RegionStatistics:
        """The node's counters for this region. Raises NodeUnreachable, ForkedError."""
        self._own()
        values: dict[str, Any] = self._control.ask(messages.Statistics()).statistics
        known = {
            field.name: values[field.name] for field in dataclasses.fields(RegionStatistics) if field.name in values
        }
        known["full"] = bool(known.get("full", 0))
        return RegionStatistics(**known)

    def close(self) -> None:
        """Give the memory back; again: does nothing. Once no other process has the region any more, what it held is
        gone, here and on every node.

        Raises BufferError while arrays or memoryviews of it exist (nothing changes then), ForkedError.
        """
        if not self.begin_close():
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
        if where is None:
            start, stop = 0, self.nbytes
        elif isinstance(where, slice):
            start, stop, step = where.indices(self.nbytes)
            if step != 1:
                raise UsageError(f"range: a slice with step {step}, must be contiguous")
        elif isinstance(where, tuple):
            start, stop = where
        else:
            from numpy.lib.array_utils import byte_bounds

            low, high = byte_bounds(where)
            start, stop = low - self.address, high - self.address
        if not 0 <= start <= stop <= self.nbytes:
            raise UsageError(f"range: bytes {start} to {stop}, must lie in order within 0 to {self.nbytes}")
        if start == stop:
            return start // PAGE_BYTES, 0
        first = start // PAGE_BYTES
        return first, -(-stop // PAGE_BYTES) - first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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


_open_regions: weakref.WeakSet[Region] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    # A region that still has arrays stays mapped and guarded: module globals may be touched until the very end. Its
    # guardian needs nothing of the interpreter and ends with the process.
    for region in list(_open_regions):
        with contextlib.suppress(BufferError, RamsterError, OSError):
            region.close()


_warned = False


def _warn_user_mode_only() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "only page faults from user mode can be served for this process: a system call that touches an away page "
            "(os.write of an array, for example) fails with EFAULT unless the range is pinned; "
            "'sysctl vm.unprivileged_userfaultfd=1', CAP_SYS_PTRACE or access to /dev/userfaultfd lifts this",
            RuntimeWarning,
            stacklevel=4,
        )


def _kind(dtype: DTypeLike) -> np.dtype[Any]:
    import numpy as np

    kind = np.dtype(dtype)
    if kind.hasobject or kind.itemsize == 0:
        raise UsageError(f"dtype: {kind}, must have a size and hold no Python objects")
    return kind


def _sides(shape: Shape) -> tuple[int, ...]:
    sides = tuple(int(side) for side in (shape if isinstance(shape, Sequence) else (shape,)))
    if any(side < 0 for side in sides):
        raise UsageError(f"shape: {shape}, must not be negative")
    return sides


def _chunks(first: int, count: int) -> Iterator[tuple[int, int]]:
    for at in range(first, first + count, messages.SPAN_MAX):
        yield at, min(messages.SPAN_MAX, first + count - at)


class Client:
    """Makes regions at one node, and attaches to those of other processes. Cheap: each region has its own connection.

    socket: path of the node's region socket; None: $RAMSTER_SOCKET, else region.sock in the default run directory.
    Raises NodeUnreachable, PermissionMissing.
    """

    def __init__(self, socket: str | Path | None = None) -> None:
        self.socket = Path(socket or os.environ.get("RAMSTER_SOCKET") or default_run_dir() / REGION_SOCKET)
        self.creator = os.getpid()
        self._regions: weakref.WeakSet[Region] = weakref.WeakSet()
        _Control(self.socket).hang_up()

    def region(self, nbytes: int, *, resident: int | str | None = None, name: str | None = None) -> Region:
        """A new region; see Region for arguments and errors. Also raises ForkedError."""
        if self.creator != os.getpid():
            raise ForkedError("a client belongs to the process that made it; connect anew in the child")
        made = Region(self.socket, nbytes, resident=resident, name=name)
        self._regions.add(made)
        return made

    def attach(self, name: str | int) -> Region:
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
        self, shape: Shape, dtype: DTypeLike = float, *, resident: int | str | None = None, name: str | None = None
    ) -> NDArray[Any]:
        """A numpy array in a region of its own, which lives as long as the array and its views. It reads as zeros."""
        kind, sides = _kind(dtype), _sides(shape)
        size = kind.itemsize * math.prod(sides)
        return self.region(max(1, size), resident=resident, name=name).array(sides, kind)

    def zeros(
        self, shape: Shape, dtype: DTypeLike = float, *, resident: int | str | None = None, name: str | None = None
    ) -> NDArray[Any]:
        """As `empty`: fresh memory is zeros and costs nothing until touched."""
        return self.empty(shape, dtype, resident=resident, name=name)

    def close(self) -> None:
        """Close every region of this client. Raises BufferError where one has arrays (the others are closed),
        ForkedError.
        """
        busy: BufferError | None = None
        for region in list(self._regions):
            try:
                region.close()
            except BufferError as error:
                busy = error
        if busy is not None:
            raise busy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _default_client() -> Client:
    global _default
    with _default_lock:
        if _default is None or _default.creator != os.getpid():
            _default = Client()
        return _default


def attach(name: str | int) -> Region:
    """`Client.attach` with the default client of this process."""
    return _default_client().attach(name)


def empty(
    shape: Shape, dtype: DTypeLike = float, *, resident: int | str | None = None, name: str | None = None
) -> NDArray[Any]:
    """`Client.empty` with the default client of this process."""
    return _default_client().empty(shape, dtype, resident=resident, name=name)


def zeros(
    shape: Shape, dtype: DTypeLike = float, *, resident: int | str | None = None, name: str | None = None
) -> NDArray[Any]:
    """`Client.zeros` with the default client of this process."""
    return _default_client().zeros(shape, dtype, resident=resident, name=name)


def region_of(array: NDArray[Any] | memoryview) -> Region:
    """The region that an array or memoryview lies in. Raises UsageError where it lies in none."""
    owner: Any = array
    while owner is not None:
        if isinstance(owner, Region):
            return owner
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    raise UsageError("the array does not lie in a region")
