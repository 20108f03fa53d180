"""The links' documented face: what the node's shell may do with peers, connections and the memory that it lends.

Covers the contract; the mechanism and its rules are in `_link.pyx`, the bytes in docs/wire-protocol.md. Who connects to
whom, and who is let in, is `ramster.node.peering`.
"""

from __future__ import annotations

from typing import Final, Self

from ramster.engine import _link
from ramster.engine._link import Connection, TlsContext
from ramster.engine.store import Store

__all__ = ["BULK", "GET", "Connection", "Links", "TlsContext"]

GET: Final = 0
BULK: Final = 1
RECOMPRESS: Final = {"auto": 0, "off": 1, "always": 2}


class Links(_link.Links):
    """All links of a node: remote gets, shipping, and the memory lent to others.

    Args:
        store: whose segments travel.
        number: this node's, 0 to 254.
        lend_bytes: RAM for other nodes' segments, taken, touched and (where allowed) locked at once; 0 lends nothing.
            StoreFull where the system cannot give it. Never grows: a full lender refuses.
        request_deadline_ms: a get without an answer is asked again after this time.
        give_up_ms: after this time it fails, and so does at once every get to a lender that has been away for longer.
        idle_ms, keepalive_ms: a connection that was silent for so long is closed, or asked for a sign of life.
        bulk_in_flight: segments on their way to one lender at a time.
        borrower_share: part of lend_bytes, and of the images that can be held, for one borrower; at least one.
        compact_below: live share of what a lender holds of a segment below which it is told to compact it; 0 never.
        recompress: whether pages leave as zstd: "off", "always", or "auto": while orders wait for
            a lender that takes less than 100 MB/s, and puts have room.

    attach hands a connection over that has been through the handshake; after that only native threads use it.
    ship queues a sealed segment for a lender (False: too many wait, for it or in all). Whatever fails leaves it where
    it is, whole.
    get reads a page wherever it is: bytes, None for a miss, PageLost when nobody has it or the lender does not answer.
    `event_fd` is an eventfd raised when a connection went up or down, a peer said goodbye, or something
    came from one that `probe` has asked for a sign of life.
    stop closes everything; gets under way fail, segments under way stay here.
    """

    def __new__(
        cls,
        store: Store,
        number: int,
        *,
        lend_bytes: int = 0,
        lock: bool = True,
        request_deadline_ms: int = 2000,
        give_up_ms: int = 5000,
        idle_ms: int = 5000,
        keepalive_ms: int = 1000,
        bulk_in_flight: int = 8,
        borrower_share: float = 1.0,
        compact_below: float = 0.5,
        recompress: str = "auto",
    ) -> Self:
        return super().__new__(
            cls,
            store,
            number,
            lend_bytes,
            lock,
            request_deadline_ms,
            give_up_ms,
            idle_ms,
            keepalive_ms,
            bulk_in_flight,
            borrower_share,
            compact_below,
            RECOMPRESS[recompress],
        )
