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
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec

from ramster import limits
from ramster.admission import Limits, Table
from ramster.config.units import format_bytes
from ramster.constants import PAGE_BYTES, REGION_MESSAGE_BYTES_MAX, REGION_SOCKET
from ramster.errors import PermissionMissing, PortTaken, ProtocolError, RamsterError, Refused, RegionLost, UsageError
from ramster.frontswap import messages
from ramster.frontswap._client import FEATURES
from ramster.frontswap.shares import region_refusal
from ramster.frontswap.sockets import QUIET_S, Acceptor, is_own, peer_of
from ramster.frontswap.trust import require_own_folder

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
LEAVERS: Final = 4
# Pages that one answer to Check looks at, some 50 ms.
CHECK_PAGES: Final = 1 << 18
# A look at the statistics of a large region takes long; it is good for this many times as long.
LOOK_AGAIN: Final = 10
# Two messages of a local process.
HANDSHAKE_DEADLINE_S: Final = 10.0
_SO_PEERPIDFD: Final = 77  # Linux 6.5; not in Python's socket module
_UFFD_INITIALIZED: Final = 1 << 31  # as /proc/PID/fdinfo shows it

_T = TypeVar("_T")


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
    def troubles(self) -> tuple[int, int, int]: ...
    def wait_when_full(self, hold_ms: int) -> None: ...
    def close(self) -> None: ...


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


class _Shared:
    """A region and the connections that use it."""

    def __init__(
        self, region: EngineRegion, name: str | None, shown: str, pid: int, uid: int, reserved_pages: int
    ) -> None:
        self.region = region
        self.name, self.shown, self.reserved_pages = name, shown, reserved_pages
        self.pid, self.uid = pid, uid  # of who made it
        self.number = 0
        self.members: list[_Connection] = []
        self._closed = False
        self._statistics: dict[str, int] = {}
        self._look_after = 0.0
        # Taken in pool threads. A member that leaves may take a while: `info` waits for the last one only.
        self._leaving = threading.Lock()
        self._closing = threading.Lock()

    def info(self) -> RegionInfo | None:
        """Runs in a pool thread; None where the region is gone."""
        pids = tuple(member.pid for member in list(self.members))
        if not pids or not self._closing.acquire(timeout=1.0):
            return None
        try:
            began = time.monotonic()
            if self._closed:
                return None
            if began >= self._look_after:
                self._statistics = dict(self.region.statistics())
                ended = time.monotonic()
                # Where it is quick, each asker gets the numbers of this moment.
                self._look_after = ended + LOOK_AGAIN * (ended - began) if ended - began > 0.02 else 0.0
            return RegionInfo(
                number=self.number, name=self.shown, pid=pids[0], pids=pids, statistics=dict(self._statistics)
            )
        finally:
            self._closing.release()

    def troubles(self) -> tuple[str, int, int, int, int] | None:
        """Its name, a process of it, pages lost, faults refused, pages removed; None while it closes. Never waits."""
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


class _Garbage(Exception):
    """The other side sent what is no message; its connection ends."""


