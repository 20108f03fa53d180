"""The decision: which sealed segments leave now, and where to. Pure: everything it knows is an argument.

Two reasons to ship. Pressure: the arena is fuller than `high`, so the segments untouched for longest leave until what
is on its way would bring it down to `low` (hysteresis: between the two it goes on only if it had begun). Age: a segment
untouched for `cold_after_ms` leaves without pressure, so that room is there before it is needed. Persistent and
ephemeral leave alike. Lenders are chosen by free room, less what is already on its way to them; how far what they say
of it is believed: trust.py. What stands still at one lender is not under way, where another place takes segments.

The spill file is the last tier. Under pressure it gets what no lender takes: none is up, none has room, or those that
have do not get any further. And while puts are about to wait it takes the coldest beside whatever is on its way to
lenders. Nothing goes to it for age alone, and nothing ephemeral: that may be dropped.

With a mirror it also has a second copy of what goes to lenders. Such a copy is worth less than a page that would find
no room: a full file keeps nothing from a lender with room (that segment is unmirrored for now), and where no lender
has any, copies are given up for what must go to the file. Once rooms are free again, `upkeep` has copies made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ramster.constants import SPILL_PEER
from ramster.remotify.trust import Change, Trust

# More than this in one decision would outlive the facts it was based on: 8 MiB, 0.07 s of traffic at 1 Gbit/s. Under
# pressure the next decision comes within a tenth of a tick.
SHIPS_PER_DECISION_MAX = 32
# A lender that gets no further for so many times `stalled_ms` is at fault; before, others are merely better.
FAULT_STALLS = 4
# Free part of the arena below which puts are about to wait: less than what the cleaner begins at.
URGENT_FREE = 0.05
# At once to the spill file then: 2 MiB, a hundredth of a second of a disk, and the next decision comes as soon.
URGENT_MAX = 8
# Copies made at one look: the lender sends what they consist of, 2 MiB, on the connection that serves gets.
COPIES_MAX = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed local segment: ages in ms, sizes in bytes."""

    number: int
    generation: int
    live_bytes: int
    live_pages: int
    age_ms: int
    ephemeral: bool


@dataclass(frozen=True, slots=True)
class Lender:
    """A peer: `credit` segments is what it last said it has room for, `shipping` those ordered or on their way, of
    which none got any further for `stalled_ms`. `accepted` and `refused` count segments since the node started;
    `refusal` is the reason of the last.
    """

    number: int
    up: bool
    credit: int
    shipping: int
    stalled_ms: int = 0
    accepted: int = 0
    refused: int = 0
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class SpillRoom:
    """The spill file: segments that still fit, orders that will take room of one, whether writing works now, whether
    what goes to a lender is kept there too; of `total` segments that would fit; `mirrored` of those on lenders have a
    copy there, `unmirrored` that should have one have none.
    """

    free: int
    waiting: int
    ready: bool = True
    mirror: bool = False
    total: int = 0
    mirrored: int = 0
    unmirrored: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a decision is based on. `coldest` is ordered, untouched for longest first; `under_way` counts segments
    ordered or on their way to any lender or to the spill file.
    """

    frames_total: int
    frames_free: int
    coldest: Sequence[Segment]
    lenders: Sequence[Lender]
    under_way: int
    spill: SpillRoom | None = None


@dataclass(frozen=True, slots=True)
class Ship:
    """The instruction to ship one segment to one lender, or to the spill file (SPILL_PEER)."""

    segment: int
    generation: int
    lender: int


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What the mirror is to do now: give up copies until `room` segments fit, make `copies` that are missing."""

    room: int = 0
    copies: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """The knobs of [remotify]: fractions of the arena, and ms (0: age alone is no reason). `stalled_ms`: a lender that
    gets no further for so long is passed over where another place takes segments.
    """

    enabled: bool = True
    high: float = 0.75
    low: float = 0.60
    cold_after_ms: int = 30_000
    stalled_ms: int = 250


