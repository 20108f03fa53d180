"""Block devices for anybody who speaks NBD: named exports, the sockets they are served on, a thread per connection.

An export is a name and a dense, persistent pool of the store: what was never written takes nothing, what is discarded
is freed here and away. A connection is handed to the engine after the handshake; from then on Python sees neither its
requests nor its pages, only how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

from ramster import limits
from ramster.admission import Limits, Table, source_of
from ramster.config.units import format_bytes
from ramster.constants import NAME_PATTERN, NAME_RULE, NBD_SOCKET, PAGE_BYTES, POOL_PAGES_MAX
from ramster.engine.links import TlsContext
from ramster.engine.nbd import NbdConnection, NbdServer
from ramster.engine.store import Store
from ramster.errors import CertificateError, RamsterError, Refused, UsageError
from ramster.frontswap.shares import NbdClient, nbd_refusal
from ramster.frontswap.sockets import Acceptor, is_own, listen_tcp, listen_unix, peer_of
from ramster.wire.nbd import End, Export, Handshake, OptionReply, Refusal, Serve, StartTls, Tls

log = logging.getLogger("ramster.nbd")

# As many as the engine has rows for; a machine has a handful.
EXPORTS_MAX: Final = 256
# Connections of one listener that have not chosen an export yet. Beyond, one of those that wait has to go; and new ones
# are closed unheard while as many are on their way out.
HANDSHAKES_MAX: Final = 32
# Names on one export's allow list.
ALLOW_MAX: Final = 64
# Of one address, or of one process; on nbd.sock a part is kept for root and the node's user.
HANDSHAKES_OF_ONE_MAX: Final = 24
HANDSHAKES_KEPT: Final = 8
# How long a connection that was told to end may take: its requests under way have deadlines of their own.
END_S: Final = 10.0
# Why a page of an export reads as EIO, by the engine's word for it.
_WORDS: Final = {
    "lost": "is lost, the node that kept it is gone",
    "unreachable": "cannot be had, the node that keeps it does not answer",
    "corrupt": "is damaged, its bytes fail their check",
}
# Dead hosts are noticed after two minutes; a client that merely has nothing to say is never dropped.
_KEEPALIVE: Final = (
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


class Configured(Protocol):
    """What is used of the configuration's [[exports]]."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def max_size_bytes(self) -> int | None: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def allow(self) -> Sequence[str]: ...


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


@dataclass(slots=True, eq=False)
class _Export:
    """A registered export. Changed under the service's lock."""

    name: str
    number: int
    pool: int
    size_bytes: int
    max_bytes: int
    read_only: bool
    swap: bool
    allow: tuple[str, ...] = ()
    clients: set[_Connection] = field(default_factory=set)
    removing: bool = False
    glance: threading.Lock = field(default_factory=threading.Lock)
    """Held while its pool is looked at, which must not be destroyed meanwhile."""
    forgotten: bool = False

    def in_use(self) -> str:
        """By whom, for a refusal."""
        shown = ", ".join([client.who for client in self.clients][:3]) + (", ..." if len(self.clients) > 3 else "")
        return (
            f"export {self.name} is in use by {len(self.clients)} connection{'s' * (len(self.clients) > 1)} ({shown})"
        )

    def wire(self) -> Export:
        text = format_bytes(self.size_bytes) + (", read-only" if self.read_only else "")
        return Export(self.name, self.number, self.size_bytes, self.read_only, text)


def objection(allow: Sequence[str], name: str | None, *, local: bool) -> Refusal | None:
    """Why a client may not use an export; None where it may.

    allow: names of the certificates that may; empty for everybody who may connect at all. name: what the client's
    certificate has proved, None without TLS. local: it came by nbd.sock, whose mode says who may.
    """
    if local or not allow or name in allow:
        return None
    if name is None:
        text = "the export is for certain clients: connect with TLS and a certificate (nbds://)"
        return Refusal(OptionReply.ERR_TLS_REQD, text)
    return Refusal(OptionReply.ERR_POLICY, f"the export is not for {name!r}, which its allow list does not have")


@dataclass(frozen=True, slots=True)
class _Listener:
    sock: socket.socket
    tls: Tls
    where: str
    undecided: Table
    acceptor: Acceptor

    @property
    def local(self) -> bool:
        return self.sock.family == socket.AF_UNIX


