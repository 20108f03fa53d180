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
from typing import Final

from ramster.engine.links import Links
from ramster.engine.spill import Spill
from ramster.engine.store import Store
from ramster.remotify.policy import SHIPS_PER_DECISION_MAX, Lender, Policy, Segment, Snapshot, SpillRoom
from ramster.remotify.trust import Change

log = logging.getLogger(__name__)

# Counting copies goes over every segment that is away.
COUNT_S: Final = 0.25
# What comes and goes under load is not said more often than this.
SAY_S: Final = 60.0


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
        self._failed = ""
        self._read_errors = 0
        self._linked = True
        self._copies = (0, 0)
        self._count_at = 0.0
        self._missing = False
        self._say_at = 0.0
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
                self._survive_step()
        finally:
            loop.remove_reader(self.store.pressure_fd)

    def _survive_step(self) -> None:
        """A node whose pages leave no more is wedged: whatever a look meets, there is a next one. Said once."""
        try:
            self.step()
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            if failed != self._failed:
                log.exception("deciding what leaves the arena failed; it is tried again every %g s", self.tick_s)
            self._failed = failed
        else:
            self._failed = ""

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
        if self.spill is not None and self.spill.mirror:
            care = self.policy.upkeep(snapshot)
            self.spill.tend(care.room, care.copies)
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
        self.spill.look()
        free, waiting, works, total = self.spill.room()
        seen = self.spill.statistics()
        reads_failed = seen.read_errors > self._read_errors
        self._read_errors = seen.read_errors
        trouble = spill_trouble(works, reads_failed, bool(free), self.spill.mirror, seen.last_error)
        if trouble and trouble != self._said:
            log.warning("spill file %s: %s while that lasts", self.spill.path, trouble)
            self._said = trouble
        if self._linked and not self.spill.linked:
            self._linked = False
            log.warning(
                "spill file %s was removed, or another file put in its place: this node goes on with the one that it "
                "has open, whose room the disk has back when the node ends",
                self.spill.path,
            )
        if not self.spill.mirror:
            return SpillRoom(free, waiting, works)
        if (now := time.monotonic()) >= self._count_at:
            self._count_at = now + COUNT_S
            self._copies = self.store.copies()
            self._say_of_copies(now)
        return SpillRoom(free, waiting, works, True, total, *self._copies)

    def _say_of_copies(self, now: float) -> None:
        """Once when copies begin to be missing, once when they are all there again."""
        missing = self._copies[1]
        assert self.spill is not None
        if missing and not self._missing and now >= self._say_at:
            self._missing = True
            self._say_at = now + SAY_S
            log.warning(
                "spill file %s has no room for copies of what lies on lenders: %d segments are unmirrored, "
                "and lost if their lender goes before there is room again; a larger [spill] size holds all",
                self.spill.path,
                missing,
            )
        elif not missing and self._missing:
            self._missing = False
            log.info("everything that lies on lenders is mirrored again in the spill file %s", self.spill.path)


def spill_trouble(works: bool, reads_failed: bool, room: bool, mirror: bool, error: str) -> str:
    """What to say of a spill file, and what it means; "" where all is well.

    A full one outweighs the rest without a mirror; with one, copies that find no room are said elsewhere.
    works: no write has failed lately. reads_failed: since the last look. error: the disk's last one.
    """
    writes = "what goes to lenders has no copy there" if mirror else "pages stay in the arena"
    if not room and not mirror:
        return f"it is full; {writes}"
    if not works:
        return f"{error}; {writes}"
    if reads_failed:
        reads = "pages whose lender is away cannot be had" if mirror else "pages that lie there cannot be had"
        return f"reading failed ({error}); {reads}"
    return ""


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
