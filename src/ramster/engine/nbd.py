"""The documented face of the NBD server's transmission phase: exports over dense pools, and connections that use them.

Covers the contract. The mechanism and its rules are in `_nbd.pyx`; the handshake is `ramster.wire.nbd`; names, sockets
and who may connect are `ramster.frontswap.nbd`.
"""

from __future__ import annotations

from typing import Final, Self

from ramster.engine import _nbd
from ramster.engine._nbd import NbdConnection
from ramster.engine.links import Links

__all__ = ["LENGTH_MAX", "NbdConnection", "NbdServer"]

LENGTH_MAX: Final = 32 << 20  # bytes of one read or write, as the handshake announces it


class NbdServer(_nbd.NbdServer):
    """Serves requests of NBD connections from pages, wherever they are.

    Args:
        links: of the node; its store holds the pools.
        slow_threads: for what waits: parts of pages that are away, pages that moved meanwhile, long ranges.
        requests_max: reads that wait for other nodes at one moment, all connections together; more of them wait.

    add_export: serve a dense persistent pool of at least max_bytes / 4096 pages; returns the export's number. Sizes are
        whole pages. Refused beyond 256 exports.
    resize: grow, up to max_bytes. Clients see it when they connect anew; until then requests beyond the size that their
        handshake told them (told_bytes of `serve`) are refused.
    remove_export: Refused while connections use it. The pool is the caller's to destroy.
    statistics: counters of one export since it was added. pages_lost: reads that met a page that nobody has any more.
    events: (export, page, why) since the last call, 256 at most; `event_fd` is readable when there are any. Why is
        "lost", "corrupt" or "unreachable". A write that is refused for want of room leaves its page as it was.
    stop: ends every connection, then the threads.

    An `NbdConnection` owns a connected stream socket. receive, send and start_tls carry the handshake, with deadlines
    (TimeoutError; ConnectionError once the client is gone); tls_1_2 lets clients in that know nothing newer; serve then
    answers requests without the GIL until the client goes, and returns why it ended; `serving` is true meanwhile.
    shutdown may be called from any thread and makes all of them end.
    """

    def __new__(cls, links: Links, *, slow_threads: int = 2, requests_max: int = 512) -> Self:
        return super().__new__(cls, links, slow_threads, requests_max)
