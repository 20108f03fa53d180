"""A region at its node and the processes that use it: no member has a special part, the last one out closes it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

# A look at the statistics of a large region takes long; it is good for this many times as long.
LOOK_AGAIN: Final = 10


class EngineRegion(Protocol):
    """What is used of ramster.engine's Region. `statistics` may be called beside any other method."""

    @property
    def memfd(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def resident_pages(self) -> int: ...
    def join(self) -> tuple[int, int]: ...
    def attach(self, number: int, uffd: int, base: int, features: int) -> None: ...
    def detach(self, number: int) -> None: ...
    def pin(self, number: int, first: int, count: int) -> None: ...
    def unpin(self, number: int, first: int, count: int) -> None: ...
    def prefetch(self, number: int, first: int, count: int) -> int: ...
    def evict(self, first: int, count: int) -> int: ...
    def discard(self, first: int, count: int) -> int: ...
    def advise(self, kind: str, first: int, count: int) -> None: ...
    def check(self, first: int, count: int) -> list[tuple[int, int]]: ...
    def statistics(self) -> dict[str, int]: ...
    def troubles(self) -> tuple[int, int, int, bool]: ...
    def wait_when_full(self, hold_ms: int) -> None: ...
    def close(self) -> None: ...


MakeRegion = Callable[[int, int, str], EngineRegion]
"""(pages, resident pages, name) -> a region; may block, may raise a RamsterError."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionInfo:
    """One region, for `ramster status`."""

    number: int
    name: str
    pid: int
    """Of the process that has used it for longest."""
    pids: tuple[int, ...]
    """Of all that use it, in the order of their coming."""
    statistics: dict[str, int]


class Member(Protocol):
    """A process that uses a region."""

    @property
    def pid(self) -> int: ...


class Shared:
    """A region and the connections that use it."""

    def __init__(
        self, region: EngineRegion, name: str | None, shown: str, pid: int, uid: int, reserved_pages: int
    ) -> None:
        self.region = region
        self.name, self.shown, self.reserved_pages = name, shown, reserved_pages
        self.pid, self.uid = pid, uid  # of who made it
        self.number = 0
        self.members: list[Member] = []
        self._closed = False
        self._statistics: dict[str, int] = {}
        self._look_after = 0.0
        # Taken in pool threads. A member that leaves may take a while: `info` waits for the last one only.
        self._leaving = threading.Lock()
        self._closing = threading.Lock()
        self._looking = threading.Lock()

    def look(self) -> dict[str, int]:
        """The region's statistics. Runs in a pool thread, for a member or under the lock that `leave` takes."""
        with self._looking:
            began = time.monotonic()
            if began >= self._look_after:
                self._statistics = dict(self.region.statistics())
                ended = time.monotonic()
                # Where it is quick, each asker gets the numbers of this moment.
                self._look_after = ended + LOOK_AGAIN * (ended - began) if ended - began > 0.02 else 0.0
            return dict(self._statistics)

    def info(self) -> RegionInfo | None:
        """Runs in a pool thread; None where the region is gone."""
        pids = tuple(member.pid for member in list(self.members))
        if not pids or not self._closing.acquire(timeout=1.0):
            return None
        try:
            if self._closed:
                return None
            return RegionInfo(number=self.number, name=self.shown, pid=pids[0], pids=pids, statistics=self.look())
        finally:
            self._closing.release()

    def troubles(self) -> tuple[str, int, int, int, int, bool] | None:
        """Its name, a process of it, pages lost, faults refused, pages removed, whether it is full; None while it
        closes. Never waits.
        """
        if not self.members or not self._closing.acquire(blocking=False):
            return None
        try:
            return None if self._closed else (self.shown, self.members[0].pid, *self.region.troubles())
        finally:
            self._closing.release()

    def leave(self, attachment: int | None, last: bool) -> None:
        """Runs in a pool thread."""
        with self._leaving:
            if last:
                with self._closing:
                    self._closed = True
                    self.region.close()
            elif attachment is not None:
                self.region.detach(attachment)
