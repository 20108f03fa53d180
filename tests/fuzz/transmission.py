"""One fuzzing input against the native transmission phase: what a client sends, what it may get, what it must get.

Covers a connection from the end of its handshake on: `run` plays an input and raises `Broken` when an answer is not
what the protocol and the bytes written so far ask for. The first two bytes of an input choose what the client talks to
and how (see `Plan`); the rest is what it sends. Cookies are numbered here: nothing depends on what they are. The fuzzer
around this is `target`; `seeds` makes inputs.
"""

from __future__ import annotations

import contextlib
import queue
import random
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ramster.constants import PAGE_BYTES
from ramster.engine.links import BULK, GET, Connection, Links
from ramster.engine.nbd import LENGTH_MAX, NbdConnection, NbdServer
from ramster.engine.store import Store
from ramster.errors import StoreFull
from ramster.testing.engines import HANDSHAKE_S, SEGMENT, Side, contexts
from ramster.testing.proxy import wait_until
from ramster.wire import nbd
from ramster.wire.nbd import Command, CommandFlag, Errno, ReplyFlag, ReplyType

PAGES: Final = 80  # more than a read may have that is answered without parking
SIZE: Final = PAGES * PAGE_BYTES
STORED: Final = 24  # pages that an export has from the beginning
DAMAGED: Final = 3
FILLER_PAGES: Final = 180  # of about 240 that the small arena has room for
FILLED: Final = 5
DEADLINE_S: Final = 20.0
ALLOCATION_ID: Final = 7
REQUESTS_MAX: Final = 64  # of one input
ANSWERS_BYTES_MAX: Final = 4 << 20  # asked for by one input; what comes after is cut off
CANDIDATES_MAX: Final = 4
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_COOKIE: Final = 0xAB << 56
_SECRET: Final = random.Random(77).randbytes(64)
_ZEROS: Final = bytes(PAGE_BYTES)
_UNREADABLE: Final[frozenset[bytes | None]] = frozenset([None])

# What a page may hold. A None among it: it cannot be read. None instead of it: nothing is known.
Page = frozenset[bytes | None] | None


class Broken(AssertionError):
    """The server did what it must not do."""


def _content(seed: int) -> bytes:
    return random.Random(seed).randbytes(2048) + bytes([seed % 255 + 1]) * 2048


