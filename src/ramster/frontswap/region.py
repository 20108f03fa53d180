"""A region as its application has it: memory of which only a part is in RAM, and what can be asked for it.

Sizes and ranges are bytes here; the node works in pages of 4096 bytes and ranges are rounded outwards to them.

Everything acts in the process that made it. After `fork` every method raises ForkedError in the child and a touch of
the memory is SIGSEGV; the parent does not notice.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, SupportsIndex, TypeVar, cast, get_args

from ramster import limits
from ramster.constants import PAGE_BYTES
from ramster.errors import ForkedError, ProtocolError, RamsterError, RegionBusy, RegionLost, UsageError
from ramster.frontswap import arguments, capacity, messages
from ramster.frontswap._client import Entered, Mapping
from ramster.frontswap.discarding import discard
from ramster.frontswap.region_control import Control
from ramster.frontswap.region_statistics import RegionStatistics
from ramster.frontswap.under_way import UnderWay, Use

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from ramster.frontswap.arguments import Range, Shape, Size


class Pin(Entered):
    """Pages that stay in RAM and in place until `unpin` or the end of the `with` block."""

    def __init__(self, region: Region, first: int, count: int, group: int) -> None:
        self._region = region
        self._first = first
        self._count = count
        self._group = group
        self._active = True

    def unpin(self) -> None:
        """Let the pages go; again: does nothing. The end of a `with` block does it.

        Raises UsageError where `Region.unpin` was faster, or the region is closed; ForkedError, NodeUnreachable.
        """
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
    in bytes, at least 65536 (16 pages) or all of the region, or a size such as "64MiB"; None: the node's default. name:
    shown by `ramster status`, and what others attach by; 1 to 48 printable characters. full: what becomes of a write
    when neither arena, lenders nor spill file take a page: "fail", SIGBUS after the node's `[region] full_wait`;
    "wait", it waits for room, and is SIGBUS after `[region] full_hold`. A CapacityWarning says so now where the region
    may outgrow what there is (`Client.capacity`).

    Raises NodeUnreachable, PermissionMissing (userfaultfd is not permitted), KernelUnsupported, Refused (over the
    node's limits), RegionFull, UsageError (the message names the argument). Nothing is left behind then.

    Attributes: nbytes and resident, in bytes as the node made them; name; number, which the node gives each region and
    never again; address, of its first byte in this process; closed; creator, the process that made this object.

    Methods that take `where` mean a range in bytes: a slice, a range or a tuple (start, stop), an array or memoryview
    that lies in the region, or None for all of it; rounded outwards to pages. A range that is none, or reaches out of
    the region, is UsageError, a node that is gone NodeUnreachable, a closed region UsageError; nothing changes then,
    and the arrays stay.
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
        """A region that another process of this user has made, by its name or its number; see Client.attach, also for
        what it raises.
        """
        region = cls.__new__(cls)
        Mapping.__init__(region)
        region._open(socket, messages.Join(version=messages.VERSION, region=arguments.which(name)))
        return region

    def _open(self, socket: str | Path, request: messages.Create | messages.Join) -> dict[str, int]:
        self._uses = UnderWay()
        self._control = Control(arguments.path("socket", socket))
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

        shape: items, an integer or a sequence of them. dtype, order ("C" or "F"): as for numpy.empty. offset: in bytes,
        of any alignment. Nothing is read or written: the items are what the bytes say.

        Raises UsageError where the array does not fit in, or the type holds Python objects; ForkedError.
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
        """Bring `count` pages in for writing, from page number `first` on (pages of 4096 bytes, not bytes); their bytes
        stay as they are. For threads: the interpreter's lock is free meanwhile. Nothing keeps them in, `pin` does.

        A page that is lost is SIGBUS here as at any touch, which ends the process: `check` says so before. Raises
        UsageError outside the region (nothing is touched then) and for a closed one, ForkedError.
        """
        super().touch(*arguments.page_run(first, count, self.size // PAGE_BYTES))

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
        """Take back one pin of the same range; its pages may leave again once nobody has them pinned.

        Raises UsageError where not all of it was pinned (a part of a long range, 16 MiB each, may be taken back then),
        NodeUnreachable, ForkedError.
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
        """Bring in what of a range fits in the budget, from its beginning on; bytes of it that are in RAM afterwards.
        Waits for the pages, with the interpreter's lock free.

        Raises RegionLost (`runs` in pages; the other pages stay usable, those before have come in), NodeUnreachable,
        ForkedError.
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
        """Move a range out of RAM now; bytes written out, which are those that had changed. Pinned pages stay.

        Raises RegionFull where neither arena, lenders nor spill file take more (the rest stays resident and right),
        NodeUnreachable, ForkedError.
        """
        first, count = self._span(where)
        return sum(
            self._control.ask(messages.Evict(first=at, count=size)).pages for at, size in _chunks(first, count)
        ) * PAGE_BYTES  # fmt: skip

    @_under_way
    def discard(self, where: Range = None) -> int:
        """Make a range zeros and keep nothing of it: whole pages leave RAM, arena and lenders at once. Nothing is
        fetched or stored for it, so it works where the node is full and a lender is gone, and what was lost of the
        range is zeros, too. The number is 4096 for each page of which the range has every byte, whatever was kept of
        it; the rest, of pages that the range has only in part, is not in it and is written as by a pinned assignment.

        A range as in `evict`, but rounded to nothing: an array must be contiguous and writable. Raises UsageError,
        which for a read-only array is a ValueError too, as numpy's; Refused where a page stays in other hands; for the
        parts of pages RegionFull, RegionLost; NodeUnreachable, ForkedError.
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
            raise RegionLost(messages.lost_words(lost, count), lost)

    @_under_way
    def statistics(self) -> RegionStatistics:
        """The node's counters for this region, a RegionStatistics; of a large one a few seconds old at most. Moves
        nothing. Raises NodeUnreachable, ForkedError.
        """
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
        close_after(self, error)

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


class _Closable(Protocol):
    def close(self) -> None: ...


def close_after(what: _Closable, error: BaseException | None) -> None:
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
