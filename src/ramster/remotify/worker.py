"""The shell around the policy: looks, asks it, orders. Runs as one asyncio task of the node; touches no page.

It looks every `tick`, and at once when the store raises pressure because free segments run short.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping

from ramster.engine.links import Links
from ramster.engine.spill import Spill
from ramster.engine.store import Store
from ramster.remotify.policy import SHIPS_PER_DECISION_MAX, Lender, Policy, Segment, Snapshot, SpillRoom
from ramster.remotify.trust import Change

log = logging.getLogger(__name__)


class Worker:
    """Carries out the decisions of `policy`; `decisions` and `ordered` count them."""

    def __init__(
        self,
        store: Store,
        links: Links,
        policy: Policy,
        tick_ms: int,
        spill: Spill | None = None,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.names = names or {}
        self.store = store
        self.links = links
        self.spill = spill
        self._said = ""
        self.policy = policy
        self.tick_s = tick_ms / 1000
        self.decisions = 0
        self.ordered = 0

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        pressed = asyncio.Event()
        loop.add_reader(self.store.pressure_fd, pressed.set)
        try:
            while True:
                try:
                    async with asyncio.timeout(self.tick_s):
                        await pressed.wait()
                    # One decision per pressure event, and a pause: shipping takes longer than deciding.
                    await asyncio.sleep(self.tick_s / 10)
                except TimeoutError:
                    pass
                _drain(self.store.pressure_fd)
                pressed.clear()
                self.store.pressure_handled()
                self.step()
        finally:
            loop.remove_reader(self.store.pressure_fd)

    def step(self) -> int:
        """One look, one decision; returns the number of segments ordered."""
        lenders = [Lender(*row) for row in self.links.lenders()]
        self._say(self.policy.look(time.monotonic_ns() // 1_000_000, lenders))
        spill = self._look_at_spill()
        if stalled := self.policy.stalled(lenders, spill):
            for number in stalled:
                self.links.withdraw(number)
            lenders = [Lender(*row) for row in self.links.lenders()]
        if age_ms := self.policy.seal_after_ms(lenders):
            self.store.seal_cold(age_ms)
        free, total = self.store.frames()
        snapshot = Snapshot(
            frames_total=total,
            frames_free=free,
            coldest=[Segment(*row) for row in self.store.coldest(SHIPS_PER_DECISION_MAX)],
            lenders=lenders,
            under_way=self.links.shipping(),
            spill=spill,
        )
        self.decisions += 1
        ordered = 0
        for ship in self.policy.decide(snapshot):
            ordered += self.links.ship(ship.segment, ship.generation, ship.lender)
        self.ordered += ordered
        return ordered

    def _say(self, changes: list[Change]) -> None:
        for change in changes:
            name = self.names.get(change.number, str(change.number))
            if change.trusted:
                log.info("node %s takes segments again as it says", name)
            else:
                log.warning(
                    "node %s gets no segments for %.1f s, and longer each time that it goes on: %s",
                    name,
                    change.pause_ms / 1000,
                    change.why,
                )

    def _look_at_spill(self) -> SpillRoom | None:
        """What a decision needs of it; a kind of trouble is said once."""
        if self.spill is None:
            return None
        free, waiting, works = self.spill.room()
        trouble = "" if works else self.spill.statistics().last_error
        if not free:
            trouble = "it is full"
        if trouble and trouble != self._said:
            log.warning("spill file %s: %s; pages stay in the arena while there is room", self.spill.path, trouble)
            self._said = trouble
        return SpillRoom(free, waiting, works, self.spill.mirror)


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
