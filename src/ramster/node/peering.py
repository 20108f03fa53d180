"""Who connects to whom, and who is let in: the asyncio shell around the handshake. Bytes of pages never come here.

The node with the higher number connects, twice to each peer (get, bulk); the other accepts. When the other misses a
connection, it asks to be called: it says HELLO at the peer's port, is refused, and the peer, which knows by its
certificate who it is, connects at once. Where the peer has not got through for a while, it may be that somebody floods
the other's port from the peer's address: then it takes the connection that it is asked on.

What arrives on the port gets one bounded handshake: TLS with the cluster's certificates, then HELLO. Everything else is
closed and counted.
Whatever a peer says ends that connection at most, never a task of this node.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ramster.config.knobs import Links as LinkSettings
from ramster.config.knobs import Peer
from ramster.engine.links import BULK, GET, Connection, Links
from ramster.errors import CertificateError, ProtocolError, RamsterError, Refused
from ramster.frontswap.sockets import listen_tcp
from ramster.node.credentials import Credentials
from ramster.node.door import Caller, Door, readable
from ramster.node.lives import ANSWER_S_MAX, Life, Verdict, judge
from ramster.node.redial import HANDSHAKE_S, Redial
from ramster.wire import conduct, frames, hello

log = logging.getLogger(__name__)

# Our own handshakes at a time, in threads of their own: they never queue behind those of strangers.
DIALS_MAX = 64
_ACCEPT_PAUSE_S = 0.1
_DIGITS = re.compile(r"[\d.]+")
# So many are accepted before everybody else in the loop has a turn: accepting does not wait while somebody is there.
_ACCEPTS_A_TURN = 16
_NO_ROOM = "it had to make room for others"
_KINDS = {"get": GET, "bulk": BULK}


@dataclass(slots=True)
class PeeringCounters:
    """Events since the node started."""

    accepted: int = 0
    connected: int = 0
    refused_connections: int = 0
    garbage_connections: int = 0


@dataclass(slots=True)
class _PeerState:
    peer: Peer
    reason: str = ""
    said: set[str] = field(default_factory=set)
    """Reasons that the log has, since the peer was last connected."""
    refused: str = ""  # why it was when it came last; empty where it was not, or nobody is there any more
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    called: dict[str, asyncio.Event] = field(default_factory=lambda: {kind: asyncio.Event() for kind in _KINDS})
    connected: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    trying: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    """Since when this node tries to connect; 0.0 where it does not."""
    attaching: threading.Lock = field(default_factory=threading.Lock)


class _Call(ProtocolError):
    """Who is refused here is a peer that this node connects to, and misses the connection."""

    def __init__(self, message: str, number: int, kind: str) -> None:
        super().__init__(message)
        self.number = number
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Asked:
    """The peer's link when it was asked for a sign of life, and at what time, in seconds in which this node ran."""

    life: Life | None
    at: float


