"""Who connects to whom, and who is let in: the asyncio shell around the handshake. Bytes of pages never come here.

The node with the higher number connects, twice to each peer (get, bulk); the other accepts. What arrives on the port
gets one bounded handshake: TLS with the cluster's certificates, then HELLO. Everything else is closed and counted.
Whatever a peer says ends that connection at most, never a task of this node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
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
from ramster.node.door import Caller, Door
from ramster.node.lives import ANSWER_S_MAX, Life, Verdict, judge
from ramster.wire import frames, hello

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
# Our own handshakes at a time, in threads of their own: they never queue behind those of strangers.
DIALS_MAX = 64
_ACCEPT_PAUSE_S = 0.1
_LOOK_S = 0.02
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
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    attaching: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The peer's link when it was asked for a sign of life, and at what time, in seconds."""

    life: Life | None
    at: float


class Peering:
    """Keeps both connections to every configured peer up, and lets in those peers that are to connect to us."""

    def __init__(
        self,
        links: Links,
        credentials: Credentials,
        make_hello: Callable[[str], hello.Hello],
        peers: tuple[Peer, ...],
        settings: LinkSettings,
        number: int,
        foreign_grace_ms: int,
    ) -> None:
        self.links = links
        self.credentials = credentials
        self.make_hello = make_hello
        self.settings = settings
        self.number = number
        self.foreign_grace_s = foreign_grace_ms / 1000
        self.counters = PeeringCounters()
        self.address: tuple[str, int] | None = None
        self._peers = {peer.number: _PeerState(peer) for peer in peers}
        self._known = {peer.number: peer.name for peer in peers}
        self._door = Door(peer.address.host for peer in peers)
        self._greeters = ThreadPoolExecutor(self._door.greeted.limits.total, thread_name_prefix="ramster-greet")
        self._diallers = ThreadPoolExecutor(DIALS_MAX, thread_name_prefix="ramster-dial")
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._grace: dict[int, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Listen and begin to connect. PortTaken when somebody else listens there."""
        self._listener = listen_tcp(self.settings.listen.host, self.settings.listen.port, "[links] listen")
        self.address = self._listener.getsockname()[:2]
        loop = asyncio.get_running_loop()
        loop.add_reader(self.links.event_fd, self._changed)
        self._spawn(self._accept_all())
        for number, state in self._peers.items():
            if number < self.number:
                for kind in _KINDS:
                    self._spawn(self._keep_connected(state, kind))

    async def close(self) -> None:
        """Stop listening and connecting; established connections belong to the engine and stay."""
        asyncio.get_running_loop().remove_reader(self.links.event_fd)
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

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _changed(self) -> None:
        """A connection went up or down: reconnect, and begin or end the grace time of what we hold."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.links.event_fd)
        loop = asyncio.get_running_loop()
        for row in self.links.peers():
            number = row["number"]
            if number in self._peers:
                self._peers[number].wake.set()
            if row["up"]:
                if timer := self._grace.pop(number, None):
                    timer.cancel()
            elif number not in self._grace:
                self._grace[number] = loop.call_later(self.foreign_grace_s, self._grace_over, number)

    def _grace_over(self, number: int) -> None:
        self._grace.pop(number, None)
        if self.links.up(number, GET) or self.links.up(number, BULK):
            return  # it is coming back at this very moment
        dropped = self.links.drop_foreign(number)
        if dropped:
            log.warning(
                "node %d was silent for %g s: dropped %d segments held for it", number, self.foreign_grace_s, dropped
            )

    def _name(self, connection: Connection) -> str:
        """In a thread: TLS; the node's name that the other side has proved."""
        certificate = connection.handshake(HANDSHAKE_S)
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
        asked = _Asked(self.links.probe(theirs.number, True), time.monotonic())
        while self._judge(theirs, asked) is Verdict.WAITS:
            time.sleep(_LOOK_S)
        return asked

    def _judge(self, theirs: hello.Hello, asked: _Asked) -> Verdict:
        life, waited = self.links.probe(theirs.number, False), time.monotonic() - asked.at
        answer_s = min(self.settings.idle_timeout_ms / 1000, ANSWER_S_MAX)
        verdict = judge(theirs.generation, asked.life, life, waited, answer_s)
        if verdict is Verdict.REFUSED:
            raise ProtocolError(
                f"another process with the certificate of {theirs.name} is connected and answers: "
                "one node, one process; has its key been copied?"
            )
        return verdict

    def _attach(self, connection: Connection, theirs: hello.Hello, kind: str, asked: _Asked) -> None:
        """In a thread: hand it to the engine, unless another process of that peer came in between."""
        with self._peers[theirs.number].attaching:
            self._judge(theirs, asked)
            self.links.attach(connection, theirs.number, _KINDS[kind], theirs.generation, theirs.lend_segments)

    # --- connecting -----------------------------------------------------------------------------------------------

    async def _keep_connected(self, state: _PeerState, kind: str) -> None:
        low, high = self.settings.reconnect_min_ms / 1000, self.settings.reconnect_max_ms / 1000
        pause = low
        while True:
            if self.links.up(state.peer.number, _KINDS[kind]):
                pause = low
                state.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await state.wake.wait()
                continue
            try:
                await self._connect(state, kind)
                state.reason = ""
                log.info("connected to node %s (%s)", state.peer.name, kind)
            except Exception as error:  # whatever it says, there is a next time
                reason = _words(error)
                if reason != state.reason:
                    log.warning("cannot connect to node %s at %s: %s", state.peer.name, state.peer.address, reason)
                state.reason = reason
                # Full jitter, so that nodes that lost one lender together do not come back together.
                await asyncio.sleep(random.uniform(low, pause))
                pause = min(pause * 2, high)

    async def _connect(self, state: _PeerState, kind: str) -> None:
        loop = asyncio.get_running_loop()
        address = state.peer.address
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            _tune(sock)
            async with asyncio.timeout(HANDSHAKE_S):
                await loop.sock_connect(sock, (address.host, address.port))
        except BaseException:
            sock.close()
            raise
        connection = Connection(self.credentials.context(), sock.detach(), False)
        await loop.run_in_executor(self._diallers, self._greet, connection, state, kind)
        self.counters.connected += 1

    def _greet(self, connection: Connection, state: _PeerState, kind: str) -> None:
        """In a thread: our side of the handshake as the one who connects."""
        own = self.make_hello(kind)
        try:
            name = self._name(connection)
            connection.send(frames.pack(frames.FrameType.HELLO, hello.encode(own)), HANDSHAKE_S)
            kind_of_frame, body = _read_frame(connection)
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
            self._attach(connection, theirs, kind, asked)
        finally:
            connection.close()

    # --- accepting ------------------------------------------------------------------------------------------------

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        while True:
            try:
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                # Out of descriptors, or the caller left again: others must still be able to come.
                log.warning("cannot accept a connection: %s", _words(error))
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            try:
                caller = self._door.knock(sock, address[0])
            except Refused as error:
                sock.close()
                self._refused(address[0], error)
                continue
            self._spawn(self._accept(caller))

    async def _accept(self, caller: Caller) -> None:
        """Everything that a caller can do wrong ends here."""
        try:
            _tune(caller.sock)
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await self._door.turn(caller)
            except ProtocolError as error:
                self._garbage(caller.host, error)
                return
            connection = Connection(self.credentials.context(), os.dup(caller.sock.fileno()), True)
            await asyncio.get_running_loop().run_in_executor(self._greeters, self._admit, connection, caller)
            self.counters.accepted += 1
        except CertificateError as error:
            # TLS did not come about: a stranger with another cluster's certificate, or no TLS at all.
            if caller.dropped:
                self._garbage(caller.host, "it had to make room for others")
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
                self._garbage(caller.host, "it had to make room for others")
            else:
                log.info("a connection from %s broke: %s", caller.host, _words(error))
        except Exception as error:
            self._refused(caller.host, _words(error))
        finally:
            self._door.leave(caller)
            caller.sock.close()

    def _refused(self, host: str, why: object) -> None:
        self.counters.refused_connections += 1
        log.warning("refused %s: %s", host, why)

    def _garbage(self, host: str, why: object) -> None:
        self.counters.garbage_connections += 1
        log.info("closed a connection from %s: %s", host, why)

    def _admit(self, connection: Connection, caller: Caller) -> None:
        """In a thread: our side of the handshake as the one who was connected to."""
        try:
            name = self._name(connection)
            if not self._door.greeted.prove(caller.greeted, name):
                raise ConnectionResetError("it had to make room for others")
            with self._refusing(connection):
                kind_of_frame, body = _read_frame(connection)
                if kind_of_frame != frames.FrameType.HELLO:
                    raise ProtocolError(f"its first frame is of type {kind_of_frame}, not a hello")
                theirs = hello.decode_hello(body)
                own = self.make_hello(theirs.kind)
                reason = hello.objection(own, theirs, name, self._known, accepted=True)
                if reason is not None:
                    raise ProtocolError(reason)
                asked = self._ask(theirs)
            connection.send(frames.pack(frames.FrameType.HELLO, hello.encode(own)), HANDSHAKE_S)
            # From here on the connection is the engine's: nobody at the door may end it any more.
            if not self._door.leave(caller):
                raise ConnectionResetError("it had to make room for others")
            caller.sock.close()
            self._peers[theirs.number].reason = ""
            self._attach(connection, theirs, theirs.kind, asked)
            log.info("node %s connected (%s)", theirs.name, theirs.kind)
        finally:
            connection.close()


def _read_frame(connection: Connection) -> tuple[int, bytes]:
    kind, length = frames.unpack(connection.receive(frames.HEADER_BYTES, HANDSHAKE_S))
    return kind, connection.receive(length, HANDSHAKE_S) if length else b""


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {HANDSHAKE_S:g} s"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, RamsterError):
        return str(error)
    return f"{type(error).__name__}: {error}"
