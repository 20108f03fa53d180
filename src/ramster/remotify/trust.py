"""How far a lender's word is believed. Pure: what was seen and when are arguments.

A lender says how many segments it has room for, and nothing proves it. One that refuses what it said it has room for,
or neither takes nor acknowledges anything, is asked again after a pause that grows with each time; then it gets one
segment to show what it does. What it takes restores it, step by step: a fault costs two steps, a success gives back
one, so whoever does both by turns loses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

FIRST_PAUSE_MS: Final = 250
LEVEL_MAX: Final = 8  # 32 s: as long as the engine waits for an answer to a segment
DISTRUSTED: Final = 4  # two faults in a row: worth saying
# Segments ordered or on their way to one lender: 0.14 s of traffic at 1 Gbit/s. One that takes nothing must not
# attract all, one that has failed gets little, and one that failed again a single one.
BACKLOG_MAX: Final = 64
_ALLOWED: Final = (BACKLOG_MAX, 4, 1)


class Seen(Protocol):
    """What is seen of a lender: see policy.Lender."""

    @property
    def number(self) -> int: ...
    @property
    def shipping(self) -> int: ...
    @property
    def stalled_ms(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def refusal(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Change:
    """A lender that is trusted no more, or again; worth a line in the log."""

    number: int
    trusted: bool
    why: str
    pause_ms: int


@dataclass(slots=True)
class _Standing:
    level: int = 0
    until_ms: int = 0
    why: str = ""
    said: bool = False
    accepted: int = 0
    refused: int = 0


@dataclass(slots=True)
class Trust:
    """The standing of each lender. `stalled_ms`: one that gets no further for so long is at fault."""

    stalled_ms: int
    now_ms: int = 0
    _standings: dict[int, _Standing] = field(default_factory=dict)

    def look(self, now_ms: int, lenders: Iterable[Seen]) -> list[Change]:
        """Judge what happened since the last look; what has changed."""
        self.now_ms = now_ms
        changes = []
        for lender in lenders:
            standing = self._standings.setdefault(lender.number, _Standing())
            accepted, refused = lender.accepted - standing.accepted, lender.refused - standing.refused
            standing.accepted, standing.refused = lender.accepted, lender.refused
            why = ""
            if refused > accepted:
                why = f"it refused segments that it said it has room for ({lender.refusal})"
            elif lender.shipping and lender.stalled_ms >= self.stalled_ms:
                why = "it does not answer to segments"
            if why and now_ms >= standing.until_ms:  # within a pause it is still the same fault
                standing.level = min(standing.level + 2, LEVEL_MAX)
                standing.until_ms = now_ms + (FIRST_PAUSE_MS << (standing.level - 1))
                standing.why = why
            elif accepted > refused and standing.level:
                standing.level -= 1
                standing.until_ms = now_ms
            if standing.said if standing.level == 0 else standing.level >= DISTRUSTED and not standing.said:
                standing.said = standing.level > 0
                changes.append(Change(lender.number, not standing.said, standing.why, standing.until_ms - now_ms))
        return changes

    def level(self, number: int) -> int:
        """0 for one that is trusted."""
        standing = self._standings.get(number)
        return standing.level if standing is not None else 0

    def allowed(self, number: int) -> int:
        """Segments that may be ordered or on their way to it now."""
        standing = self._standings.get(number)
        if standing is None:
            return BACKLOG_MAX
        return 0 if self.now_ms < standing.until_ms else _ALLOWED[min(standing.level, len(_ALLOWED) - 1)]

    def word(self, number: int) -> str:
        """Its standing, for people."""
        standing = self._standings.get(number)
        if standing is None or standing.level == 0:
            return "trusted"
        left_ms = standing.until_ms - self.now_ms
        if left_ms > 0:
            return f"gets no segments for {left_ms / 1000:.1f} s: {standing.why}"
        allowed = self.allowed(number)
        return f"gets {allowed} segment{'s' * (allowed > 1)} at a time: {standing.why}"