class _Connection:
    """A connected process and, after its first message, its region."""

    def __init__(self, service: RegionService, sock: socket.socket) -> None:
        self.service = service
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self.pid, self.uid, self.pidfd = _peer(sock)
        self.shared: _Shared | None = None
        self.attachment: int | None = None
        self.attached = False
        self._groups: dict[int, list[tuple[int, int]]] = {}  # what Undo takes back
        self.key = 0  # among those that wait
        self._gone = False
        self._displaced = False
        self._waiting: asyncio.Future[None] | None = None
        # Shared with the others of this process and of this user.
        self.turns, self.users_turns = service.turns_of(self.pid, self.uid)
        if self.pidfd is not None:
            self.loop.add_reader(self.pidfd, self.leave)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run a request of this application in the pool, as soon as it and its user have a turn."""
        async with self.turns, self.users_turns:
            return await self.service.run(work)

    def leave(self) -> None:
        """The application has ended, or the node wants to: stop after the request that is being served."""
        self._gone = True
        if self.pidfd is not None:
            self.loop.remove_reader(self.pidfd)
        self._notify()

    def displace(self) -> None:
        """Another one needs its place."""
        self._displaced = True
        self.leave()

    def _notify(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def serve(self) -> None:
        """Until the application closes its region, ends, or breaks the rules."""
        try:
            while not self._gone:
                received = await self._receive()
                if received is None:
                    return
                request, fds = received
                reply, sent = await self._answer(request, fds)
                if not self._send(reply, sent) or isinstance(request, messages.Close):
                    return
        except _Garbage as error:
            self.service.counters.garbage += 1
            _log.warning("region socket: closing the connection of process %d: %s", self.pid, error)
        except (TimeoutError, OSError) as error:
            _log.warning("region socket: closing the connection of process %d: %s", self.pid, str(error) or "too slow")
        finally:
            await self._end()

    async def _receive(self) -> tuple[messages.Request, list[int]] | None:
        """The next request; None once the application is gone."""
        while True:
            self._waiting = self.loop.create_future()
            self.loop.add_reader(self.sock, self._notify)
            try:
                async with asyncio.timeout(None if self.attached else HANDSHAKE_DEADLINE_S):
                    await self._waiting
            finally:
                self.loop.remove_reader(self.sock)
                self._waiting = None
            if self._displaced:
                self._refuse(Refused("too many connections were waiting for a region, and this one had to make room"))
            if self._gone:
                return None
            try:
                data, fds, flags, _ = socket.recv_fds(
                    self.sock, REGION_MESSAGE_BYTES_MAX, 8, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except (BlockingIOError, InterruptedError):
                continue
            except ConnectionError:
                return None
            break
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise _Garbage(f"a message of more than {REGION_MESSAGE_BYTES_MAX} bytes, or with too many descriptors")
            if not data:
                return None  # end of file brings no descriptors
            try:
                request = messages.decode_request(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise _Garbage(str(error)) from error
            if len(fds) != isinstance(request, messages.Attach):
                raise _Garbage(f"{len(fds)} descriptors with a {type(request).__name__} message")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return request, fds

    def _send(self, reply: messages.Reply, fds: list[int]) -> bool:
        try:
            socket.send_fds(self.sock, [messages.encode(reply)], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            # Gone, or it asks without ever reading answers.
            return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    async def _answer(self, request: messages.Request, fds: list[int]) -> tuple[messages.Reply, list[int]]:
        sent: list[int] = []
        try:
            match request:
                case messages.Create():
                    reply, sent = await self._create(request)
                case messages.Join():
                    reply, sent = await self._join(request)
                case messages.Capacity():
                    _check_version(request.version)
                    reply = messages.Reply(ok=True, capacity=await self.service.room())
                case messages.Attach():
                    reply = await self._attach(request, fds.pop())
                case messages.Close():
                    await self._leave_region()
                    reply = messages.Reply(ok=True)
                case messages.Undo():
                    reply = messages.Reply(ok=True, pages=await self._undo(request.group))
                case messages.Statistics():
                    reply = messages.Reply(ok=True, statistics=await self.service.look(self._ready()[0].statistics))
                case _:
                    reply = await self._span(request)
        except RamsterError as error:
            runs = error.runs[: messages.RUNS_MAX] if isinstance(error, RegionLost) else []
            self.service.counters.refused += isinstance(error, Refused)
            reply = messages.Reply(ok=False, error=error.code, message=str(error), runs=runs)
        except ValueError as error:
            reply = messages.Reply(ok=False, error=UsageError.code, message=str(error))
        except Exception as error:
            doing = f"answer {type(request).__name__}"
            if (limit := limits.reached(error, doing, f"the node (process {os.getpid()})")) is not None:
                self.service.short(limit)
                reply = messages.Reply(ok=False, error=limit.code, message=str(limit))
            else:
                _log.exception("region %s: %s failed", self.name, type(request).__name__)
                reply = messages.Reply(ok=False, error=RamsterError.code, message=f"{type(error).__name__}: {error}")
        finally:
            for fd in fds:
                os.close(fd)
        return msgspec.structs.replace(reply, id=request.id), sent

    def _check_first(self, version: int) -> None:
        _check_version(version)
        if self.shared is not None:
            raise UsageError("this connection has a region already")

    async def _create(self, request: messages.Create) -> tuple[messages.Reply, list[int]]:
        self._check_first(request.version)
        service, settings = self.service, self.service.settings
        asked = request.resident_pages
        if asked is None:
            asked = settings.resident_default_bytes // PAGE_BYTES
        resident = max(1, min(request.pages, asked))
        limit = settings.resident_max_bytes // PAGE_BYTES
        if settings.resident_max_bytes and service.reserved_pages + resident > limit:
            free = format_bytes((limit - service.reserved_pages) * PAGE_BYTES)
            raise Refused(
                f"the region wants {format_bytes(resident * PAGE_BYTES)} resident; of the node's resident_max "
                f"({format_bytes(limit * PAGE_BYTES)}) {free} is free"
            )
        refused = region_refusal(
            service.made.total(),
            sum(count for (pid, _), count in service.made.items() if pid == self.pid),
            sum(count for (_, uid), count in service.made.items() if uid == self.uid),
            own=is_own(self.uid),
        )
        if refused:
            raise Refused(refused)
        # Reserved before the first await: two that come at once cannot both pass the check.
        service.made[self.pid, self.uid] += 1
        service.reserved_pages += resident
        # It is shown on terminals and in logs.
        shown = "".join(c if c.isprintable() else "?" for c in request.name or f"pid {self.pid}")
        service.waiting.leave(self.key)  # it is decided: nobody takes its place from here on
        try:
            region = await self.run(lambda: service.make_region(request.pages, resident, shown))
            if request.full == "wait":
                region.wait_when_full(settings.full_hold_ms)
        except BaseException:
            self._gone = True  # after the answer, since it stands in nobody's table any more
            service.release(self.pid, self.uid, resident)
            raise
        shared = _Shared(region, request.name, shown, self.pid, self.uid, resident)
        service.last_number += 1
        shared.number = service.last_number
        service.counters.regions_made += 1
        service.regions[shared.number] = shared
        reply, fds = await self._enter(shared)
        return msgspec.structs.replace(reply, capacity=await service.room()), fds

    async def _join(self, request: messages.Join) -> tuple[messages.Reply, list[int]]:
        self._check_first(request.version)
        self.service.counters.joins += 1
        return await self._enter(self.service.find(request.region, self.uid))

    async def _enter(self, shared: _Shared) -> tuple[messages.Reply, list[int]]:
        # A member before anything is waited for: the region stays.
        self.shared = shared
        self.service.waiting.leave(self.key)
        shared.members.append(self)
        channel = -1
        try:
            self.attachment, channel = await self.run(shared.region.join)
            memfd = os.dup(shared.region.memfd)
        except BaseException:
            if channel >= 0:
                os.close(channel)
            await self._leave_region()
            raise
        region = shared.region
        settings = self.service.settings
        reply = messages.Reply(
            ok=True,
            region=shared.number,
            name=shared.shown,
            pages=region.pages,
            resident_pages=region.resident_pages,
            node_wait_ms=settings.node_wait_ms,
            poison=settings.poison,
        )
        return reply, [memfd, channel]

    async def _attach(self, request: messages.Attach, uffd: int) -> messages.Reply:
        try:
            if self.shared is None or self.attachment is None or self.attached:
                raise UsageError("attach comes once, after create or join")
            region, number = self.shared.region, self.attachment
            if request.base % PAGE_BYTES or request.base + region.pages * PAGE_BYTES >= 1 << 63:
                raise UsageError(f"base: {request.base:#x} is no place for {region.pages} pages")
            _check_userfaultfd(uffd, request.features)
        except BaseException:
            os.close(uffd)
            raise
        await self.run(lambda: region.attach(number, uffd, request.base, request.features))
        self.attached = True
        return messages.Reply(ok=True)

    async def _span(self, request: messages.Span) -> messages.Reply:
        region, number = self._ready()
        first, count = request.first, request.count
        if first + count > region.pages:
            raise UsageError(f"pages {first} to {first + count}, the region has {region.pages}")
        if count > messages.SPAN_MAX and not isinstance(request, messages.Check | messages.Advise):
            raise UsageError(f"{count} pages in one request, allowed are {messages.SPAN_MAX}")
        run = self.run
        match request:
            case messages.Pin():
                await run(lambda: region.pin(number, first, count))
                if request.group:
                    self._groups.setdefault(request.group, []).append((first, count))
                    if len(self._groups) > messages.GROUPS_MAX:
                        del self._groups[next(iter(self._groups))]
                return messages.Reply(ok=True)
            case messages.Unpin():
                await run(lambda: region.unpin(number, first, count))
                return messages.Reply(ok=True)
            case messages.Prefetch():
                return messages.Reply(ok=True, pages=await run(lambda: region.prefetch(number, first, count)))
            case messages.Evict():
                return messages.Reply(ok=True, pages=await run(lambda: region.evict(first, count)))
            case messages.Discard():
                return messages.Reply(ok=True, pages=await run(lambda: region.discard(first, count)))
            case messages.Advise():
                await run(lambda: region.advise(request.kind, first, count))
                return messages.Reply(ok=True)
            case messages.Check():
                # A part at a time: a region may have 2^32 pages, and one look at all of them takes minutes.
                part = min(count, CHECK_PAGES)
                runs = await run(lambda: region.check(first, part))
                more = runs[messages.RUNS_MAX][0] if len(runs) > messages.RUNS_MAX else None
                if more is None and part < count:
                    more = first + part
                return messages.Reply(ok=True, runs=runs[: messages.RUNS_MAX], next_page=more)

    async def _undo(self, group: int) -> int:
        region, number = self._ready()
        pages = 0
        for first, count in self._groups.pop(group, []):
            await self.run(partial(region.unpin, number, first, count))
            pages += count
        return pages

    def _ready(self) -> tuple[EngineRegion, int]:
        if self.shared is None or self.attachment is None or not self.attached:
            raise UsageError("create or join, and attach, come first")
        return self.shared.region, self.attachment

    @property
    def name(self) -> str:
        return f"{self.shared.number} ({self.shared.shown})" if self.shared else "none"

    async def _leave_region(self) -> None:
        shared, self.shared = self.shared, None
        if shared is None:
            return
        self.service.before_leaving()
        shared.members.remove(self)
        last = not shared.members
        if last:
            del self.service.regions[shared.number]
        attachment, self.attachment, self.attached = self.attachment, None, False
        try:
            await self.service.run(lambda: shared.leave(attachment, last), self.service.leavers)
        finally:
            if last:
                self.service.counters.regions_closed += 1
                self.service.release(shared.pid, shared.uid, shared.reserved_pages)

    def _refuse(self, error: RamsterError) -> None:
        """Without a request: whoever asks next reads it."""
        self.service.counters.refused += 1
        _log.warning("region socket: refused process %d: %s", self.pid, error)
        send_refusal(self.sock, error)

    async def _end(self) -> None:
        self.service.waiting.leave(self.key)
        if self.pidfd is not None:
            self.loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = None
        try:
            await self._leave_region()
        except Exception:
            _log.exception("process %d: leaving its region failed", self.pid)
        self.sock.close()


def _check_version(version: int) -> None:
    if version != messages.VERSION:
        raise ProtocolError(
            f"the application speaks version {version} of the region protocol, this node {messages.VERSION}"
        )


def _check_userfaultfd(fd: int, features: int) -> None:
    """Raises UsageError for what would answer the engine's requests in its own way, or block it."""
    if Path(f"/proc/self/fd/{fd}").readlink() != Path("anon_inode:[userfaultfd]"):
        raise UsageError("the descriptor is no userfaultfd")
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    state = next((line.split(":")[2] for line in lines if line.startswith("API:")), "0")
    settled = int(state, 16)
    if not settled & _UFFD_INITIALIZED:
        raise UsageError("the userfaultfd has not settled its features yet (UFFDIO_API)")
    # With others, of events beside faults, requests wait for whoever reads those; and claiming one that is off would
    # make the engine's requests fail.
    if extra := settled & ~(FEATURES | _UFFD_INITIALIZED):
        raise UsageError(f"the userfaultfd has features that a region must not have: {extra:#x}")
    if missing := features & ~settled:
        raise UsageError(f"features: {missing:#x} are not on in the userfaultfd")


