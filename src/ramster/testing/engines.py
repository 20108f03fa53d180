"""Engines of several nodes in this process, linked by real TLS through fault proxies, without a shell around them.

Covers making, linking, cutting and restarting them. Does not cover what decides and connects by itself (`cluster`
starts real nodes).
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any, Final

from ramster.cluster import identity
from ramster.engine.links import BULK, GET, Connection, Links, TlsContext
from ramster.engine.store import Store
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
        counters = self.links.counters()
        return int(counters["lent_frames"]) - int(counters["lent_free"])

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
                credit = int(peer.links.counters()["lent_frames"])
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