@dataclass(slots=True)
class Policy:
    """Decides again and again; remembers whether it is draining, and what it thinks of each lender."""

    settings: Settings
    draining: bool = field(default=False)
    trust: Trust = field(init=False)

    def __post_init__(self) -> None:
        self.trust = Trust(FAULT_STALLS * self.settings.stalled_ms)

    def look(self, now_ms: int, lenders: Sequence[Lender]) -> list[Change]:
        """Before each decision: what the lenders did since the last. Returns whom to speak of."""
        return self.trust.look(now_ms, lenders)

    def seal_after_ms(self, lenders: Sequence[Lender]) -> int:
        """Age at which a segment that is still open is sealed, so that it can leave: only while somebody would take
        it, since half-empty segments are dear here. 0: not at all.
        """
        anybody = any(lender.up and self._room(lender) > 0 for lender in lenders)
        return self.settings.cold_after_ms if self.settings.enabled and anybody else 0

    def stalled(self, lenders: Sequence[Lender], spill: SpillRoom | None) -> list[int]:
        """Lenders whose orders are to be taken back: another place can have those segments now, or they get none."""
        passed_over = self._passed_over(lenders, spill) if self.draining else []
        return [
            lender.number
            for lender in lenders
            if lender.shipping and (lender in passed_over or not self.trust.allowed(lender.number))
        ]

    def _room(self, lender: Lender) -> int:
        """Segments that it may have beside those ordered or on their way."""
        return min(lender.credit, self.trust.allowed(lender.number)) - lender.shipping

    def _stalls(self, lender: Lender) -> bool:
        return lender.shipping > 0 and lender.stalled_ms >= self.settings.stalled_ms

    def _passed_over(self, lenders: Sequence[Lender], spill: SpillRoom | None) -> list[Lender]:
        """Those that stand still, while somebody else does not."""
        if not _can_write(spill) and not any(
            lender.up and not self._stalls(lender) and self._room(lender) > 0 for lender in lenders
        ):
            return []
        return [lender for lender in lenders if self._stalls(lender)]

    def decide(self, now: Snapshot) -> list[Ship]:
        """Instructions for this moment, coldest first. Never more to a place than it has room for."""
        if not self.settings.enabled or now.frames_total == 0:
            self.draining = False
            return []
        used = now.frames_total - now.frames_free
        self.draining = used > self.settings.high * now.frames_total or (
            self.draining and used > self.settings.low * now.frames_total
        )
        # What is under way to a lender that stands still will not be gone soon.
        passed_over = self._passed_over(now.lenders, now.spill)
        under_way = now.under_way - sum(lender.shipping for lender in passed_over)
        wanted = int(used - self.settings.low * now.frames_total) - under_way if self.draining else 0
        urgent = 0
        if self.draining and now.spill is not None and now.frames_free <= URGENT_FREE * now.frames_total:
            urgent = URGENT_MAX - now.spill.waiting
        lenders = [lender for lender in now.lenders if lender.up and lender not in passed_over]
        room = {lender.number: self._room(lender) for lender in lenders}
        disk = now.spill.free - now.spill.waiting if now.spill is not None and _can_write(now.spill) else 0
        mirror = now.spill is not None and now.spill.mirror
        # Room for a copy is no condition: without it the segment leaves unmirrored.
        ships: list[Ship] = []
        credit = {lender.number: lender.credit - lender.shipping for lender in lenders}

        def by_preference(number: int) -> tuple[bool, int, int]:
            # One that has failed first: it may have a few, to show what it does now. Then whoever has most room.
            return self.trust.level(number) > 0, credit[number], -number

        for segment in now.coldest[:SHIPS_PER_DECISION_MAX]:
            cold = 0 < self.settings.cold_after_ms <= segment.age_ms
            pressed = len(ships) < max(wanted, urgent)
            if segment.live_pages == 0 or not (pressed or cold):
                continue
            kept = mirror and not segment.ephemeral
            lender = None
            if len(ships) < wanted or cold:
                open_to = (number for number in room if room[number] > 0)
                lender = max(open_to, key=by_preference, default=None)
            if lender is not None:
                room[lender] -= 1
                credit[lender] -= 1
                disk -= kept and disk > 0
            elif pressed and disk > 0 and not segment.ephemeral:
                lender = SPILL_PEER
                disk -= 1
            else:
                continue
            ships.append(Ship(segment.number, segment.generation, lender))
        return ships

    def upkeep(self, now: Snapshot) -> Upkeep:
        """After `decide`, of the same moment."""
        spill = now.spill
        if spill is None or not spill.mirror or not spill.ready:
            return Upkeep()
        urgent = min(URGENT_MAX, spill.total // 16 + 1)
        served = any(
            lender.up and lender.credit > lender.shipping and not self._stalls(lender) for lender in now.lenders
        )
        if self.draining and not served:
            wanted = urgent + spill.waiting
            return Upkeep(room=wanted if spill.mirrored and spill.free < wanted else 0)
        # More than what a look like the above gives up, else copies would be made and given up by turns; less than the
        # fifth that compacting leaves free, else the last ones would never be made.
        spare = spill.free - spill.waiting - max(spill.total // 8, urgent)
        return Upkeep(copies=max(0, min(spill.unmirrored, spare, COPIES_MAX)))


def _can_write(spill: SpillRoom | None) -> bool:
    return spill is not None and spill.ready and spill.free > 0