class _Connection:
    """One client, in a thread of its own from the first byte to the last."""

    def __init__(self, service: ExportService, sock: socket.socket, listener: _Listener) -> None:
        self.service = service
        self.tls = listener.tls
        self.local = listener.local
        self.name: str | None = None
        """What its certificate has proved."""
        self.listener = listener
        self.who, self.source, self.user, self.own = _peer(sock, listener.where)
        self.key = 0  # among those that are undecided
        self.displaced = False
        self.export: _Export | None = None
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


class ExportService:
    """Serves `nbd.sock` in the run directory, and the TCP addresses of [nbd] listen.

    store: exports are pools of it. make_server: makes the engine's server, when the first export is made: a node
    without exports pays nothing. settings: [nbd]. credentials: None where the node has no certificate. `create`,
    `change` and `remove` come one after the other; what they do survives nothing: exports end with the node.
    """

    def __init__(
        self,
        run_dir: Path,
        store: Store,
        make_server: Callable[[], NbdServer],
        settings: Settings,
        credentials: Credentials | None,
    ) -> None:
        self.path = run_dir / NBD_SOCKET
        self.store = store
        self.make_server = make_server
        self.settings = settings
        self.credentials = credentials
        self.server: NbdServer | None = None
        self.counters = Counters()
        self.addresses: list[str] = []
        self._exports: dict[str, _Export] = {}
        self._lock = threading.Lock()  # of the exports and who uses them; held for no I/O
        self._changing = asyncio.Lock()
        self._connections: set[_Connection] = set()
        self._listeners: list[_Listener] = []
        self._closing = False
        self._watched: int | None = None

    async def start(self, exports: Iterable[Configured] = ()) -> None:
        """Make the configured exports, then listen. PortTaken, UsageError, StoreFull: call `close`."""
        for each in exports:
            await self.create(each.name, each.size_bytes, each.max_size_bytes, each.read_only, allow=each.allow)
        offered = Tls.OFF if self.credentials is None else Tls.OFFERED
        self._listen(listen_unix(self.path), offered, str(self.path))
        for address in self.settings.listen:
            required = self.settings.tls == "require" or not address.loopback
            if required and self.credentials is None:
                raise UsageError(f"{address} is served with TLS only, which needs a [cluster] section")
            sock = listen_tcp(address.host, address.port, "[nbd] listen")
            host, port = sock.getsockname()[:2]
            where = _join(host, port)
            self._listen(sock, Tls.REQUIRED if required else offered, where)
            self.addresses.append(where)
            shown = self._host(host)
            if required and shown not in self._hosts():
                log.warning(
                    "this node's certificate is for %s and not for %s: clients refuse nbds://%s; "
                    "`ramster cluster renew` makes one with --address %s",
                    ", ".join(self._hosts()), shown, _join(shown, port), shown,
                )  # fmt: skip

    # --- exports --------------------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        size_bytes: int,
        max_bytes: int | None = None,
        read_only: bool = False,
        *,
        swap: bool = False,
        allow: Sequence[str] = (),
    ) -> dict[str, Any]:
        """A new, empty export, described as by `describe` with "notes", what was not taken literally. swap: the kernel
        of this machine will swap on it. allow: names of the certificates that may use it, apart from this machine's
        nbd.sock; none for all of the cluster.

        UsageError for a wrong name or size, Refused where it exists, StoreFull where the store has no pool left.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise UsageError(f"an export's name is {NAME_RULE}; given was {name!r:.80}")
        allowed = self._allow_list(allow)
        notes: list[str] = []
        size = _whole_pages("size", size_bytes, notes)
        most = size if max_bytes is None else _whole_pages("max_bytes", max_bytes, notes)
        if most < size:
            raise UsageError(f"max_bytes, {most}, is less than size_bytes, {size}")
        async with self._changing:
            if name in self._exports:
                raise Refused(f"there is an export {name} already; remove it first, or choose another name")
            if len(self._exports) >= EXPORTS_MAX:
                raise Refused(f"this node has {EXPORTS_MAX} exports already, its limit")
            if self._closing:
                raise Refused("the node is stopping")
            if self.server is None:
                self.server = await asyncio.to_thread(self.make_server)
                self._watched = self.server.event_fd
                asyncio.get_running_loop().add_reader(self._watched, self._watch)
            export = await asyncio.to_thread(self._make, self.server, name, size, most, read_only, swap, allowed)
            with self._lock:
                self._exports[name] = export
            described = await asyncio.to_thread(self._describe, export)
        log.info("export %s: made, %s", name, format_bytes(size), extra={"per": name})
        return {**described, "notes": notes}

    def _allow_list(self, names: Sequence[str]) -> tuple[str, ...]:
        if wrong := [name for name in names if not NAME_PATTERN.fullmatch(name)]:
            raise UsageError(f"allow: {wrong[0]!r:.80} is no name of a certificate, which is {NAME_RULE}")
        if len(names) > ALLOW_MAX:
            raise UsageError(f"allow has {len(names)} names, at most {ALLOW_MAX} can be given")
        if names and self.credentials is None:
            raise UsageError("allow names certificates, which only a node with a [cluster] section can check")
        return tuple(dict.fromkeys(names))

    def _make(
        self, server: NbdServer, name: str, size: int, most: int, read_only: bool, swap: bool, allow: tuple[str, ...]
    ) -> _Export:
        """In a thread."""
        pool = self.store.create_pool(pages=most // PAGE_BYTES, persistent=True)
        try:
            self.store.populate(pool, size // PAGE_BYTES)  # a write must not wait for memory
            number = server.add_export(pool, size, most, read_only)
        except BaseException:
            self.store.destroy_pool(pool)
            raise
        return _Export(name, number, pool, size, most, read_only, swap, allow)

    async def change(self, name: str, size_bytes: int | None = None, read_only: bool | None = None) -> dict[str, Any]:
        """Lets it grow, makes it read-only or writable; what is None stays. Clients see another size when they connect
        next. Either all is changed or nothing.

        UsageError where it would shrink or outgrow its max_bytes. Refused where read_only would change while clients
        use it, who were told in their handshake.
        """
        notes: list[str] = []
        size = None if size_bytes is None else _whole_pages("size", size_bytes, notes)
        async with self._changing:
            export = self._get(name)
            size = export.size_bytes if size is None else size
            if size < export.size_bytes:
                raise UsageError(
                    f"export {name} has {export.size_bytes} bytes and cannot shrink to {size}; "
                    "discard what is not needed, which frees it"
                )
            if size > export.max_bytes:
                raise UsageError(
                    f"export {name} may grow to {export.max_bytes} bytes, not to {size}; "
                    "the limit is set when it is made"
                )
            assert self.server is not None
            grows = size > export.size_bytes
            if grows:
                await asyncio.to_thread(self.store.populate, export.pool, size // PAGE_BYTES)
            if read_only is not None and read_only != export.read_only:
                self._turn(self.server, export, read_only)
                log.info("export %s: %s from now on", name, "read-only" if read_only else "writable")
            if grows:
                await asyncio.to_thread(self.server.resize, export.number, size)
                with self._lock:
                    export.size_bytes = size
            described = await asyncio.to_thread(self._describe, export)
        if grows and export.clients:
            notes.append("clients that are connected see the new size when they connect again")
        return {**described, "notes": notes}

    def _turn(self, server: NbdServer, export: _Export, read_only: bool) -> None:
        with self._lock:  # nobody enters meanwhile
            if export.clients:
                raise Refused(
                    f"{export.in_use()} and cannot turn {'read-only' if read_only else 'writable'} under them: "
                    "a client asks when it connects; disconnect first"
                )
            server.set_read_only(export.number, read_only)
            export.read_only = read_only

    async def remove(self, name: str, force: bool = False) -> None:
        """Forgets an export and every page of it, here and away. UsageError where there is none; Refused while clients
        use it: force ends their connections first.
        """
        async with self._changing:
            export = self._get(name)
            with self._lock:
                clients = list(export.clients)
                if clients and not force:
                    raise Refused(f"{export.in_use()}; disconnect first, or force it: their further requests then fail")
                export.removing = True  # nobody enters any more
            try:
                still = await _end(clients)
                if still:
                    raise Refused(
                        f"export {name}: {still} of its connections did not end within {END_S:g} s; try again"
                    )
                await asyncio.to_thread(self._forget, export)
            except BaseException:
                with self._lock:
                    export.removing = False
                raise
            with self._lock:
                del self._exports[name]
        log.info("export %s: removed", name, extra={"per": name})

    def _forget(self, export: _Export) -> None:
        """In a thread."""
        assert self.server is not None
        with export.glance:
            self.server.remove_export(export.number)
            export.forgotten = True
        self.store.destroy_pool(export.pool)

    def _get(self, name: str) -> _Export:
        export = self._exports.get(name)
        if export is None:
            raise UsageError(f"there is no export {name!r:.80}; there are: {', '.join(self._exports) or 'none'}")
        return export

    async def describe(self) -> list[dict[str, Any]]:
        """Every export with its counters, in the order of their making: name, size_bytes, max_bytes, read_only,
        pages_stored (of these pages_here and pages_away), pages_gone (lost ones), connections, uris, and what the
        engine counts.
        """
        with self._lock:
            exports = list(self._exports.values())
        found = await asyncio.to_thread(lambda: [self._describe(export) for export in exports])
        return [each for each in found if each]

    def _describe(self, export: _Export) -> dict[str, Any]:
        """In a thread: looks at every slot that was ever used, some milliseconds per 8 GiB. Empty once it is gone."""
        assert self.server is not None
        with export.glance:
            if export.forgotten:
                return {}
            census = self.store.census(export.pool)
            statistics = self.server.statistics(export.number)
        return {
            **statistics,
            "pages_stored": census["here"] + census["away"],
            "pages_here": census["here"],
            "pages_away": census["away"],
            "pages_gone": census["lost"],
            "name": export.name,
            "size_bytes": export.size_bytes,
            "max_bytes": export.max_bytes,
            "read_only": export.read_only,
            "swap": export.swap,
            "allow": list(export.allow),
            "connections": len(export.clients),
            "uris": self.uris(export.name),
        }

    def uris(self, name: str) -> list[str]:
        """Where clients reach an export; the first is on this machine."""
        uris = [f"nbd+unix:///{name}?socket={quote(str(self.path))}"]
        for listener in self._listeners:
            if not listener.local:
                address, port = listener.sock.getsockname()[:2]
                scheme = "nbds" if listener.tls is Tls.REQUIRED else "nbd"
                uris.append(f"{scheme}://{_join(self._host(address), port)}/{name}")
        return uris

    def _hosts(self) -> tuple[str, ...]:
        return () if self.credentials is None else self.credentials.hosts()

    def _host(self, address: str) -> str:
        """What clients call the address of a socket. For every address of this machine: its host name, unless the
        certificate, which TLS is refused without, is for something else.
        """
        listening = ip_address(address)
        if not listening.is_unspecified:
            return str(listening)
        name, hosts = socket.gethostname(), self._hosts()
        if name in hosts:
            return name
        for host in hosts[1:]:  # the first is the node's name, which need not resolve
            try:
                found = ip_address(host)
            except ValueError:
                return host
            if found.version == listening.version and not found.is_loopback:
                return host
        return name

    # --- what connections ask, from their threads -----------------------------------------------------------------

    def count(self, *, swap: bool = False) -> int:
        """Exports, or those that this machine swaps on."""
        with self._lock:
            return sum(export.swap or not swap for export in self._exports.values() if not export.removing)

    def wire_exports(self, client: _Connection) -> list[Export]:
        """Those that it may use."""
        with self._lock:
            exports = [export for export in self._exports.values() if not export.removing]
        return [each.wire() for each in exports if objection(each.allow, client.name, local=client.local) is None]

    def find(self, name: str, client: _Connection) -> Export | Refusal:
        with self._lock:
            found = self._find(name, client)
            return found if isinstance(found, Refusal) else found.wire()

    def enter(self, name: str, connection: _Connection) -> Export | Refusal:
        with self._lock:
            found = self._find(name, connection)
            if isinstance(found, Refusal):
                return found
            clients = [_client(export, each) for export in self._exports.values() for each in export.clients]
            limit = self.settings.connections_max
            refused = nbd_refusal(limit, clients, _client(found, connection), swap=found.swap)
            if refused:
                self.counters.refused += 1
                log.warning("export %s: refused %s: %s", name, connection.who, refused)
                return Refusal(OptionReply.ERR_POLICY, refused)
            connection.export = found
            found.clients.add(connection)
            return found.wire()

    def _find(self, name: str, client: _Connection) -> _Export | Refusal:
        if self._closing:
            return Refusal(OptionReply.ERR_SHUTDOWN, "the node is stopping")
        export = self._exports.get(name)
        if export is None:
            text = "there is no export of that name" if name else "there is no default export: name one"
            return Refusal(OptionReply.ERR_UNKNOWN, text)
        if (refusal := objection(export.allow, client.name, local=client.local)) is not None:
            log.info("export %s: refused %s: %s", name, client.who, refusal.reason)
            return refusal
        return Refusal(OptionReply.ERR_SHUTDOWN, "the export is being removed") if export.removing else export

    def leave(self, connection: _Connection) -> None:
        with self._lock:
            if connection.export is not None:
                connection.export.clients.discard(connection)

    def ended(self, connection: _Connection, kind: str, reason: str) -> None:
        """A handshake came to nothing."""
        if kind == "abort":
            return  # a client that only asked
        if kind == "broken":
            self.counters.broken += 1
        else:
            self.counters.refused += 1
        log.info("closed the connection of %s: %s", connection.who, reason)

    # --- on the event loop ----------------------------------------------------------------------------------------

    def gone(self, connection: _Connection) -> None:
        """Saying so was its thread's last act."""
        connection.thread.join()
        self._connections.discard(connection)
        if not connection.ended.done():
            connection.ended.set_result(None)

    def _listen(self, sock: socket.socket, tls: Tls, where: str) -> None:
        kept = HANDSHAKES_KEPT if sock.family == socket.AF_UNIX else 0
        undecided = Table(Limits(HANDSHAKES_MAX, HANDSHAKES_OF_ONE_MAX, kept))
        acceptor = Acceptor(sock, where, lambda accepted: self._accept(listener, accepted))
        listener = _Listener(sock, tls, where, undecided, acceptor)
        self._listeners.append(listener)

    def _accept(self, listener: _Listener, sock: socket.socket) -> None:
        with sock:
            here = sum(each.export is None and each.listener is listener for each in self._connections)
            if here >= 2 * HANDSHAKES_MAX:  # half of them are on their way out
                self.counters.refused += 1
                log.warning("closed a connection on %s: %d others are choosing an export", listener.where, here)
                return
            try:
                if not listener.local:
                    for level, option, value in _KEEPALIVE:
                        sock.setsockopt(level, option, value)
                connection = _Connection(self, sock, listener)
                key = listener.undecided.enter(connection.source, connection.own, connection.displace)
                if isinstance(key, str):
                    self.counters.refused += 1
                    log.warning("closed the connection of %s on %s: %s", connection.who, listener.where, key)
                    connection.drop()
                    return
                connection.key = key
                connection.start()
            except (RuntimeError, RamsterError, OSError, MemoryError) as error:
                self.counters.refused += 1
                reason = limits.reached(error, f"serve a connection on {listener.where}", "the node")
                log.error("%s", reason or f"cannot serve a connection on {listener.where}: {error}")
                return
            self._connections.add(connection)

    def _watch(self) -> None:
        """The engine found pages that nobody has any more."""
        assert self.server is not None
        names = {export.number: name for name, export in self._exports.items()}
        for number, page, what in self.server.events():
            self.counters.pages_lost += what != "refused"
            name = names.get(number, f"number {number}")
            log.error(
                "export %s: page %d (byte %d) %s; reads of it fail with EIO",
                name,
                page,
                page * PAGE_BYTES,
                _WORDS[what],
                extra={"per": name},
            )

    async def close(self) -> None:
        """Stop listening, end every connection, join the threads. The exports' pages end with the store. Again: does
        nothing.
        """
        with self._lock:
            self._closing = True
        if self._listeners:
            self.path.unlink(missing_ok=True)
        for listener in self._listeners:
            listener.acceptor.close()
        self._listeners.clear()
        async with self._changing:
            if still := await _end(list(self._connections)):
                log.error("%d connections did not end within %g s", still, END_S)
            if self._watched is not None:
                asyncio.get_running_loop().remove_reader(self._watched)
                self._watched = None
            if self.server is not None:
                await asyncio.to_thread(self.server.stop)


def _client(export: _Export, connection: _Connection) -> NbdClient:
    return NbdClient(export.name, connection.user, connection.listener.local, connection.own)


async def _end(connections: Sequence[_Connection]) -> int:
    """Tell them to end and wait; how many have not, in time."""
    if not connections:
        return 0
    for connection in connections:
        connection.shutdown()
    _, still = await asyncio.wait([connection.ended for connection in connections], timeout=END_S)
    return len(still)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _whole_pages(what: str, size_bytes: int, notes: list[str]) -> int:
    """A size in whole pages, at least one; a note where it is not the one asked for. UsageError beyond the limit."""
    most = POOL_PAGES_MAX * PAGE_BYTES
    if not 0 < size_bytes <= most:
        raise UsageError(
            f"{what} of {size_bytes} bytes: allowed are 1 to {most} ({format_bytes(most)}, "
            f"{POOL_PAGES_MAX} pages of {PAGE_BYTES} bytes)"
        )
    rounded = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
    if rounded != size_bytes:
        notes.append(f"{what} {size_bytes} is rounded up to {rounded} bytes, whole pages of {PAGE_BYTES}")
    return rounded
