"""Block devices for anybody who speaks NBD: named exports, the sockets they are served on, a thread per connection.

An export is a name and a dense, persistent pool of the store: what was never written takes nothing, what is discarded
is freed here and away (`nbd_exports`). A connection has a thread of its own (`nbd_connections`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ramster import limits
from ramster.admission import Limits, Table
from ramster.config.units import counted, show_apart, show_size
from ramster.constants import NAME_PATTERN, NAME_RULE, NBD_SOCKET, PAGE_BYTES
from ramster.engine.nbd import NbdServer
from ramster.engine.store import Store
from ramster.errors import RamsterError, Refused, UsageError
from ramster.frontswap.nbd_connections import (
    END_S,
    HANDSHAKES_KEPT,
    HANDSHAKES_MAX,
    HANDSHAKES_OF_ONE_MAX,
    KEEPALIVE,
    Connection,
    Counters,
    Credentials,
    Listener,
    Settings,
    as_client,
    end_all,
)
from ramster.frontswap.nbd_exports import ALLOW_MAX, EXPORTS_MAX, Configured, Registered, objection, whole_pages
from ramster.frontswap.shares import nbd_refusal
from ramster.frontswap.sockets import Acceptor, listen_tcp, listen_unix
from ramster.wire.nbd import Export, OptionReply, Refusal, Tls

__all__ = ["EXPORTS_MAX", "HANDSHAKES_MAX", "HANDSHAKES_OF_ONE_MAX", "ExportService", "objection"]

log = logging.getLogger("ramster.nbd")

# Why a page of an export reads as EIO, by the engine's word for it.
_WORDS: Final = {
    "lost": "is lost, the node that kept it is gone",
    "unreachable": "cannot be had, the node that keeps it does not answer",
    "corrupt": "is damaged, its bytes fail their check",
}


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
        self._exports: dict[str, Registered] = {}
        self._lock = threading.Lock()  # of the exports and who uses them; held for no I/O
        self._changing = asyncio.Lock()
        self._connections: set[Connection] = set()
        self._listeners: list[Listener] = []
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
        size = whole_pages("size", size_bytes, notes)
        most = size if max_bytes is None else whole_pages("max_bytes", max_bytes, notes)
        if most < size:
            raise UsageError("max_bytes, {}, is less than size_bytes, {}".format(*show_apart(most, size)))
        async with self._changing:
            if name in self._exports:
                self._get(name, change=True)
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
        log.info("export %s: made, %s", name, show_size(size), extra={"per": name})
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
    ) -> Registered:
        """In a thread."""
        pool = self.store.create_pool(pages=most // PAGE_BYTES, persistent=True)
        try:
            self.store.populate(pool, size // PAGE_BYTES)  # a write must not wait for memory
            number = server.add_export(pool, size, most, read_only)
        except BaseException:
            self.store.destroy_pool(pool)
            raise
        return Registered(name, number, pool, size, most, read_only, swap, allow)

    async def change(
        self,
        name: str,
        size_bytes: int | None = None,
        read_only: bool | None = None,
        *,
        allow: Sequence[str] | None = None,
        swap: bool | None = None,
    ) -> dict[str, Any]:
        """Lets it grow, makes it read-only or writable; what is None stays. Clients see another size when they connect
        next. Either all is changed or nothing.

        allow, swap: as of `create`, from now on. Connections of those whom the new list does not have are ended.

        UsageError where it would shrink or outgrow its max_bytes, or for a wrong allow. Refused where read_only would
        change while clients use it, who were told in their handshake.
        """
        allowed = None if allow is None else self._allow_list(allow)
        notes: list[str] = []
        out: list[Connection] = []
        size = None if size_bytes is None else whole_pages("size", size_bytes, notes)
        async with self._changing:
            export = self._get(name, change=True)
            size = export.size_bytes if size is None else size
            if size < export.size_bytes:
                has, wanted = show_apart(export.size_bytes, size)
                raise UsageError(
                    f"export {name} has {has} and cannot shrink to {wanted}; discard what is not needed, which frees it"
                )
            if size > export.max_bytes:
                most, wanted = show_apart(export.max_bytes, size)
                raise UsageError(f"export {name} may grow to {most}, not to {wanted}; the limit is set when it is made")
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
            if swap is not None and swap != export.swap:
                with self._lock:
                    export.swap = swap
                log.info("export %s: this machine %s", name, "swaps on it" if swap else "does not swap on it any more")
            if allowed is not None:
                out = self._admit(export, allowed)
        notes += await self._turn_out(export, out)
        described = await asyncio.to_thread(self._describe, export)
        if not described:
            raise Refused(f"export {name} was removed meanwhile")
        if grows and export.clients:
            notes.append("clients that are connected see the new size when they connect again")
        return {**described, "notes": notes}

    def _admit(self, export: Registered, allow: tuple[str, ...]) -> list[Connection]:
        """Its new allow list; the connections that it does not let in."""
        with self._lock:  # whoever enters after this meets the new list
            export.allow = allow
            out = [each for each in export.clients if objection(allow, each.name, local=each.local) is not None]
        log.info("export %s: for %s from now on", export.name, ", ".join(allow) or "every client of the cluster")
        return out

    async def _turn_out(self, export: Registered, out: list[Connection]) -> list[str]:
        """End connections; what is to be said of them."""
        if not out:
            return []
        whose = ", ".join(sorted({each.who for each in out}))
        log.info("export %s: closing %s, not on its allow list any more", export.name, whose)
        still = await end_all(out)
        notes = [f"closed {counted(len(out) - still, 'connection')} of clients that may not use it any more: {whose}"]
        if still:
            notes.append(f"{counted(still, 'connection')} did not end within {END_S:g} s")
        return notes

    def _turn(self, server: NbdServer, export: Registered, read_only: bool) -> None:
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
            export = self._get(name, change=True)
            with self._lock:
                clients = list(export.clients)
                if clients and not force:
                    raise Refused(f"{export.in_use()}; disconnect first, or force it: their further requests then fail")
                export.removing = True  # nobody enters any more
        try:
            still = await end_all(clients)  # others may be made and removed meanwhile
            if still:
                raise Refused(f"export {name}: {still} of its connections did not end within {END_S:g} s; try again")
            async with self._changing:
                if self._closing:
                    raise Refused("the node is stopping")
                await asyncio.to_thread(self._forget, export)
                with self._lock:
                    del self._exports[name]
        except BaseException:
            with self._lock:
                export.removing = False
            raise
        log.info("export %s: removed", name, extra={"per": name})

    def _forget(self, export: Registered) -> None:
        """In a thread."""
        assert self.server is not None
        with export.glance:
            self.server.remove_export(export.number)
            export.forgotten = True
        self.store.destroy_pool(export.pool)

    def _get(self, name: str, *, change: bool = False) -> Registered:
        export = self._exports.get(name)
        if change and export is not None and export.removing:
            raise Refused(f"export {name} is being removed: its connections end first; try again in a moment")
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

    def _describe(self, export: Registered) -> dict[str, Any]:
        """In a thread: looks at every slot that was ever used, some milliseconds per 8 GiB. Empty once it is gone."""
        assert self.server is not None
        with export.glance:
            if export.forgotten:
                return {}
            census = self.store.census(export.pool)
            statistics = self.server.statistics(export.number)
        left = export.deserted_at if export.swap else None
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
            "deserted_s": 0.0 if left is None else round(time.monotonic() - left, 1),
            "uris": self.uris(export.name, export.allow),
        }

    def uris(self, name: str, allow: Sequence[str] = ()) -> list[str]:
        """Where clients reach an export; the first is on this machine. Over TCP, one for certain clients asks for their
        certificate, which TLS alone shows.
        """
        uris = [f"nbd+unix:///{name}?socket={quote(str(self.path))}"]
        for listener in self._listeners:
            if not listener.local:
                address, port = listener.sock.getsockname()[:2]
                scheme = "nbds" if allow or listener.tls is Tls.REQUIRED else "nbd"
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

    def wire_exports(self, client: Connection) -> list[Export]:
        """Those that it may use."""
        with self._lock:
            exports = [export for export in self._exports.values() if not export.removing]
        return [each.wire() for each in exports if objection(each.allow, client.name, local=client.local) is None]

    def find(self, name: str, client: Connection) -> Export | Refusal:
        with self._lock:
            found = self._find(name, client)
            return found if isinstance(found, Refusal) else found.wire()

    def enter(self, name: str, connection: Connection) -> Export | Refusal:
        with self._lock:
            found = self._find(name, connection)
            if isinstance(found, Refusal):
                return found
            clients = [as_client(export, each) for export in self._exports.values() for each in export.clients]
            limit = self.settings.connections_max
            refused = nbd_refusal(limit, clients, as_client(found, connection), swap=found.swap)
            if refused:
                self.counters.refused += 1
                log.warning("export %s: refused %s: %s", name, connection.who, refused)
                return Refusal(OptionReply.ERR_POLICY, refused)
            connection.export = found
            found.clients.add(connection)
            found.deserted_at = None
            return found.wire()

    def _find(self, name: str, client: Connection) -> Registered | Refusal:
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

    def leave(self, connection: Connection) -> None:
        with self._lock:
            if (export := connection.export) is not None:
                export.clients.discard(connection)
                if not export.clients:
                    export.deserted_at = time.monotonic()

    def swapped_on(self) -> dict[int, tuple[str, bool]]:
        """By number of each export that this machine swaps on: (name, whether its last client has gone)."""
        with self._lock:
            exports = [each for each in self._exports.values() if each.swap and not each.removing]
            return {each.number: (each.name, each.deserted_at is not None) for each in exports}

    def ended(self, connection: Connection, kind: str, reason: str) -> None:
        """A handshake came to nothing."""
        if kind == "abort":
            return  # a client that only asked
        if kind == "broken":
            self.counters.broken += 1
        else:
            self.counters.refused += 1
        log.info("closed the connection of %s: %s", connection.who, reason)

    # --- on the event loop ----------------------------------------------------------------------------------------

    def gone(self, connection: Connection) -> None:
        """Saying so was its thread's last act."""
        connection.thread.join()
        self._connections.discard(connection)
        if not connection.ended.done():
            connection.ended.set_result(None)

    def _listen(self, sock: socket.socket, tls: Tls, where: str) -> None:
        kept = HANDSHAKES_KEPT if sock.family == socket.AF_UNIX else 0
        undecided = Table(Limits(HANDSHAKES_MAX, HANDSHAKES_OF_ONE_MAX, kept))
        acceptor = Acceptor(sock, where, lambda accepted: self._accept(listener, accepted))
        listener = Listener(sock, tls, where, undecided, acceptor)
        self._listeners.append(listener)

    def _accept(self, listener: Listener, sock: socket.socket) -> None:
        with sock:
            here = sum(each.export is None and each.listener is listener for each in self._connections)
            if here >= 2 * HANDSHAKES_MAX:  # half of them are on their way out
                self.counters.refused += 1
                log.warning("closed a connection on %s: %d others are choosing an export", listener.where, here)
                return
            try:
                if not listener.local:
                    for level, option, value in KEEPALIVE:
                        sock.setsockopt(level, option, value)
                connection = Connection(self, sock, listener)
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
            if still := await end_all(list(self._connections)):
                log.error("%d connections did not end within %g s", still, END_S)
            if self._watched is not None:
                asyncio.get_running_loop().remove_reader(self._watched)
                self._watched = None
            if self.server is not None:
                await asyncio.to_thread(self.server.stop)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
