"""One NBD client: its thread, the handshake that it carries out, and its end.

After the handshake the connection is handed to the engine; from then on Python sees neither its requests nor its pages,
only how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ramster.admission import Table, source_of
from ramster.engine.links import TlsContext
from ramster.engine.nbd import NbdConnection, NbdServer
from ramster.errors import CertificateError, RamsterError
from ramster.frontswap.nbd_exports import Registered
from ramster.frontswap.shares import NbdClient
from ramster.frontswap.sockets import Acceptor, is_own, peer_of
from ramster.wire.nbd import End, Export, Handshake, Refusal, Serve, StartTls, Tls

log = logging.getLogger("ramster.nbd")

# Connections of one listener that have not chosen an export yet. Beyond, one of those that wait has to go; and new ones
# are closed unheard while as many are on their way out.
HANDSHAKES_MAX: Final = 32
# Of one address, or of one process; on nbd.sock a part is kept for root and the node's user.
HANDSHAKES_OF_ONE_MAX: Final = 24
HANDSHAKES_KEPT: Final = 8
# How long a connection that was told to end may take: its requests under way have deadlines of their own.
END_S: Final = 10.0
# Dead hosts are noticed after two minutes; a client that merely has nothing to say is never dropped.
KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)


class Address(Protocol):
    """What is used of a configured address."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def loopback(self) -> bool: ...


class Settings(Protocol):
    """What is used of the configuration's [nbd] section."""

    @property
    def listen(self) -> Sequence[Address]: ...
    @property
    def tls(self) -> str: ...
    @property
    def tls_min(self) -> str: ...
    @property
    def connections_max(self) -> int: ...
    @property
    def handshake_timeout_ms(self) -> int: ...


class Credentials(Protocol):
    """The node's certificate and key; both may change while it runs."""

    def context(self) -> TlsContext:
        """For one more handshake."""

    def client(self, certificate: bytes) -> str:
        """The name that a certificate (DER) has proved. CertificateError where it is not of this cluster."""

    def hosts(self) -> tuple[str, ...]:
        """Names and addresses that the certificate is for, the node's own name first."""


@dataclass(slots=True)
class Counters:
    """Events since the node started."""

    connections: int = 0
    """That chose an export."""
    refused: int = 0
    """Closed unheard, or refused by a limit."""
    broken: int = 0
    """Closed because what they sent is no NBD."""
    unfinished: int = 0
    """That ended, or took too long, before they chose an export."""
    pages_lost: int = 0
    """Reads that met a page that nobody has any more."""


class Service(Protocol):
    """What a connection, in its thread, asks of the service that has it; `gone` on the event loop."""

    server: NbdServer | None
    counters: Counters

    @property
    def settings(self) -> Settings: ...
    @property
    def credentials(self) -> Credentials | None: ...
    def wire_exports(self, client: Connection) -> list[Export]: ...
    def find(self, name: str, client: Connection) -> Export | Refusal: ...
    def enter(self, name: str, connection: Connection) -> Export | Refusal: ...
    def leave(self, connection: Connection) -> None: ...
    def ended(self, connection: Connection, kind: str, reason: str) -> None: ...
    def gone(self, connection: Connection) -> None: ...


@dataclass(frozen=True, slots=True)
class Listener:
    sock: socket.socket
    tls: Tls
    where: str
    undecided: Table
    acceptor: Acceptor

    @property
    def local(self) -> bool:
        return self.sock.family == socket.AF_UNIX


