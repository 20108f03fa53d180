"""Engines of several nodes in this process, linked by real TLS through fault proxies, no shell around them.

Covers making, linking, cutting and restarting them, and regions that this process maps. Does not cover what decides
and connects by itself (`cluster` starts real nodes).
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import ramster
from ramster.cluster import identity
from ramster.config.knobs import Region as RegionSettings
from ramster.constants import PAGE_BYTES
from ramster.engine.links import BULK, GET, Connection, Links, TlsContext
from ramster.engine.region import Region
from ramster.engine.store import Store
from ramster.frontswap.region_service import RegionService
from ramster.testing.proxy import Proxy, wait_until

SEGMENT: Final = 65536
HANDSHAKE_S: Final = 10.0


def contexts(directory: Path, count: int) -> dict[int, TlsContext]:
    """Of nodes 1 to `count` of a throw-away cluster, whose files go to this folder."""
    files = identity.create_cluster(directory, "engines", [f"node{n}" for n in range(1, count + 1)])
    return {n: TlsContext(str(f.ca), str(f.cert), str(f.key)) for n, f in enumerate(files, 1)}


class Relay:
    """A listener behind a proxy; gives pairs of connected sockets, the first of which dialled."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(HANDSHAKE_S)
        self.proxy = Proxy(self._listener.getsockname())

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        dialled = socket.create_connection(self.proxy.address, HANDSHAKE_S)
        accepted, _ = self._listener.accept()
        for sock in (dialled, accepted):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return dialled, accepted

    def close(self) -> None:
        self.proxy.close()
        self._listener.close()


class Side:
    """One node's engine. `generation` is that of its process; `restart` gives it an empty store and a new one.

    segments: of its own arena; lend: for others. options: of Links; `cleaner` and `full_wait_ms` are the store's.
    """

    def __init__(self, number: int, context: TlsContext, segments: int, lend: int, **options: Any) -> None:
        self.number = number
        self.context = context
        self.generation = 1000 + number
        self._segments = segments
        self._lend = lend
        self._cleaner = bool(options.pop("cleaner", 0))
        self._full_wait_ms = options.pop("full_wait_ms", 0)
        self._options = {"idle_ms": 60_000, "keepalive_ms": 20_000} | options
        self._make()

    def _make(self) -> None:
        self.store = Store(
            self._segments * SEGMENT,
            segment_bytes=SEGMENT,
            lock=False,
            cleaner=self._cleaner,
            full_wait_ms=self._full_wait_ms,
        )
        self.links = Links(self.store, self.number, lend_bytes=self._lend * SEGMENT, lock=False, **self._options)

    def stop(self) -> None:
        self.links.stop()
        self.store.close()

    def restart(self) -> None:
        self.stop()
        self.generation += 100
        self._make()

    def lent_used(self) -> int:
        """Segments held for others."""
        return int(self.links.counters()["lent_images"])

    def up(self, other: Side) -> bool:
        return self.links.up(other.number, GET) and self.links.up(other.number, BULK)

    def order(self, lender: Side, most: int = 256) -> int:
        """Order the coldest sealed segments to be shipped to `lender`; how many were taken."""
        return sum(
            self.links.ship(segment, generation, lender.number) for segment, generation, *_ in self.store.coldest(most)
        )

    def settle(self) -> None:
        wait_until(lambda: self.links.shipping() == 0, "nothing on its way")


class Wire:
    """The two connections between two sides, `one` the one that dials, and a proxy for each kind."""

    def __init__(self, one: Side, other: Side) -> None:
        self.one = one
        self.other = other
        self._relays = (Relay(), Relay())
        self.get = self._relays[GET].proxy
        self.bulk = self._relays[BULK].proxy

    def connect(self, *kinds: int) -> None:
        for kind in kinds or (GET, BULK):
            dialled, accepted = self._relays[kind].sockets()
            client = Connection(self.one.context, dialled.detach(), False)
            server = Connection(self.other.context, accepted.detach(), True)
            greeting = threading.Thread(target=server.handshake, args=(HANDSHAKE_S,))
            greeting.start()
            client.handshake(HANDSHAKE_S)
            greeting.join()
            for side, peer, connection in ((self.one, self.other, client), (self.other, self.one, server)):
                credit = int(peer.links.counters()["lent_free"])
                side.links.attach(connection, peer.number, kind, peer.generation, credit)

    def cut(self, *kinds: int) -> None:
        """Cut connections and wait until both sides have seen it."""
        for kind in kinds or (GET, BULK):
            (self.get, self.bulk)[kind].cut()
            wait_until(lambda kind=kind: not self._up(kind), "both sides see the cut")  # type: ignore[misc]

    def _up(self, kind: int) -> bool:
        return self.one.links.up(self.other.number, kind) or self.other.links.up(self.one.number, kind)

    def release(self) -> None:
        self.get.release()
        self.bulk.release()

    def close(self) -> None:
        self.release()
        for relay in self._relays:
            relay.close()


class MappedRegion:
    """A region of a side's engine that this process maps: `region` is the application's face, `pool` the store's.

    A fault is served by native threads, so a thread may touch it with the GIL held as long as the test need not run
    meanwhile; a touch of a lost page ends the process. PermissionMissing, KernelUnsupported without userfaultfd.
    """

    def __init__(self, side: Side, pages: int, resident: int, *, full_wait_ms: int = 20_000) -> None:
        self.side = side
        self._engines: list[Region] = []
        self._full_wait_ms = full_wait_ms
        self._directory = Path(tempfile.mkdtemp(prefix="ramster-"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self._service = RegionService(self._directory, self._make, RegionSettings(full_wait_ms=full_wait_ms))
            self._run(self._service.start())
            self.region = ramster.connect(self._directory / "region.sock").region(
                pages * PAGE_BYTES, resident=resident * PAGE_BYTES, name="mapped"
            )
        except BaseException:
            self._end()
            raise
        # Requests of an application's connection are served one after the other; the engine's are not.
        self.engine: Region = self._engines[0]
        self.pool: int = self.engine.pool
        self.view: memoryview = memoryview(self.region)

    def _make(self, pages: int, resident: int, name: str) -> Region:
        self._engines.append(Region(self.side.links, pages, resident, name=name, full_wait_ms=self._full_wait_ms))
        return self._engines[0]

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def page(self, number: int, count: int = 1) -> memoryview:
        return self.view[number * PAGE_BYTES : (number + count) * PAGE_BYTES]

    def where(self, number: int) -> int | str:
        """Where the stored copy of a page is: see Store.where."""
        return self.side.store.where(self.pool, number)

    def close(self) -> None:
        self.view.release()
        self.region.close()
        self._end()

    def _end(self) -> None:
        self._run(self._service.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
