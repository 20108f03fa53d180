"""The node's side of the region socket: one connection per process and region, thin glue between applications and the
engine's Region.

A region lives while one process uses it. Whoever came first has no special part: the last one out closes it.

Everything here runs in the node's event loop; whatever may block (making, pinning, closing a region ...) runs in a
small thread pool, one request of a connection at a time. The page path never comes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol, TypeVar

from ramster import limits
from ramster.admission import Limits, Table
from ramster.constants import PAGE_BYTES, REGION_SOCKET
from ramster.errors import PermissionMissing, PortTaken, RamsterError, UsageError
from ramster.frontswap.region_connection import Connection, send_refusal
from ramster.frontswap.region_shared import EngineRegion, RegionInfo, Shared
from ramster.frontswap.sockets import QUIET_S, Acceptor, is_own
from ramster.frontswap.trust import require_own_folder

__all__ = ["MakeRegion", "RegionInfo", "RegionService", "ServiceCounters", "Settings"]

_log = logging.getLogger("ramster.regions")

# Connections that have no region yet: beyond, one of those that wait has to go. Of one process at most so many, and a
# part is kept for root and the node's user.
WAITING_MAX: Final = 64
WAITING_OF_ONE_MAX: Final = 32
WAITING_KEPT: Final = 16
# Requests that may block at a time, all bounded by the engine's own waits.
WORKERS: Final = 8
# Of them, for one process and for all of one user who is not the node's: a pin may take as long as a lender does.
PROCESS_WORKERS: Final = 4
USER_WORKERS: Final = 5
# What only counts, and what ends, waits for none of those.
LOOKERS: Final = 2
USER_LOOKERS: Final = 1
LEAVERS: Final = 4

_T = TypeVar("_T")


MakeRegion = Callable[[int, int, str], EngineRegion]
"""(pages, resident pages, name) -> a region; may block, may raise a RamsterError."""


class Settings(Protocol):
    """What is used of the configuration's [region] section."""

    @property
    def resident_default_bytes(self) -> int: ...
    @property
    def resident_max_bytes(self) -> int: ...
    @property
    def node_wait_ms(self) -> int: ...
    @property
    def full_hold_ms(self) -> int: ...
    @property
    def poison(self) -> str: ...


@dataclasses.dataclass(kw_only=True)
class ServiceCounters:
    """Events since the node started."""

    connections: int = 0
    joins: int = 0
    """Processes that asked for a region that was there already."""
    regions_made: int = 0
    regions_closed: int = 0
    refused: int = 0
    garbage: int = 0
    """Connections closed because what they sent is no message."""