def send_refusal(sock: socket.socket, error: RamsterError) -> None:
    """To an application that has not asked yet, as the answer to whatever it asks."""
    reply = messages.Reply(id=messages.ANY_ID, ok=False, error=error.code, message=str(error))
    with contextlib.suppress(OSError):
        sock.send(messages.encode(reply), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _peer(sock: socket.socket) -> tuple[int, int, int | None]:
    """(process id, user, pidfd) of the other side; no pidfd where it lives in another process namespace or has ended
    already.

    End of file alone does not tell that the application is gone: a child that it forked may hold the socket.
    """
    pid, uid = peer_of(sock)
    with contextlib.suppress(OSError):
        return pid, uid, sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    with contextlib.suppress(OSError, ValueError):
        return pid, uid, os.pidfd_open(pid)
    return pid, uid, None


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
        self.regions: dict[int, _Shared] = {}
        self.made: Counter[tuple[int, int]] = Counter()
        """Regions by (process, user) that made them."""
        self.waiting = Table(Limits(WAITING_MAX, WAITING_OF_ONE_MAX, WAITING_KEPT))
        self.reserved_pages = 0
        self.last_number = 0
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._acceptor: Acceptor | None = None
        self._quiet_until = 0.0
        self._lock: int | None = None
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
        connection = _Connection(self, sock)
        source = f"process {connection.pid} of user {connection.uid}"
        key = self.waiting.enter(source, is_own(connection.uid), connection.displace)
        assert isinstance(key, int), "nobody proves a name here, so somebody always makes room"
        connection.key = key
        task = asyncio.get_running_loop().create_task(connection.serve(), name=f"region of {connection.pid}")
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._connections.pop(connection))

    def turns_of(self, pid: int, uid: int) -> tuple[asyncio.Semaphore, asyncio.Semaphore]:
        """How many requests of a process, and of a user, may be in the pool at once: others need some of it."""
        own = is_own(uid)
        users = WORKERS if own else USER_WORKERS
        return (
            next((c.turns for c in self._connections if c.pid == pid), None) or asyncio.Semaphore(PROCESS_WORKERS),
            next((c.users_turns for c in self._connections if c.uid == uid), None) or asyncio.Semaphore(users),
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
        beyond = sum(max(0, each.region.pages - each.reserved_pages) for each in self.regions.values())
        return {
            **await self.look(self.tiers),
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

    def find(self, which: str | int, uid: int) -> _Shared:
        """The region of this name or number. Raises UsageError where the user has none, or several; PermissionMissing
        for another user's.
        """
        found = [each for each in self.regions.values() if which in (each.number, each.name)]
        mine = [each for each in found if uid in (each.uid, 0)]
        if len(mine) == 1:
            return mine[0]
        if mine:
            raise UsageError(
                f"{len(mine)} regions are named {which!r}: attach to one by its number, "
                + " or ".join(str(each.number) for each in mine)
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

    def troubles(self) -> dict[int, tuple[str, int, int, int, int]]:
        """By region's number: its name, a process of it, pages lost now, faults refused and pages removed by the
        application so far. Cheap.
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
        for pool in (self._pool, self._lookers, self.leavers):
            pool.shutdown()
        self._unlock()
