"""Which pins of one connection `Undo` takes back. Bounded: an application may pin the same pages again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ramster.frontswap.messages import SPAN_MAX

# A pin of a long range comes in parts that adjoin, which count once: an honest group has one run.
RUNS_OF_A_GROUP_MAX: Final = 16
# Of one connection, the latest; some 200 bytes each.
RUNS_MAX: Final = 1024


class PinGroups:
    """Runs of pages, (first, count) each, by the group that they were pinned under."""

    def __init__(self) -> None:
        self._groups: dict[int, list[tuple[int, int]]] = {}  # the one that grew last stands last
        self._runs = 0

    def __len__(self) -> int:
        """Runs of all groups."""
        return self._runs

    def refusal(self, group: int, first: int) -> str:
        """Why a pin from page `first` on may not go under this group; empty where it may."""
        runs = self._groups.get(group, [])
        if len(runs) < RUNS_OF_A_GROUP_MAX or sum(runs[-1]) == first:
            return ""
        return f"group: {group} has {len(runs)} separate ranges, the most that one may have; pin under another one"

    def add(self, group: int, first: int, count: int) -> None:
        """These pages were pinned. Where there are too many runs, the groups that grew longest ago are forgotten."""
        runs = self._groups.pop(group, [])
        self._groups[group] = runs
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
            return
        runs.append((first, count))
        self._runs += 1
        while self._runs > RUNS_MAX:
            self._runs -= len(self._groups.pop(next(iter(self._groups))))

    def take(self, group: int) -> Iterator[tuple[int, int]]:
        """What the group pinned, in parts that one request may name; it is forgotten."""
        runs = self._groups.pop(group, [])
        self._runs -= len(runs)
        for first, count in runs:
            for at in range(first, first + count, SPAN_MAX):
                yield at, min(SPAN_MAX, first + count - at)
