"""One application at its node's region socket: its requests, one at a time, each answered once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from ramster import limits
from ramster.config.units import show_size
from ramster.constants import PAGE_BYTES, REGION_MESSAGE_BYTES_MAX
from ramster.errors import ProtocolError, RamsterError, Refused, RegionLost, UsageError
from ramster.frontswap import messages
from ramster.frontswap._client import FEATURES
from ramster.frontswap.pin_groups import PinGroups
from ramster.frontswap.region_shared import EngineRegion, Shared
from ramster.frontswap.shares import region_refusal
from ramster.frontswap.sockets import is_own, peer_of

if TYPE_CHECKING:
    from ramster.frontswap.region_service import RegionService

_log = logging.getLogger("ramster.regions")

# Pages that one answer to Check looks at, some 50 ms.
CHECK_PAGES: Final = 1 << 18
# Two messages of a local process; whatever else it asks, who has no region by then goes.
HANDSHAKE_DEADLINE_S: Final = 10.0
_SO_PEERPIDFD: Final = 77  # Linux 6.5; not in Python's socket module
_UFFD_INITIALIZED: Final = 1 << 31  # as /proc/PID/fdinfo shows it

_DISPLACED: Final = "too many connections were waiting for a region, and this one had to make room"

_T = TypeVar("_T")


class _Garbage(Exception):
    """The other side sent what is no message; its connection ends."""


class Connection:
    """A connected process and, after its first message, its region."""

    def __init__(self, service: RegionService, sock: socket.socket) -> None:
        self.service = service
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self.pid, self.uid, self.pidfd = _peer(sock)
        self.shared: Shared | None = None
        self.attachment: int | None = None
        self.attached = False
        self._groups = PinGroups()
        self._until = self.loop.time() + HANDSHAKE_DEADLINE_S
        self.key = 0  # among those that wait
        self._gone = False
        self._displaced = False
        self._waiting: asyncio.Future[None] | None = None
        # Shared with the others of this process and of this user.
        self.turns, self.users_turns, self.users_looks = service.turns_of(self.pid, self.uid)
        if self.pidfd is not None:
            self.loop.add_reader(self.pidfd, self.leave)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run a request of this application in the pool, as soon as it and its user have a turn."""
        async with self.turns, self.users_turns:
            return await self.service.run(work)

    async def _statistics(self) -> dict[str, int]:
        self._ready()
        shared = self.shared
        assert shared is not None
        async with self.users_looks:
            return await self.service.look(shared.look)

    async def _unless_displaced(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Who has no region waits for nothing once another one needs its place: it would be counted nowhere."""
        task = self.loop.create_task(work)
        self._waiting = self.loop.create_future()
        if self._gone:
            self._notify()
        try:
            either: set[asyncio.Future[Any]] = {task, self._waiting}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refused(_DISPLACED)
            return task.result()
        finally:
            self._waiting = None
            task.cancel()

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
                async with asyncio.timeout_at(None if self.attached else self._until):
                    await self._waiting
            finally:
                self.loop.remove_reader(self.sock)
                self._waiting = None
            if self._displaced:
                self._refuse(Refused(_DISPLACED))
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
                    reply = messages.Reply(ok=True, capacity=await self._unless_displaced(self.service.room()))
                case messages.Attach():
                    reply = await self._attach(request, fds.pop())
                case messages.Close():
                    await self._leave_region()
                    reply = messages.Reply(ok=True)
                case messages.Undo():
                    reply = messages.Reply(ok=True, pages=await self._undo(request.group))
                case messages.Statistics():
                    reply = messages.Reply(ok=True, statistics=await self._statistics())
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
        if request.name is not None and not messages.is_name(request.name):
            raise UsageError(f"name: {request.name!r}, must be {messages.NAME_RULE}")
        asked = request.resident_pages
        if asked is None:
            asked = settings.resident_default_bytes // PAGE_BYTES
        resident = max(1, min(request.pages, asked))
        limit = settings.resident_max_bytes // PAGE_BYTES
        if settings.resident_max_bytes and service.reserved_pages + resident > limit:
            free = show_size((limit - service.reserved_pages) * PAGE_BYTES)
            raise Refused(
                f"the region wants {show_size(resident * PAGE_BYTES)} resident; of the node's resident_max "
                f"({show_size(limit * PAGE_BYTES)}) {free} is free"
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
        shown = request.name or f"pid {self.pid}"
        service.waiting.leave(self.key)  # it is decided: nobody takes its place from here on
        try:
            region = await self.run(lambda: service.make_region(request.pages, resident, shown))
            if request.full == "wait":
                region.wait_when_full(settings.full_hold_ms)
        except BaseException:
            self._gone = True  # after the answer, since it stands in nobody's table any more
            service.release(self.pid, self.uid, resident)
            raise
        shared = Shared(region, request.name, shown, self.pid, self.uid, resident)
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

    async def _enter(self, shared: Shared) -> tuple[messages.Reply, list[int]]:
        # A member before anything is waited for: the region stays.
        self.shared = shared
        self.service.waiting.leave(self.key)
        shared.members.append(self)
        channel = -1
        try:
            self.attachment, channel = await self.run(shared.region.join)
            memfd = os.dup(shared.region.memfd)
        except BaseException:
            self._gone = True  # after the answer, since it stands in nobody's table any more
            if channel >= 0:
                os.close(channel)
            await self._leave_region()
            raise
        self._until = self.loop.time() + HANDSHAKE_DEADLINE_S
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
                if request.group and (refused := self._groups.refusal(request.group, first)):
                    raise UsageError(refused)
                await run(lambda: region.pin(number, first, count))
                if request.group:
                    self._groups.add(request.group, first, count)
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
        for first, count in list(self._groups.take(group)):
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
