"""The decision: which sealed segments leave now, and to which lender. Pure: everything it knows is an argument.

Two reasons to ship. Pressure: the arena is fuller than `high`, so the segments untouched for longest leave until what
is on its way would bring it down to `low` (hysteresis: between the two it goes on only if it had begun). Age: a segment
untouched for `cold_after_ms` leaves without pressure, so that room is there before it is needed. Persistent and
ephemeral leave alike. Lenders are chosen by free room, less what is already on its way to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# More than this in one decision would outlive the facts it was based on: 8 MiB, 0.07 s of traffic at 1 Gbit/s. Under
# pressure the next decision comes within a tenth of a tick.
SHIPS_PER_DECISION_MAX = 32
# Ordered or on their way to one lender: 0.14 s of traffic at 1 Gbit/s. One that takes nothing must not attract all.
BACKLOG_MAX = 64


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
    """A peer: `credit` segments is what it last said it has room for, `shipping` those ordered or on their way."""

    number: int
    up: bool
    credit: int
    shipping: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a decision is based on. `coldest` is ordered, untouched for longest first; `under_way` counts segments
    ordered or on their way to any lender.
    """

    frames_total: int
    frames_free: int
    coldest: Sequence[Segment]
    lenders: Sequence[Lender]
    under_way: int


@dataclass(frozen=True, slots=True)
class Ship:
    """The instruction to ship one segment to one lender."""

    segment: int
    generation: int
    lender: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The knobs of [remotify]: fractions of the arena, and ms (0: age alone is no reason)."""

    enabled: bool = True
    high: float = 0.75
    low: float = 0.60
    cold_after_ms: int = 30_000


@dataclass(slots=True)
class Policy:
    """Decides again and again; remembers only whether it is draining."""

    settings: Settings
    draining: bool = field(default=False)

    def seal_after_ms(self, lenders: Sequence[Lender]) -> int:
        """Age at which a segment that is still open is sealed, so that it can leave: only while somebody would take
        it, since half-empty segments are dear here. 0: not at all.
        """
        anybody = any(lender.up and lender.credit > lender.shipping for lender in lenders)
        return self.settings.cold_after_ms if self.settings.enabled and anybody else 0

    def decide(self, now: Snapshot) -> list[Ship]:
        """Instructions for this moment, coldest first. Never more to a lender than it has room for."""
        if not self.settings.enabled or now.frames_total == 0:
            self.draining = False
            return []
        used = now.frames_total - now.frames_free
        self.draining = used > self.settings.high * now.frames_total or (
            self.draining and used > self.settings.low * now.frames_total
        )
        wanted = int(used - self.settings.low * now.frames_total) - now.under_way if self.draining else 0
        room = {lender.number: lender.credit - lender.shipping for lender in now.lenders if lender.up}
        backlog = {lender.number: lender.shipping for lender in now.lenders}
        ships: list[Ship] = []
        for segment in now.coldest[:SHIPS_PER_DECISION_MAX]:
            cold = 0 < self.settings.cold_after_ms <= segment.age_ms
            if segment.live_pages == 0 or (len(ships) >= wanted and not cold):
                continue
            open_to = (number for number in room if room[number] > 0 and backlog[number] < BACKLOG_MAX)
            lender = max(open_to, key=lambda number: (room[number], -number), default=None)
            if lender is None:
                break
            room[lender] -= 1
            backlog[lender] += 1
            ships.append(Ship(segment.number, segment.generation, lender))
        return ships
