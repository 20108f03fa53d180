"""What a benchmark module returns, and how a path is measured beside its floor.

A module of this folder takes part by having `run(quick: bool) -> list[Row]`; bench/run.py finds it by itself. A figure
always comes with a floor from the same run, measured in turns with it: absolute times drift on a shared machine, the
ratio of neighbours holds.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass


class Unavailable(Exception):
    """What this machine lacks to measure a path, or to run a peer beside it."""


def installed(program: str) -> str:
    """Its path; raises Unavailable. The folders of root's programs count, whoever asks."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise Unavailable(f"{program} is not installed")
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """One path. Without `ours` it is a floor that nothing stands on in this run; without `floor` a bare figure."""

    path: str
    ours: float | None
    unit: str
    floor_name: str
    floor: float | None
    ratio: float | None = None  # median of the rounds' ratios; above 1: we are slower, whatever the unit
    lo: float | None = None  # first and third quartile of the same
    hi: float | None = None
    note: str = ""


def middle_half(values: list[float]) -> tuple[float, float]:
    """First and third quartile: a neighbour that takes the core for one round does not decide what is shown."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(
    path: str,
    unit: str,
    ours: Callable[[], float],
    floor_name: str,
    floor: Callable[[], float],
    *,
    rounds: int,
    note: str = "",
    more_is_better: bool = False,
) -> Row:
    """Run floor and path in turns, `rounds` times after one warm-up, and report medians and the spread of the ratio."""
    floor()
    ours()
    pairs = [(floor(), ours()) for _ in range(rounds)]
    ratios = [f / o if more_is_better else o / f for f, o in pairs]
    return Row(
        path,
        statistics.median(o for _, o in pairs),
        unit,
        floor_name,
        statistics.median(f for f, _ in pairs),
        statistics.median(ratios),
        *middle_half(ratios),
        note,
    )


def figure(name: str, unit: str, measure: Callable[[], float], *, rounds: int, note: str = "") -> Row:
    """A floor by itself: its median, and its spread relative to it."""
    measure()
    values = [measure() for _ in range(rounds)]
    middle = statistics.median(values)
    lo, hi = middle_half(values)
    return Row(name, None, unit, "", middle, None, lo / middle, hi / middle, note)