class Connection:
    """One client, in a thread of its own from the first byte to the last."""

    def __init__(self, service: Service, sock: socket.socket, listener: Listener) -> None:
        self.service = service
        self.tls = listener.tls
        self.local = listener.local
        self.name: str | None = None
        """What its certificate has proved."""
        self.listener = listener
        self.who, self.source, self.user, self.own = _peer(sock, listener.where)
        self.key = 0  # among those that are undecided
        self.displaced = False
        self.export: Registered | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._connection = NbdConnection(sock.detach())
        self._open = threading.Lock()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="ramster-nbd")

    def start(self) -> None:
        try:
            self.thread.start()
        except RuntimeError:  # no more threads
            self.drop()
            raise

    def drop(self) -> None:
        """In place of `start`."""
        self.listener.undecided.leave(self.key)
        self._closed = True
        self._connection.close()

    def displace(self) -> None:
        """From any thread: another one needs its place."""
        self.displaced = True
        self.shutdown()

    def shutdown(self) -> None:
        """From any thread: it ends soon."""
        with self._open:
            if not self._closed:
                self._connection.shutdown()

    # --- the catalogue that its handshake sees --------------------------------------------------------------------

    def exports(self) -> Iterable[Export]:
        return self.service.wire_exports(self)

    def find(self, name: str) -> Export | Refusal:
        return self.service.find(name, self)

    def enter(self, name: str) -> Export | Refusal:
        found = self.service.enter(name, self)
        if isinstance(found, Export) and not self.listener.undecided.leave(self.key):
            raise ConnectionError("it had to make room")
        return found

    # --- in its thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except TimeoutError:
            self.service.counters.unfinished += 1
            log.info("%s took too long to choose an export", self.who)
        except (OSError, RamsterError, MemoryError) as error:
            if self.displaced:
                self.service.counters.refused += 1
                log.info("%s had to make room: %d others were choosing an export", self.who, HANDSHAKES_MAX)
                return
            self.service.counters.unfinished += self.export is None
            log.info("%s: %s", self.who, str(error) or type(error).__name__)
        except Exception:
            log.exception("%s: its connection failed", self.who)
        finally:
            self.listener.undecided.leave(self.key)
            with self._open:
                self._closed = True
                self._connection.close()
            self.service.leave(self)
            self._loop.call_soon_threadsafe(self.service.gone, self)

    def _serve(self) -> None:
        deadline = time.monotonic() + self.service.settings.handshake_timeout_ms / 1000
        connection = self._connection

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        handshake = Handshake(self, self.tls)
        connection.send(handshake.greeting, left())
        while True:
            step = handshake.feed(connection.receive(handshake.wants, left()))
            if step.reply:
                connection.send(step.reply, left())
            match step.decision:
                case None:
                    pass
                case StartTls():
                    assert self.service.credentials is not None
                    older = self.service.settings.tls_min == "1.2"
                    certificate = connection.start_tls(self.service.credentials.context(), left(), older)
                    try:
                        self.name = self.service.credentials.client(certificate)
                    except CertificateError as error:
                        self.service.ended(self, "refused", str(error))
                        return
                    self.who = f"{self.name} ({self.who})"
                    handshake.tls_started()
                case End(kind, reason):
                    self.service.ended(self, kind, reason)
                    return
                case Serve(export, structured, context):
                    self.service.counters.connections += 1
                    log.info("export %s: %s connected", export.name, self.who)
                    assert self.service.server is not None
                    why = connection.serve(self.service.server, export.number, structured, context, export.size_bytes)
                    log.info("export %s: %s left: %s", export.name, self.who, why)
                    return


def _peer(sock: socket.socket, where: str) -> tuple[str, str, str, bool]:
    """As far as the system knows, (who it is, for the log; its process or address; its user or address; whether it is
    one of ours).
    """
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            pid, uid = peer_of(sock)
            return f"process {pid} of user {uid}", f"process {pid} of user {uid}", f"user {uid}", is_own(uid)
        host, port = sock.getpeername()[:2]
        return f"{host} port {port}", source_of(host), source_of(host), False
    return f"a client on {where}", "nobody", "nobody", False


def as_client(export: Registered, connection: Connection) -> NbdClient:
    return NbdClient(export.name, connection.user, connection.listener.local, connection.own)


async def end_all(connections: Sequence[Connection]) -> int:
    """Tell them to end and wait; how many have not, in time."""
    if not connections:
        return 0
    for connection in connections:
        connection.shutdown()
    _, still = await asyncio.wait([connection.ended for connection in connections], timeout=END_S)
    return len(still)