class Peering:
    """Keeps both connections to every configured peer up, and lets in those peers that are to connect to us."""

    def __init__(
        self,
        links: Links,
        credentials: Credentials,
        make_hello: Callable[[str, int], hello.Hello],
        peers: tuple[Peer, ...],
        settings: LinkSettings,
        number: int,
        foreign_grace_ms: int,
        on_change: Callable[[], None] = lambda: None,
        shut_out_ms: Callable[[int, int], int] = conduct.shut_out_ms,
    ) -> None:
        self.links = links
        self.credentials = credentials
        self.make_hello = make_hello
        self.settings = settings
        self.number = number
        self.redial = Redial(
            settings.reconnect_min_ms / 1000, settings.reconnect_max_ms / 1000, settings.give_up_ms / 1000
        )
        self.foreign_grace_s = foreign_grace_ms / 1000
        self._shut_out_ms = shut_out_ms
        self.counters = PeeringCounters()
        self._on_change = on_change
        self.address: tuple[str, int] | None = None
        self._peers = {peer.number: _PeerState(peer) for peer in peers}
        self._known = {peer.number: peer.name for peer in peers}
        self._door = Door(peer.address.host for peer in peers)
        self._greeters = ThreadPoolExecutor(self._door.greeted.limits.total, thread_name_prefix="ramster-greet")
        self._diallers = ThreadPoolExecutor(DIALS_MAX, thread_name_prefix="ramster-dial")
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._grace: dict[int, asyncio.TimerHandle] = {}
        self._stood_still_ms = 0
        self._dice = random.Random()
        self._news = threading.Condition()
        """Notified of whatever the links raise; guards `_closing`."""
        self._closing = False

    async def start(self) -> None:
        """Listen and begin to connect. PortTaken when somebody else listens there."""
        self._stood_still_ms = self.links.stood_still_ms()  # until now it was being made ready
        self._listener = listen_tcp(self.settings.listen.host, self.settings.listen.port, "[links] listen")
        self.address = self._listener.getsockname()[:2]
        loop = asyncio.get_running_loop()
        loop.add_reader(self.links.event_fd, self._changed)
        self._spawn(self._accept_all())
        for number, state in self._peers.items():
            for kind in _KINDS:
                self._spawn(
                    self._keep_connected(state, kind) if number < self.number else self._ask_to_be_called(state, kind)
                )

    async def close(self) -> None:
        """Stop listening and connecting; established connections belong to the engine and stay."""
        asyncio.get_running_loop().remove_reader(self.links.event_fd)
        with self._news:
            self._closing = True
            self._news.notify_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for timer in self._grace.values():
            timer.cancel()
        if self._listener is not None:
            self._listener.close()
        for pool in (self._diallers, self._greeters):
            await asyncio.to_thread(pool.shutdown)

    def reasons(self) -> dict[int, str]:
        """Why a peer is not connected, as far as known."""
        return {number: state.reason for number, state in self._peers.items()}

    def refusals(self) -> dict[int, str]:
        """Why this node refuses a peer that comes and is to come, where it does."""
        return {number: state.refused for number, state in self._peers.items() if state.refused}

    def shut_out(self, number: int) -> str:
        """Why a peer may not come now, "" if it may: it was cut off for what it sent, not long ago."""
        faults, since_ms = self.links.faults(number)
        left_ms = self._shut_out_ms(faults, since_ms)
        return conduct.shut_out(left_ms, faults) if left_ms else ""

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _changed(self) -> None:
        """A connection went up or down: reconnect, and begin or end the grace time of what we hold."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.links.event_fd)
        with self._news:
            self._news.notify_all()
        self._on_change()
        stood_ms = self.links.stood_still_ms() - self._stood_still_ms
        self._stood_still_ms += stood_ms
        if stood_ms >= 1000:
            log.warning("this node did not run for %.1f s; what waits for other nodes goes on waiting", stood_ms / 1000)
        for row in self.links.peers():
            number = row["number"]
            if number in self._peers:
                self._peers[number].wake.set()
            if row["up"]:
                if timer := self._grace.pop(number, None):
                    timer.cancel()
            elif number not in self._grace:
                self._begin_grace(number, self.links.ran_ms() / 1000 + self.foreign_grace_s)

    def _begin_grace(self, number: int, until: float) -> None:
        """Until a time of the clock that stands still while this node does, which would not have heard the peer."""
        left = max(until - self.links.ran_ms() / 1000, 0.0)
        self._grace[number] = asyncio.get_running_loop().call_later(left, self._grace_over, number, until)

    def _grace_over(self, number: int, until: float) -> None:
        self._grace.pop(number, None)
        if self.links.ran_ms() / 1000 < until:
            self._begin_grace(number, until)
            return
        if self.links.up(number, GET) or self.links.up(number, BULK):
            return  # it is coming back at this very moment
        dropped = self.links.drop_foreign(number)
        if dropped:
            log.warning(
                "node %d was silent for %g s: dropped %d segments held for it", number, self.foreign_grace_s, dropped
            )

    def _name(self, connection: Connection, patience: float = HANDSHAKE_S) -> str:
        """In a thread: TLS; the node's name that the other side has proved."""
        certificate = connection.handshake(patience)
        with self._refusing(connection):
            try:
                return self.credentials.node(certificate)
            except CertificateError as error:
                raise ProtocolError(str(error)) from error

    @contextlib.contextmanager
    def _refusing(self, connection: Connection) -> Iterator[None]:
        """Whatever is wrong with what the other side said, it is told before the connection ends."""
        try:
            yield
        except ProtocolError as error:
            body = hello.encode(hello.Refusal(reason=str(error)))
            with contextlib.suppress(RamsterError):
                connection.send(frames.pack(frames.FrameType.REFUSE, body), 1.0)
            raise

    # --- which process of a peer it is ----------------------------------------------------------------------------

    def _ask(self, theirs: hello.Hello) -> _Asked:
        """In a thread: wait until no other process of that peer could still answer. ProtocolError where one does."""
        life = self.links.probe(theirs.number, False)
        if life is not None and life[0] != theirs.generation:
            life = self.links.probe(theirs.number, True)  # a link of its own process owes it no sign of life
        asked = _Asked(life, self.links.ran_ms() / 1000)
        with self._news:
            while (left := self._judge(theirs, asked)) > 0:
                if self._closing:
                    raise ProtocolError("this node stops")
                self._news.wait(left)
        return asked

    def _judge(self, theirs: hello.Hello, asked: _Asked) -> float:
        """For how much longer, in seconds in which this node runs, another process could answer; 0: it did not."""
        life, waited = self.links.probe(theirs.number, False), self.links.ran_ms() / 1000 - asked.at
        answer_s = min(self.settings.idle_timeout_ms / 1000, ANSWER_S_MAX)
        verdict = judge(theirs.generation, asked.life, life, waited, answer_s)
        if verdict is Verdict.REFUSED:
            raise ProtocolError(
                f"another process with the certificate of {theirs.name} is connected and answers: "
                "one node, one process; has its key been copied?"
            )
        return max(answer_s - waited, 0.001) if verdict is Verdict.WAITS else 0.0

    def _attach(self, connection: Connection, theirs: hello.Hello, kind: str, asked: _Asked, first: bool) -> bool:
        """In a thread: hand it to the engine, unless another process of that peer came in between.

        first: it is the one that the node with the higher number made. Where both made one at a time, it is taken by
        both of them; False: it was the other.
        """
        state = self._peers[theirs.number]
        with state.attaching:
            if not first and self._stands(state, kind):
                return False
            self._judge(theirs, asked)
            self.links.attach(connection, theirs.number, _KINDS[kind], theirs.generation, theirs.lend_segments)
            return True

    # --- connecting -----------------------------------------------------------------------------------------------

    def _stands(self, state: _PeerState, kind: str) -> bool:
        """Whether a connection is up, as far as both ends know: one that owes an answer may be broken."""
        number = state.peer.number
        return (
            self.links.up(number, _KINDS[kind])
            and not state.called[kind].is_set()
            and not (kind == "get" and self.links.silent(number))
        )

    async def _while_it_stands(self, state: _PeerState, kind: str) -> bool:
        """False at once when it does not; else True after a while, or when something may have changed."""
        if not self._stands(state, kind):
            return False
        state.wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await state.wake.wait()
        return True

    async def _keep_connected(self, state: _PeerState, kind: str) -> None:
        """Connect, and again whenever the connection is down, or may be: a silent one stays until another is there."""
        tries = 0
        while True:
            if await self._while_it_stands(state, kind):
                tries = 0
                state.trying[kind] = 0.0
                continue
            state.trying[kind] = state.trying[kind] or time.monotonic()
            try:
                await self._connect(state, kind, self.redial.patience(tries))
            except Exception as error:  # whatever it says, there is a next time
                self._cannot_connect(state, error)
                tries += 1
                await self._pause(state, kind, tries)

    async def _pause(self, state: _PeerState, kind: str, tries: int) -> None:
        """Ends early when gets begin to wait, or the peer asks to be called."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        share = self._dice.random()
        state.called[kind].clear()
        while True:
            low, high = self.redial.pause(tries, self.links.waited_for(state.peer.number))
            left = began + low + share * (high - low) - loop.time()
            if left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, self.redial.look)):
                    await state.called[kind].wait()
                    return  # the network is there: whoever asks got through

    async def _ask_to_be_called(self, state: _PeerState, kind: str) -> None:
        """By the node that does not connect: it may be the one whose gets wait, and the other may not know that the
        connection is broken, or be in the middle of a long pause.
        """
        tries = 0
        while True:
            if await self._while_it_stands(state, kind):
                tries = 0
                continue
            await asyncio.sleep(self.redial.look * self._dice.uniform(0.5, 1.0))
            if self._stands(state, kind):
                continue
            try:
                await self._connect(state, kind, self.redial.patience(tries))
                continue  # the other way round: the peer does not get through
            except Exception as error:  # as above
                if hello.WRONG_WAY in str(error):
                    state.reason = ""  # it is there, and was told
                else:
                    self._cannot_connect(state, error)
            tries += 1
            await self._pause(state, kind, tries)

    def _cannot_connect(self, state: _PeerState, error: Exception) -> None:
        reason = _words(error)
        kind = _DIGITS.sub("", reason)  # a countdown is no news
        if kind not in state.said:
            state.said.add(kind)
            log.warning("cannot connect to node %s at %s: %s", state.peer.name, state.peer.address, reason)
        state.reason = reason
        if isinstance(error, OSError):
            state.refused = ""  # it is not there any more

    def _call(self, number: int, kind: str) -> None:
        """A peer asks to be called. One that asked just before it was is not called twice."""
        state = self._peers[number]
        if asyncio.get_running_loop().time() > state.connected[kind] + self.redial.look:
            state.called[kind].set()
            state.wake.set()

    async def _connect(self, state: _PeerState, kind: str, patience: float) -> None:
        loop = asyncio.get_running_loop()
        address = state.peer.address
        if reason := self.shut_out(state.peer.number):
            raise ProtocolError(reason)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            _tune(sock)
            async with asyncio.timeout(patience):
                await loop.sock_connect(sock, (address.host, address.port))
        except BaseException:
            sock.close()
            raise
        connection = Connection(self.credentials.context(), sock.detach(), False)
        if await loop.run_in_executor(self._diallers, self._greet, connection, state, kind, patience):
            self.counters.connected += 1
            log.info("connected to node %s (%s)", state.peer.name, kind)
        state.reason = state.refused = ""
        state.said.clear()
        state.called[kind].clear()
        state.connected[kind] = loop.time()

    def _greet(self, connection: Connection, state: _PeerState, kind: str, patience: float) -> bool:
        """In a thread: our side of the handshake as the one who connects. False: there was no need any more."""
        own = self.make_hello(kind, state.peer.number)
        try:
            name = self._name(connection, patience)
            if self._stands(state, kind):
                return False
            connection.send(frames.pack(frames.FrameType.HELLO, hello.encode(own)), patience)
            kind_of_frame, body = _read_frame(connection, patience)
            if kind_of_frame == frames.FrameType.REFUSE:
                raise ProtocolError(f"it refused: {hello.decode_refusal(body)}")
            if kind_of_frame != frames.FrameType.HELLO:
                raise ProtocolError(f"it answered with a frame of type {kind_of_frame}")
            with self._refusing(connection):
                theirs = hello.decode_hello(body)
                reason = hello.objection(own, theirs, name, self._known, accepted=False)
                if reason is None and theirs.number != state.peer.number:
                    reason = f"node {theirs.number} answers at the address of node {state.peer.number}"
                if reason is not None:
                    self.counters.refused_connections += 1
                    raise ProtocolError(reason)
                asked = self._ask(theirs)
            return self._attach(connection, theirs, kind, asked, first=theirs.number < self.number)
        finally:
            connection.close()

    # --- accepting ------------------------------------------------------------------------------------------------

    async def _accept_all(self) -> None:
        assert self._listener is not None
        for n in itertools.count(1):
            if n % _ACCEPTS_A_TURN == 0:
                await asyncio.sleep(0)
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                await readable(self._listener)
                continue
            except OSError as error:
                # Out of descriptors, or the caller left again: others must still be able to come.
                log.warning("cannot accept a connection: %s", _words(error))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            sock.setblocking(False)
            try:
                caller = self._door.knock(sock, address[0])
            except Refused as error:
                sock.close()
                self._refused(address[0], error)
                continue
            # Also where the task is cancelled before it began.
            self._spawn(self._accept(caller)).add_done_callback(functools.partial(self._left, caller))

    async def _accept(self, caller: Caller) -> None:
        """Everything that a caller can do wrong ends here."""
        try:
            _tune(caller.sock)
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await self._door.turn(caller)
            except ProtocolError as error:
                if caller.dropped:
                    raise ConnectionResetError(_NO_ROOM) from error  # in the middle of its ClientHello
                self._garbage(caller.host, error)
                return
            connection = Connection(self.credentials.context(), os.dup(caller.sock.fileno()), True)
            await asyncio.get_running_loop().run_in_executor(self._greeters, self._admit, connection, caller)
            self.counters.accepted += 1
        except _Call as call:
            self._call(call.number, call.kind)
        except CertificateError as error:
            # TLS did not come about: a stranger with another cluster's certificate, or no TLS at all.
            if caller.dropped:
                self._displaced(caller.host)
            elif "certificate" in str(error):
                self._refused(caller.host, error)
            else:
                self._garbage(caller.host, error)
        except ProtocolError as error:
            self._refused(caller.host, error)
        except TimeoutError:
            self._garbage(caller.host, f"it said nothing for {HANDSHAKE_S:g} s")
        except OSError as error:
            if caller.dropped:
                self._displaced(caller.host)
            else:
                log.info("a connection from %s broke: %s", caller.host, _words(error))
        except Exception as error:
            self._refused(caller.host, _words(error))

    def _left(self, caller: Caller, _: asyncio.Task[None]) -> None:
        self._door.leave(caller)
        caller.sock.close()

    def _refused(self, host: str, why: object) -> None:
        self.counters.refused_connections += 1
        log.warning("refused %s: %s", host, why)

    def _displaced(self, host: str) -> None:
        self.counters.garbage_connections += 1
        log.warning("closed a connection from %s: %s", host, _NO_ROOM)

    def _garbage(self, host: str, why: object) -> None:
        self.counters.garbage_connections += 1
        log.info("closed a connection from %s: %s", host, why)

    def _admit(self, connection: Connection, caller: Caller) -> None:
        """In a thread: our side of the handshake as the one who was connected to."""
        try:
            name = self._name(connection)
            if not self._door.greeted.prove(caller.greeted, name):
                raise ConnectionResetError(_NO_ROOM)
            with self._refusing(connection):
                kind_of_frame, body = _read_frame(connection)
                if kind_of_frame != frames.FrameType.HELLO:
                    raise ProtocolError(f"its first frame is of type {kind_of_frame}, not a hello")
                theirs = hello.decode_hello(body)
                own = self.make_hello(theirs.kind, theirs.number)
                other_way = self._takes_the_other_way(theirs)
                reason = hello.objection(own, theirs, name, self._known, accepted=not other_way)
                reason = reason or self.shut_out(theirs.number) or None
                if reason is not None:
                    if theirs.number < self.number and not hello.objection(
                        own, theirs, name, self._known, accepted=False
                    ):
                        raise _Call(reason, theirs.number, theirs.kind)
                    self._note_refusal(name, reason)
                    raise ProtocolError(reason)
                asked = self._ask(theirs)
            connection.send(frames.pack(frames.FrameType.HELLO, hello.encode(own)), HANDSHAKE_S)
            # From here on the connection is the engine's: nobody at the door may end it any more.
            if not self._door.leave(caller):
                raise ConnectionResetError(_NO_ROOM)
            caller.sock.close()
            self._peers[theirs.number].reason = self._peers[theirs.number].refused = ""
            if not self._attach(connection, theirs, theirs.kind, asked, first=not other_way):
                return
            note = ", since this node does not get through to it" if other_way else ""
            log.info("node %s connected (%s)%s", theirs.name, theirs.kind, note)
        finally:
            connection.close()

    def _takes_the_other_way(self, theirs: hello.Hello) -> bool:
        """Whether a peer that this node connects to may keep the connection on which it asks to be called."""
        state = self._peers.get(theirs.number)
        if state is None or theirs.number > self.number or self._stands(state, theirs.kind):
            return False
        since = state.trying[theirs.kind]
        return since > 0 and self.redial.takes_the_other_way(time.monotonic() - since)

    def _note_refusal(self, name: str, reason: str) -> None:
        """For the row of the peer whose certificate was shown, whatever number and name were said with it.

        Where this node is the one to connect, its own attempts say more.
        """
        for state in self._peers.values():
            number = state.peer.number
            if state.peer.name == name and number > self.number and not self._linked(number):
                state.refused = f"refused: {reason}"

    def _linked(self, number: int) -> bool:
        return all(self.links.up(number, kind) for kind in _KINDS.values())


def _read_frame(connection: Connection, patience: float = HANDSHAKE_S) -> tuple[int, bytes]:
    kind, length = frames.unpack(connection.receive(frames.HEADER_BYTES, patience))
    return kind, connection.receive(length, patience) if length else b""


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError):
        # asyncio's own words would be "connect call failed", and not why.
        return (os.strerror(error.errno) if error.errno else str(error)).lower()
    if isinstance(error, RamsterError):
        return str(error)
    return f"{type(error).__name__}: {error}"