def _payload(seed: int, length: int) -> bytes:
    """Of a WRITE whose payload an input does not spell out: one byte over and over, half of it noise, or noise."""
    if seed % 3 == 0:
        return bytes([seed % 251]) * length
    page = _content(seed % 64) if seed % 3 == 1 else random.Random(seed).randbytes(PAGE_BYTES)
    return (page * (length // PAGE_BYTES + 1))[:length]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the first two bytes of an input say.

    world: 0 pages here, one of them damaged; 1 pages at a lender; 2 an arena without room; 3 read-only.
    lockstep: each request waits for the answer to the one before. spelt: payloads are in the input, else they are made
    up. leaves: 0 the client takes every answer, 1 it says no more and reads on, 2 it closes at once.
    piece: bytes that are sent at a time; 0: all.
    """

    structured: bool
    allocation: bool
    world: int
    lockstep: bool
    spelt: bool
    leaves: int
    piece: int

    @classmethod
    def of(cls, data: bytes) -> Plan:
        first, second = data[0], data[1]
        return cls(
            structured=first & 1 == 0,
            allocation=first & 3 == 0,
            world=first >> 2 & 3,
            lockstep=bool(first & 16),
            spelt=bool(first & 32),
            leaves=max(0, (first >> 6) - 1),
            piece=second * 61,
        )

    def bytes(self) -> bytes:
        first = (0 if self.allocation else 2 if self.structured else 1) | self.world << 2
        first |= self.lockstep << 4 | self.spelt << 5 | (self.leaves + 1 if self.leaves else 0) << 6
        return bytes([first, self.piece // 61])


# --- what a client sends ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Request:
    """As it went over the wire. complete: with all of its payload."""

    flags: int
    command: int
    offset: int
    length: int
    cookie: int
    wire: bytes = b""
    payload: bytes = b""
    complete: bool = True
    errors: set[int] = field(default_factory=set)  # that its answer may have, 0 among them if it may succeed
    pages: list[Page] = field(default_factory=list)  # of a READ: what they may hold

    @property
    def end(self) -> int:
        return self.offset + self.length


def refused(r: Request, plan: Plan, size: int) -> int:
    """The errno that the protocol asks for, 0 for a request that is served."""
    allowed = CommandFlag.FUA
    if r.command == Command.READ and plan.structured:
        allowed |= CommandFlag.DF
    if r.command == Command.WRITE_ZEROES:
        allowed |= CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO
    if r.command == Command.BLOCK_STATUS:
        allowed |= CommandFlag.REQ_ONE
    if r.command not in set(Command) or r.flags & ~int(allowed):
        return Errno.EINVAL
    if r.command == Command.FLUSH:
        return Errno.EINVAL if r.offset or r.length else 0
    if r.command == Command.BLOCK_STATUS and not plan.allocation:
        return Errno.EINVAL
    changes = r.command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
    if changes and plan.world == 3:
        return Errno.EPERM
    if r.length == 0:
        return Errno.EINVAL
    if r.end > size:
        return Errno.ENOSPC if r.command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
    if r.length > LENGTH_MAX and r.command in (Command.READ, Command.WRITE):
        return Errno.EINVAL
    return 0


@dataclass(slots=True)
class Script:
    """An input taken apart as the server must do it. ends: why nothing more is understood after the last request."""

    requests: list[Request]
    tail: bytes
    ends: str  # "", "goodbye", "noise" (no request, or one that cannot be gone along with), "cut" (within one)


def script(plan: Plan, data: bytes) -> Script:
    requests: list[Request] = []
    at = asked = 0
    while len(data) - at >= _REQUEST.size:
        if len(requests) == REQUESTS_MAX or asked > ANSWERS_BYTES_MAX:
            return Script(requests, b"", "")
        magic, flags, command, _, offset, length = _REQUEST.unpack_from(data, at)
        if magic != nbd.REQUEST_MAGIC:
            return Script(requests, data[at:], "noise")
        cookie = _COOKIE | len(requests) + 1
        r = Request(flags, command, offset, length, cookie)
        r.wire = _REQUEST.pack(magic, flags, command, cookie, offset, length)
        at += _REQUEST.size
        if command == Command.DISC:
            return Script(requests, r.wire + data[at:], "goodbye")
        if command == Command.WRITE:
            error = refused(r, plan, SIZE)
            if error and length > 2 * LENGTH_MAX:
                return Script(requests, r.wire + data[at:], "noise")
            if plan.spelt or length > SIZE:
                r.payload = data[at : at + length]
                at += len(r.payload)
            else:
                r.payload = _payload(len(requests) + offset, length)
            r.wire += r.payload
            r.complete = len(r.payload) == length
        elif command == Command.READ and not refused(r, plan, SIZE):
            asked += length
        requests.append(r)
        if not r.complete:
            return Script(requests, b"", "cut")
    return Script(requests, data[at:], "cut" if at < len(data) else "")


# --- what an export holds -----------------------------------------------------------------------------------------


def stored(page: int) -> bytes:
    """A page as every export has it from the beginning."""
    return _ZEROS if page >= STORED else b"\x66" * PAGE_BYTES if page == FILLED else _content(page)


class Model:
    """What each page may hold, after requests that may have failed half-way too."""

    def __init__(self, plan: Plan, requests: list[Request]) -> None:
        self.may_refuse = plan.world == 2
        self.may_fail = plan.world in (0, 2)
        self.pages: list[Page] = [frozenset([stored(n)]) for n in range(PAGES)]
        if plan.world == 0:
            self.pages[DAMAGED] = frozenset([None])
        if plan.world == 1 and not plan.lockstep:  # requests overtake each other: what is changed may be anything
            for r in requests:
                if r.errors == {0} and r.command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
                    for page, _, _ in _parts(r):
                        self.pages[page] = None
        self._unordered = plan.world == 1 and not plan.lockstep

    def play(self, r: Request) -> None:
        """Note what the answer may be, and what the pages may hold afterwards."""
        if r.command in (Command.FLUSH, Command.CACHE, Command.BLOCK_STATUS):
            return
        parts = list(_parts(r))
        needed = [
            self.pages[page]
            for page, low, high in parts
            if r.command == Command.READ or (r.command != Command.TRIM and high - low < PAGE_BYTES)
        ]
        if r.command == Command.READ:
            r.pages = needed
        may_fail = self.may_fail and any(held is None or None in held for held in needed)
        must_fail = any(held == _UNREADABLE for held in needed)
        if r.command in (Command.WRITE, Command.WRITE_ZEROES):
            may_fail |= self.may_refuse
        if may_fail:
            r.errors = {Errno.EIO} if must_fail else {0, Errno.EIO}
            r.errors |= {Errno.ENOSPC, Errno.ENOMEM} if self.may_refuse else set()
        if r.command == Command.READ or self._unordered:
            return
        for page, low, high in parts:
            start = page * PAGE_BYTES - r.offset
            new = r.payload[start + low : start + high] if r.command == Command.WRITE else bytes(high - low)
            self._change(r, page, low, new, may_fail)

    def _change(self, r: Request, page: int, low: int, new: bytes, may_fail: bool) -> None:
        old = self.pages[page]
        if len(new) == PAGE_BYTES:
            after: frozenset[bytes | None] = frozenset([new])
        elif r.command == Command.TRIM or old is None:
            return  # parts of pages stay as they are
        else:
            high = low + len(new)
            after = frozenset(each[:low] + new + each[high:] for each in old if each is not None)
        if may_fail and r.command != Command.TRIM:
            if old is None:
                return
            after |= old | (_UNREADABLE if self.may_refuse else frozenset())
        self.pages[page] = None if len(after) > CANDIDATES_MAX else after


def _parts(r: Request) -> Iterator[tuple[int, int, int]]:
    """(page, first byte, last byte + 1) of each page that a request touches."""
    for page in range(r.offset // PAGE_BYTES, (r.end - 1) // PAGE_BYTES + 1):
        start = page * PAGE_BYTES
        yield page, max(r.offset - start, 0), min(r.end - start, PAGE_BYTES)


# --- what it answers ----------------------------------------------------------------------------------------------


class Answers:
    """Takes replies apart as they arrive. `waiting`: requests that have none yet."""

    def __init__(self, plan: Plan) -> None:
        self.waiting: dict[int, Request] = {}
        self._plan = plan
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data
        while size := self._whole():
            reply = bytes(self._bytes[:size])
            del self._bytes[:size]
            if _SECRET in reply:
                raise Broken("bytes of another pool")
            if reply[:4] == _SIMPLE.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 0)[:4]:
                self._simple(reply)
            else:
                self._chunk(reply)

    def end(self) -> None:
        if self._bytes and not self._plan.leaves:
            raise Broken(f"the connection ended within a reply: {bytes(self._bytes[:64])!r}")

    def _whole(self) -> int:
        """Length of the reply at the front, 0 if some of it is still to come."""
        size = 0
        if len(self._bytes) >= _SIMPLE.size and self._bytes[:4] == struct.pack(">I", nbd.SIMPLE_REPLY_MAGIC):
            _, error, cookie = _SIMPLE.unpack_from(self._bytes)
            asked = self._asked(cookie)
            size = _SIMPLE.size + (asked.length if asked.command == Command.READ and not error else 0)
        elif len(self._bytes) >= _CHUNK.size:
            magic, _, _, _, length = _CHUNK.unpack_from(self._bytes)
            if magic != nbd.STRUCTURED_REPLY_MAGIC:
                raise Broken(f"not a reply: {bytes(self._bytes[:64])!r}")
            if length > SIZE + 8:
                raise Broken(f"a chunk of {length} bytes")
            size = _CHUNK.size + length
        return size if len(self._bytes) >= size else 0

    def _asked(self, cookie: int) -> Request:
        if cookie not in self.waiting:
            raise Broken(f"a reply to {cookie:#x}, which was not asked, was answered already, or is not complete")
        return self.waiting[cookie]

    def _simple(self, reply: bytes) -> None:
        _, error, cookie = _SIMPLE.unpack_from(reply)
        r = self._asked(cookie)
        if self._plan.structured and r.command in (Command.READ, Command.BLOCK_STATUS):
            raise Broken(f"a simple reply to {r}")
        self._done(r, error, reply[_SIMPLE.size :])

    def _chunk(self, reply: bytes) -> None:
        _, flags, kind, cookie, length = _CHUNK.unpack_from(reply)
        body = reply[_CHUNK.size :]
        r = self._asked(cookie)
        if not self._plan.structured or flags != ReplyFlag.DONE:
            raise Broken(f"a chunk with flags {flags} to {r}")
        if kind == ReplyType.ERROR_OFFSET and length == 14:
            error, text, offset = struct.unpack(">IHQ", body)
            if not error or text or (error != Errno.EINVAL and not r.offset <= offset < r.end):
                raise Broken(f"error {error} at {offset} in {r}")
            self._done(r, error, b"")
        elif r.command == Command.READ and kind == ReplyType.OFFSET_DATA:
            if struct.unpack(">Q", body[:8])[0] != r.offset:
                raise Broken(f"data of another offset than that of {r}")
            self._done(r, 0, body[8:])
        elif r.command == Command.READ and kind == ReplyType.OFFSET_HOLE and length == 12:
            if struct.unpack(">QI", body) != (r.offset, r.length):
                raise Broken(f"a hole that is not {r}")
            self._done(r, 0, bytes(r.length))
        elif r.command == Command.BLOCK_STATUS and kind == ReplyType.BLOCK_STATUS and length % 8 == 4 and length > 4:
            self._status(r, body)
            self._done(r, 0, b"")
        elif r.command not in (Command.READ, Command.BLOCK_STATUS) and kind == ReplyType.NONE and length == 0:
            self._done(r, 0, b"")
        elif r.command not in (Command.READ, Command.BLOCK_STATUS) and kind == ReplyType.ERROR and length == 6:
            error, text = struct.unpack(">IH", body)
            if not error or text:
                raise Broken(f"error {error} in {r}")
            self._done(r, error, b"")
        else:
            raise Broken(f"a chunk of type {kind} and {length} bytes to {r}")

    def _status(self, r: Request, body: bytes) -> None:
        runs = list(struct.iter_unpack(">II", body[4:]))
        covered = sum(length for length, _ in runs)
        one = bool(r.flags & CommandFlag.REQ_ONE)
        if (
            struct.unpack(">I", body[:4])[0] != ALLOCATION_ID
            or any(length == 0 or state not in (0, 3) for length, state in runs)
            or covered > r.length
            or (len(runs) > 1 if one else covered < r.length)
        ):
            raise Broken(f"status {runs} of {r}")

    def _done(self, r: Request, error: int, data: bytes) -> None:
        del self.waiting[r.cookie]
        if error not in r.errors:
            raise Broken(f"error {error} instead of {r.errors} for {_told(r)}")
        if error or r.command != Command.READ:
            return
        if len(data) != r.length:
            raise Broken(f"{len(data)} bytes for {_told(r)}")
        at = 0
        for (page, low, high), held in zip(_parts(r), r.pages, strict=True):
            part = data[at : at + high - low]
            at += high - low
            if held is not None and not any(each is not None and each[low:high] == part for each in held):
                raise Broken(f"page {page} is not what was written, in {_told(r)}")


def _told(r: Request) -> str:
    return f"{r.command} flags {r.flags:#x} offset {r.offset} length {r.length} cookie {r.cookie & 0xFFFF}"


# --- what a client talks to ---------------------------------------------------------------------------------------


class World:
    """An engine of this process, a pool that no client may see, and a thread that serves one connection at a time."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.store = links.store
        # Few rows and one slow thread: inputs are short, and their requests should have to wait for each other.
        self.server = NbdServer(links, slow_threads=1, requests_max=4)
        self.secret = self.store.create_pool(pages=1)
        self.store.put(self.secret, 0, _SECRET * (PAGE_BYTES // len(_SECRET)))
        self._jobs: queue.SimpleQueue[tuple[NbdConnection, int, Plan] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while job := self._jobs.get():
            connection, number, plan = job
            try:
                reason: str | BaseException = connection.serve(
                    self.server, number, plan.structured, ALLOCATION_ID if plan.allocation else None, SIZE
                )
                connection.close()
            except BaseException as error:
                reason = error
            self._ended.put(reason)

    def begin(self, sock: socket.socket, number: int, plan: Plan) -> None:
        self._jobs.put((NbdConnection(sock.detach()), number, plan))

    def ended(self) -> str:
        try:
            reason = self._ended.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise Broken("the connection does not end") from None
        if isinstance(reason, BaseException):
            raise reason
        return reason

    def export(self, plan: Plan) -> tuple[int, int]:
        """(pool, number) of a fresh one."""
        pool = self.store.create_pool(pages=PAGES)
        for page in range(STORED):
            self.put(pool, page)
        if plan.world == 0:
            self.store.corrupt(pool, DAMAGED, 700)
        return pool, self.server.add_export(pool, SIZE, SIZE, read_only=plan.world == 3)

    def put(self, pool: int, page: int) -> None:
        self.store.put(pool, page, stored(page))

    def discard(self, pool: int, number: int) -> None:
        self.server.events()
        self.server.remove_export(number)
        self.store.destroy_pool(pool)
        if self.links.get(self.secret, 0) != _SECRET * (PAGE_BYTES // len(_SECRET)):
            raise Broken("a client has changed another pool")

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(DEADLINE_S)
        self.server.stop()
        self.links.stop()
        self.store.verify()
        self.store.close()


class Here(World):
    def __init__(self) -> None:
        super().__init__(Links(Store(64 * SEGMENT, segment_bytes=SEGMENT, lock=False, full_wait_ms=50), 1, lock=False))


class Full(World):
    """There is room for some ten pages that do not compress, and writes of more are refused."""

    def __init__(self) -> None:
        super().__init__(Links(Store(16 * SEGMENT, segment_bytes=SEGMENT, lock=False, full_wait_ms=0), 1, lock=False))
        filler = self.store.create_pool(pages=FILLER_PAGES)
        for page in range(FILLER_PAGES):
            self.store.put(filler, page, random.Random(page).randbytes(PAGE_BYTES))

    def put(self, pool: int, page: int) -> None:
        def done() -> bool:
            try:
                super(Full, self).put(pool, page)
            except StoreFull:
                return False
            return True

        wait_until(done, "the last input's pages are gone")


class Away(World):
    """Most pages that are stored are at a lender."""

    def __init__(self) -> None:
        times = {"request_deadline_ms": 5000, "give_up_ms": 10_000}
        with tempfile.TemporaryDirectory() as directory:
            keys = contexts(Path(directory), 2)
        self.borrower = Side(1, keys[1], 64, 0, **times)
        self.lender = Side(2, keys[2], 8, 32, **times)
        for kind in (GET, BULK):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                ours = socket.create_connection(listener.getsockname(), HANDSHAKE_S)
                theirs, _ = listener.accept()
            client = Connection(keys[1], ours.detach(), False)
            server = Connection(keys[2], theirs.detach(), True)
            greeting = threading.Thread(target=server.handshake, args=(HANDSHAKE_S,))
            greeting.start()
            client.handshake(HANDSHAKE_S)
            greeting.join()
            credit = int(self.lender.links.counters()["lent_free"])
            self.borrower.links.attach(client, 2, kind, self.lender.generation, credit)
            self.lender.links.attach(server, 1, kind, self.borrower.generation, 0)
        super().__init__(self.borrower.links)

    def export(self, plan: Plan) -> tuple[int, int]:
        pool, number = super().export(plan)
        wait_until(lambda: self.lender.lent_used() < 8, "the lender forgets what the last inputs left")
        self.store.seal_open()
        self.borrower.order(self.lender)
        self.borrower.settle()
        for page in (1, 9, 17):  # some of them are here, between those that are not
            self.put(pool, page)
        return pool, number

    def close(self) -> None:
        super().close()
        self.lender.stop()


class Player:
    """Plays inputs; what they talk to is made once."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def world(self, plan: Plan) -> World:
        kind = plan.world % 3
        if kind not in self._worlds:
            self._worlds[kind] = (Here, Away, Full)[kind]()
        return self._worlds[kind]

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()
        self._worlds.clear()

    def run(self, data: bytes) -> str:
        """Play an input; why its connection ended. Broken if the server does what it must not."""
        if len(data) < 2:
            return ""
        plan = Plan.of(data)
        said = script(plan, data[2:])
        for r in said.requests:
            r.errors = {refused(r, plan, SIZE)}
        model = Model(plan, said.requests)
        for r in said.requests:
            if r.errors == {0} and r.complete:
                model.play(r)
        world = self.world(plan)
        pool, number = world.export(plan)
        client, server = socket.socketpair()
        try:
            world.begin(server, number, plan)
            _converse(plan, said, client)
            client.close()
            reason = world.ended()
        finally:
            client.close()
        world.discard(pool, number)
        return reason


def _converse(plan: Plan, said: Script, client: socket.socket) -> None:
    """Send what there is to be sent and check what comes, until nothing more has to come."""
    answers = Answers(plan)
    wires = [(r.wire, r if r.complete else None) for r in said.requests]
    if said.tail:
        wires.append((said.tail, None))
    if not plan.lockstep:
        wires = [(b"".join(wire for wire, _ in wires), None)]
        answers.waiting = {r.cookie: r for r in said.requests if r.complete}
    may_end = said.ends in ("goodbye", "noise")
    client.setblocking(False)
    deadline = time.monotonic() + DEADLINE_S
    poll = select.poll()
    poll.register(client, select.POLLIN)
    out = memoryview(b"")
    asked: Request | None = None
    silent = False
    while True:
        if not out and wires and (asked is None or asked.cookie not in answers.waiting):
            wire, asked = wires.pop(0)
            out = memoryview(wire)
            if asked is not None:
                answers.waiting[asked.cookie] = asked
        if not out and not wires:
            if plan.leaves == 2:
                return
            if plan.leaves == 1 and not silent:
                with contextlib.suppress(OSError):  # it may have ended already
                    client.shutdown(socket.SHUT_WR)
                silent = True
            if not answers.waiting and not may_end and not silent:
                break
        if out:
            try:
                sent = client.send(out[: plan.piece or len(out)])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                if may_end:
                    out, wires = memoryview(b""), []
                    continue
                raise Broken(f"the connection ended too early: {error}") from None
            out = out[sent:]
            if not out:
                continue
        poll.modify(client, select.POLLIN | (select.POLLOUT if out else 0))
        left = deadline - time.monotonic()
        if left <= 0:
            raise Broken("no answer to " + ", ".join(map(_told, answers.waiting.values())))
        for _, event in poll.poll(left * 1000):
            if not event & ~select.POLLOUT:
                continue
            try:
                data = client.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if data:
                answers.feed(data)
                continue
            if not may_end and not silent:
                raise Broken("the connection ended too early")
            if said.ends == "goodbye" and answers.waiting and not plan.leaves:
                raise Broken("no answer before the end to " + ", ".join(map(_told, answers.waiting.values())))
            answers.end() if said.ends == "goodbye" else None
            return
    answers.end()


# --- mutations ----------------------------------------------------------------------------------------------------

_NUMBERS: Final = [
    *(0, 1, 2, 27, 28, 511, 512, 4095, 4096, 4097, 8191, 8192, 3 * 4096, 5 * 4096 + 5, 16 * 4096, 17 * 4096, 32 * 4096),
    *(STORED * 4096, 262143, 262144, 262145, SIZE - 4096, SIZE - 1, SIZE, SIZE + 1, LENGTH_MAX, LENGTH_MAX + 1),
    *(2 * LENGTH_MAX, 2 * LENGTH_MAX + 1, 0x7FFFFFFF, 0xFFFFF000, 0xFFFFFFFF),
]
_OFFSETS: Final = [*_NUMBERS, 1 << 32, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1]


def request(command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    return _REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, 0, offset % (1 << 64), length) + payload


def _random_request(r: random.Random) -> bytes:
    command = r.choice([*Command, *Command, Command.READ, Command.WRITE, r.randrange(1 << 16)])
    if r.random() < 0.7:  # within the export
        offset = r.choice([r.randrange(SIZE), r.randrange(PAGES) * PAGE_BYTES])
        length = min(
            r.choice([r.randrange(1, 9000), r.randrange(1, 30) * PAGE_BYTES, r.choice(_NUMBERS)]), SIZE - offset
        )
    else:
        offset, length = r.choice(_OFFSETS), r.choice(_NUMBERS)
    flags = r.choice([0, 0, 0, 1, 2, 4, 8, 16, r.randrange(32), r.randrange(1 << 16)])
    return request(command, offset, length, flags)


def _pieces(plan: Plan, data: bytes) -> list[bytes]:
    """Requests with their payloads; what is none is a piece of its own."""
    found = []
    at = 0
    while at < len(data):
        size = len(data) - at
        if size >= _REQUEST.size and data[at : at + 4] == struct.pack(">I", nbd.REQUEST_MAGIC):
            _, _, command, _, _, length = _REQUEST.unpack_from(data, at)
            size = _REQUEST.size
            if command == Command.WRITE and (plan.spelt or length > SIZE):
                size += min(length, len(data) - at - size)
        found.append(data[at : at + size])
        at += size
    return found


def _changed_field(r: random.Random, piece: bytes) -> bytes:
    if len(piece) < _REQUEST.size:
        return _random_request(r)
    magic, flags, command, cookie, offset, length = _REQUEST.unpack_from(piece)
    match r.randrange(8):
        case 0:
            flags ^= 1 << r.randrange(16)
        case 1:
            command = r.choice([*Command, r.randrange(1 << 16)])
        case 2:
            offset = r.choice(_OFFSETS)
        case 3:
            length = r.choice(_NUMBERS)
        case 4:
            offset = (offset + r.choice([-4096, -1, 1, 4096, r.randrange(SIZE)])) % (1 << 64)
        case 5:
            length = (length + r.choice([-4096, -1, 1, 4096, r.randrange(9000)])) % (1 << 32)
        case 6:
            offset, length = offset & ~0xFFF, length & ~0xFFF
        case _:
            magic ^= (1 << r.randrange(32)) * (r.random() < 0.2)
    return _REQUEST.pack(magic, flags, command, cookie, offset, length) + piece[_REQUEST.size :]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Another input, of at most so many bytes, that differs from this one by whole requests and their fields."""
    r = random.Random(seed)
    plan = Plan.of(data) if len(data) >= 2 else Plan(True, True, 0, False, False, 0, 0)
    head = bytearray(data[:2] if len(data) >= 2 else plan.bytes())
    pieces = _pieces(plan, data[2:])
    for _ in range(r.choice([1, 1, 2, 4])):
        at = r.randrange(len(pieces) + 1)
        match r.randrange(8):
            case 0:
                head[r.randrange(2)] = r.randrange(256)
            case 1 | 2:
                pieces.insert(at, _random_request(r))
            case 3 if pieces:
                del pieces[at % len(pieces)]
            case 4 if pieces:
                pieces.insert(at, r.choice(pieces))
            case 5 if pieces:
                r.shuffle(pieces)
            case 6 if pieces and r.random() < 0.3:
                pieces[-1] = pieces[-1][: r.randrange(len(pieces[-1]) + 1)]
            case _ if pieces:
                pieces[at % len(pieces)] = _changed_field(r, pieces[at % len(pieces)])
    return bytes(head) + b"".join(pieces)[: most - 2]