class RegionService:
    """Serves `region.sock` in a run directory.

    run_dir: made if missing (mode 0700); must belong to this user or root and be writable for nobody else.
    make_region: makes the engine's region. settings: the [region] section of the configuration. tiers: what arena,
    lenders and spill file can take (capacity.of_tiers), where somebody can tell; may block.
    """

    def __init__(
        self,
        run_dir: Path,
        make_region: MakeRegion,
        settings: Settings,
        tiers: Callable[[], dict[str, int]] | None = None,
    ) -> None:
        self.path = run_dir / REGION_SOCKET
        self.make_region = make_region
        self.settings = settings
        self.tiers = tiers
        self.counters = ServiceCounters()
        self.before_leaving: Callable[[], None] = lambda: None
        """Called while a region that a process leaves can still be asked what happened to it."""
        self.regions: dict[int, Shared] = {}
        self.made: Counter[tuple[int, int]] = Counter()
        """Regions by (process, user) that made them."""
        self.waiting = Table(Limits(WAITING_MAX, WAITING_OF_ONE_MAX, WAITING_KEPT))
        self.reserved_pages = 0
        self.last_number = 0
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._acceptor: Acceptor | None = None
        self._quiet_until = 0.0
        self._lock: int | None = None
        self._tiers_now: asyncio.Task[dict[str, int]] | None = None
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="ramster-region")
        self._lookers = ThreadPoolExecutor(LOOKERS, thread_name_prefix="ramster-look")
        self.leavers = ThreadPoolExecutor(LEAVERS, thread_name_prefix="ramster-leave")

    async def start(self) -> None:
        """Listen. Raises PortTaken where another node serves this directory, PermissionMissing for a directory that
        others can write.
        """
        directory = self.path.parent
        require_own_folder(directory)
        try:
            # The lock tells a dead node's socket from a live one's without a race; the kernel drops it with the
            # process.
            self._lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if (limit := limits.reached(error, f"use {directory}", "the node")) is not None:
                raise limit from error
            raise PermissionMissing(
                f"cannot use {directory}: {error.strerror}; set another run_dir in [node]"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._unlock()
            raise PortTaken(f"{self.path}: another node serves it; stop it, or set another run_dir in [node]") from None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(self.path.lstat().st_mode):
                    raise PortTaken(f"{self.path} exists and is no socket; move it away")
                self.path.unlink()
            listener.bind(os.fspath(self.path))
            self.path.chmod(0o660)  # who may come this far is the directory's matter
            listener.listen(WAITING_MAX)
        except BaseException:
            listener.close()
            self._unlock()
            raise
        self._acceptor = Acceptor(listener, str(self.path), self._accept, short=self._accept_short)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _accept(self, sock: socket.socket) -> None:
        self.counters.connections += 1
        sock.setblocking(False)
        connection = Connection(self, sock)
        source = f"process {connection.pid} of user {connection.uid}"
        key = self.waiting.enter(source, is_own(connection.uid), connection.displace)
        assert isinstance(key, int), "nobody proves a name here, so somebody always makes room"
        connection.key = key
        task = asyncio.get_running_loop().create_task(connection.serve(), name=f"region of {connection.pid}")
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._connections.pop(connection))

    def turns_of(self, pid: int, uid: int) -> tuple[asyncio.Semaphore, asyncio.Semaphore, asyncio.Semaphore]:
        """How many requests of a process, and of a user, may be in the pool at once, and how many looks of a user at
        statistics: others need some of it.
        """
        users, looks = (WORKERS, LOOKERS) if is_own(uid) else (USER_WORKERS, USER_LOOKERS)
        return (
            next((c.turns for c in self._connections if c.pid == pid), None) or asyncio.Semaphore(PROCESS_WORKERS),
            next((c.users_turns for c in self._connections if c.uid == uid), None) or asyncio.Semaphore(users),
            next((c.users_looks for c in self._connections if c.uid == uid), None) or asyncio.Semaphore(looks),
        )

    async def look(self, work: Callable[[], _T]) -> _T:
        """Run what only counts; it takes a while in a large region, and no request waits behind it."""
        return await self.run(work, self._lookers)

    async def run(self, work: Callable[[], _T], pool: ThreadPoolExecutor | None = None) -> _T:
        """Run what may block in the pool. Goes on to the end where the caller is cancelled: a region is never closed
        under it.
        """
        future = asyncio.get_running_loop().run_in_executor(pool or self._pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
        finally:
            # A failure's traceback names this frame: the future would keep the failure, and that the region whose
            # memory should be gone, until the garbage collector happens to run.
            del future

    async def room(self) -> dict[str, int]:
        """A Capacity's numbers; empty where nobody can tell."""
        if self.tiers is None:
            return {}
        if self._tiers_now is None or self._tiers_now.done():
            self._tiers_now = asyncio.get_running_loop().create_task(self.look(self.tiers))
        # One look for all who ask meanwhile: there may be more of them than threads.
        tiers = await asyncio.shield(self._tiers_now)
        beyond = sum(max(0, each.region.pages - each.reserved_pages) for each in self.regions.values())
        return {
            **tiers,
            "regions_bytes": beyond * PAGE_BYTES,
            "resident_max_bytes": self.settings.resident_max_bytes,
            "resident_reserved_bytes": self.reserved_pages * PAGE_BYTES,
        }

    def _accept_short(self, sock: socket.socket, error: OSError) -> None:
        """There is no descriptor for a region: say so, and which limit it is."""
        with sock:
            limit = limits.reached(error, "serve another application", f"the node (process {os.getpid()})")
            if limit is not None:
                self.counters.refused += 1
                send_refusal(sock, limit)

    def short(self, limit: RamsterError) -> None:
        """A request failed for a limit of the system: said once in a while."""
        if (now := time.monotonic()) >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            _log.error("region socket: %s", limit)

    def release(self, pid: int, uid: int, reserved_pages: int) -> None:
        """A region is gone, or was not made after all."""
        self.made[pid, uid] -= 1
        if not self.made[pid, uid]:
            del self.made[pid, uid]
        self.reserved_pages -= reserved_pages

    def find(self, which: str | int, uid: int) -> Shared:
        """The region of this name or number. A name is of one's own regions, also for root: anybody may give his the
        name that root looks for. Raises UsageError where the user has none, or several; PermissionMissing for another
        user's.
        """
        found = [each for each in self.regions.values() if which in (each.number, each.name)]
        mine = [each for each in found if each.uid == uid or (uid == 0 and which == each.number)]
        if len(mine) == 1:
            return mine[0]
        if mine:
            raise UsageError(
                f"{len(mine)} regions are named {which!r}: attach to one by its number, "
                + " or ".join(str(each.number) for each in mine)
            )
        if found and uid == 0:
            raise PermissionMissing(
                f"root has no region {which!r}; to attach to another user's, give its number: "
                + ", ".join(f"{each.number} (user {each.uid})" for each in found)
            )
        if found:
            raise PermissionMissing(
                f"region {which!r} belongs to user {found[0].uid}: a region is shared among processes of one user"
            )
        yours = ", ".join(f"{each.shown!r} (number {each.number})" for each in self.regions.values() if each.uid == uid)
        raise UsageError(f"there is no region {which!r}; yours: {yours or 'none'}")

    async def describe(self) -> list[RegionInfo]:
        """Every region with its counters, in the order of their making."""
        found = [await self.look(shared.info) for shared in list(self.regions.values())]
        return sorted((info for info in found if info is not None), key=lambda info: info.number)

    def troubles(self) -> dict[int, tuple[str, int, int, int, int, bool]]:
        """By region's number: its name, a process of it, pages lost now, faults refused and pages removed by the
        application so far, whether it is full. Cheap.
        """
        found = {number: shared.troubles() for number, shared in self.regions.items()}
        return {number: each for number, each in found.items() if each is not None}

    async def close(self) -> None:
        """Stop listening, close every region, wait for the threads. Again: does nothing."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
            self.path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.leave()
        if self._connections:
            await asyncio.wait(list(self._connections.values()))
        if self._tiers_now is not None:
            await asyncio.wait([self._tiers_now])
        for pool in (self._pool, self._lookers, self.leavers):
            pool.shutdown()
        self._unlock()
