"""How latencies are measured: both sides in turns, threads on cores that we choose, the CPU time of nodes counted."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench.data import real_pages
from bench.rows import Row, middle_half
from numpy.typing import NDArray

Nanoseconds = NDArray[np.uint64]
Words = NDArray[np.uint64]

# Looking for files takes two seconds, and every module here measures the same pages.
same_pages = functools.cache(real_pages)

CORES = sorted(os.sched_getaffinity(0))
HERE, THERE = CORES[0], CORES[-1]  # on a machine with one core both are the same


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread runs on one core alone.

    A fault is two hand-overs between threads. Within a core one costs 2 us, across the cores of a virtual machine 15 to
    40 us, and the scheduler picks at random: figures of unplaced threads jump by a factor of five.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def threads(pid: int) -> Iterator[tuple[int, str, int]]:
    """Number, name and used CPU time in ns of each thread of a process."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            name = (task / "comm").read_text(encoding="utf-8").strip()
            yield int(task.name), name, int((task / "schedstat").read_text(encoding="ascii").split()[0])


def place(pid: int, core: int | None, name: str | None = None) -> None:
    """The threads of a process of that name, or all, run on one core alone; None: on any."""
    for thread, its_name, _ in threads(pid):
        if name is None or its_name == name:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, CORES if core is None else {core})


def cpu_ns(pid: int) -> int:
    """CPU time that the threads of a process have used, in ns."""
    return sum(used for _, _, used in threads(pid))


def same(got: tuple[Nanoseconds, Words], expected: Words, what: str) -> Nanoseconds:
    """The times, once the words that were read are the right ones: a wrong page has no speed."""
    took, words = got
    if wrong := int((words != expected).sum()):
        raise AssertionError(f"{what}: {wrong} of {len(words)} pages came back wrong")
    return took


def compare_latencies(
    path: str,
    ours: Callable[[], Nanoseconds],
    floor_name: str,
    floor: Callable[[], Nanoseconds],
    *,
    rounds: int,
    note: str | Callable[[], str] = "",
) -> list[Row]:
    """Rows of p50, p99 and p99.9, in us: quantiles within a round, medians of the rounds."""
    floor()
    ours()
    pairs = [(floor(), ours()) for _ in range(rounds)]
    rows = []
    for share in (50, 99, 99.9):
        points = [(float(np.percentile(f, share)) / 1000, float(np.percentile(o, share)) / 1000) for f, o in pairs]
        ratios = [o / f for f, o in points]
        rows.append(
            Row(
                f"{path}, p{share:g}",
                statistics.median(o for _, o in points),
                "us",
                floor_name,
                statistics.median(f for f, _ in points),
                statistics.median(ratios),
                *middle_half(ratios),
                (note if isinstance(note, str) else note()) if share == 50 else "",
            )
        )
    return rows
