"""Looks at the node every second and writes what changed into its log. `notices` decides what that is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from ramster import logs
from ramster.config.knobs import Peer
from ramster.engine.links import Links
from ramster.engine.spill import Spill
from ramster.engine.store import Store
from ramster.frontswap.nbd import ExportService
from ramster.frontswap.region_service import RegionService
from ramster.node.notices import Look, PeerLook, RegionLook, SwapLook, notices

log = logging.getLogger("ramster.node")

EVERY_S = 1.0
FULL_AGAIN_S = 60.0  # a store that goes on refusing is not said every second
DAMAGED_AGAIN_S = 60.0  # nor pages that are read damaged again and again
ROOM_S = 5.0  # a region has room again once something took its pages for so long


class Watch:
    """One asyncio task of the node; waits for nobody and touches no page."""

    def __init__(
        self,
        store: Store,
        links: Links,
        regions: RegionService,
        exports: ExportService,
        peers: Iterable[Peer],
        keepalive_ms: int,
        spill: Spill | None = None,
    ) -> None:
        self._spill = spill
        self._store = store
        self._links = links
        self._regions = regions
        self._exports = exports
        self._names = {peer.number: peer.name for peer in peers}
        self._probe_s = keepalive_ms / 1000
        self._before = Look()
        self._refused, self._full_said = 0, -FULL_AGAIN_S
        self._damaged, self._damaged_said = 0, -DAMAGED_AGAIN_S
        self._from: dict[int, int] = {}  # of the damaged ones, by peer
        self._full_until: dict[int, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(EVERY_S)

    def look(self) -> None:
        """One look, and its lines. Also called when a link goes up or down: none is missed."""
        try:
            self._step()
        except Exception:  # a fault of ours here must not silence the node for good
            log.exception("looking at the node failed")

    def _step(self) -> None:
        now = self._look()
        for notice in notices(self._before, now, self._probe_s):
            log.log(notice.level, "%s", notice.text, extra={"per": notice.per})
        self._before = now
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logs.Handler):
                handler.settle()

    def _look(self) -> Look:
        # In this order: what a peer that has said goodbye kept is out of reach until it counts as lost.
        rows = self._links.peers()
        unreachable = self._links.unreachable()
        arena = self._store.statistics()
        spill = self._spill.statistics() if self._spill is not None else None
        rows = self._links.peers()
        damaged = arena.corrupt_pages + self._links.counters()["corrupt_replies"]
        if damaged > self._damaged and time.monotonic() - self._damaged_said >= DAMAGED_AGAIN_S:
            self._damaged, self._damaged_said = damaged, time.monotonic()
            self._from = {row["number"]: row["damaged"] for row in rows}
        if arena.puts_refused > self._refused and time.monotonic() - self._full_said >= FULL_AGAIN_S:
            self._refused, self._full_said = arena.puts_refused, time.monotonic()
        return Look(
            peers={
                row["number"]: PeerLook(
                    name=self._names.get(row["number"], str(row["number"])),
                    up=row["up"],
                    gone=row["gone"],
                    reason=row["reason"],
                    lost=row["lost"],
                    silent_s=row["silent_ms"] / 1000,
                    pages=unreachable.get(row["number"], 0),
                    damaged=self._from.get(row["number"], 0),
                )
                for row in rows
            },
            regions=self._look_at_regions(time.monotonic()),
            swaps={number: SwapLook(*each) for number, each in self._exports.swapped_on().items()},
            damaged=self._damaged,
            puts_refused=self._refused,
            pages_lost=arena.pages_lost,
            cuts=spill.cuts if spill is not None else 0,
            pages_cut=spill.pages_cut if spill is not None else 0,
        )

    def _look_at_regions(self, now: float) -> dict[int, RegionLook]:
        found = {number: RegionLook(*each) for number, each in self._regions.troubles().items()}
        # Where little room comes and goes, a region is full and not full many times in a second.
        until = {number: now + ROOM_S for number, each in found.items() if each.full}
        self._full_until = {number: end for number, end in self._full_until.items() if number in found and end > now}
        self._full_until |= until
        return {number: replace(each, full=number in self._full_until) for number, each in found.items()}
