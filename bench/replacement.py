"""Which resident page leaves: traces replayed through the product's policy, beside LRU, CLOCK, FIFO and Belady's OPT.

A figure is misses per access. OPT knows the future and is the floor of any policy. LRU and CLOCK are shown each access,
as a kernel's page tables would show it; ours and FIFO learn of a page only when it is missing, which is all that
userfaultfd tells. No read-ahead takes part. Every trace comes from a fixed seed, the last ones from programs at work:

* word index: the words of Python's own library, each looked up by the standard `bisect` in the sorted list of all
  distinct ones (records of 512 bytes); the list writes down which page of it is read.
* quicksort: of such records in the order of the text, in place, by Lomuto's scheme with the middle one as pivot.
"""

from __future__ import annotations

import bisect
import heapq
import re
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from bench.data import PAGE
from bench.rows import Row
from numpy.typing import NDArray

from ramster.engine._resident import ResidentSet

Trace = NDArray[np.int64]

ENTRY = 512
NEVER = 1 << 62


def lru(trace: list[int], capacity: int) -> int:
    resident: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for page in trace:
        if page in resident:
            resident.move_to_end(page)
            continue
        misses += 1
        if len(resident) == capacity:
            resident.popitem(last=False)
        resident[page] = None
    return misses


def fifo(trace: list[int], capacity: int) -> int:
    resident: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for page in trace:
        if page not in resident:
            misses += 1
            if len(resident) == capacity:
                resident.popitem(last=False)
            resident[page] = None
    return misses


def clock(trace: list[int], capacity: int) -> int:
    resident: OrderedDict[int, bool] = OrderedDict()
    misses = 0
    for page in trace:
        if page in resident:
            resident[page] = True
            continue
        misses += 1
        while len(resident) == capacity:
            oldest, used = resident.popitem(last=False)
            if used:
                resident[oldest] = False
        resident[page] = False
    return misses


def opt(trace: list[int], capacity: int) -> int:
    """Evicts what is needed last (Belady, IBM Systems Journal 1966)."""
    following = [NEVER] * len(trace)
    seen: dict[int, int] = {}
    for at in range(len(trace) - 1, -1, -1):
        following[at] = seen.get(trace[at], NEVER)
        seen[trace[at]] = at
    resident: dict[int, int] = {}
    order: list[tuple[int, int]] = []
    misses = 0
    for page, then in zip(trace, following, strict=True):
        if page not in resident:
            misses += 1
            while len(resident) == capacity:
                when, last = heapq.heappop(order)
                if resident.get(last) == -when:
                    del resident[last]
        resident[page] = then
        heapq.heappush(order, (-then, page))
    return misses


def skewed(dice: np.random.Generator, pages: int, exponent: float, count: int) -> Trace:
    """Page k of a random order with probability proportional to 1 / k^exponent."""
    weights = np.arange(1, pages + 1) ** -exponent
    return dice.permutation(pages)[dice.choice(pages, count, p=weights / weights.sum())]


class Recorder(Sequence[str]):
    """A list of words that notes the page of each entry that is used."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)
        self.pages: list[int] = []

    def __len__(self) -> int:
        return len(self.words)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        assert isinstance(at, int)
        self.pages.append(at * ENTRY // PAGE)
        return self.words[at]

    def __setitem__(self, at: int, word: str) -> None:
        self.pages.append(at * ENTRY // PAGE)
        self.words[at] = word


def quicksort(words: Recorder, low: int, high: int) -> None:
    ranges = [(low, high)]
    while ranges:
        low, high = ranges.pop()
        if high - low < 2:
            continue
        middle = (low + high) // 2
        pivot = words[middle]
        words[middle] = words[high - 1]
        words[high - 1] = pivot
        end = low
        for at in range(low, high - 1):
            word = words[at]
            if word < pivot:
                words[at] = words[end]
                words[end] = word
                end += 1
        words[high - 1] = words[end]
        words[end] = pivot
        ranges += [(low, end), (end + 1, high)]


def text() -> Iterator[str]:
    """The words of the standard library's top modules, in order."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from re.findall(r"\w+", path.read_text(encoding="utf-8", errors="replace"))


def programs(words_max: int) -> dict[str, tuple[Trace, int]]:
    """Traces of programs, and a capacity of a third of the pages that each uses."""
    words = list(text())[:words_max]
    index = Recorder(sorted(set(words)))
    for word in words[: words_max // 4]:
        bisect.bisect_left(index, word)
    table = Recorder(words[: words_max // 8])
    quicksort(table, 0, len(table))
    traces = {"word index, bisect": np.array(index.pages), "quicksort": np.array(table.pages)}
    return {name: (trace, max(16, len(np.unique(trace)) // 3)) for name, trace in traces.items()}


def generated(c: int, count: int) -> dict[str, Trace]:
    """Traces for a capacity of `c` pages."""
    dice = np.random.default_rng(7)
    loops = {f"cyclic, {times} x": np.arange(count) % int(times * c) for times in (1.1, 1.5, 2, 4)}
    popular = skewed(dice, 4 * c, 1.0, count)
    scanned = np.concatenate(
        [piece for at in range(0, count // 2, c) for piece in (popular[at : at + c], 100 * c + np.arange(at, at + c))]
    )
    phase = count // 5
    return {
        "uniform, 2 x": dice.integers(0, 2 * c, count),
        "zipf 0.8, 8 x": skewed(dice, 8 * c, 0.8, count),
        "zipf 1.0, 8 x": skewed(dice, 8 * c, 1.0, count),
        **loops,
        "zipf 1.0, 4 x, and scans": scanned,
        "working set 0.8 x, moves 4 times": np.concatenate(
            [2 * c * at + dice.integers(0, int(0.8 * c), phase) for at in range(5)]
        ),
        "zipf 0.9, 2 x, moves 4 times": np.concatenate(
            [2 * c * at + skewed(dice, 2 * c, 0.9, phase) for at in range(5)]
        ),
        "window 0.7 x, slides": c + np.arange(count) // 8 - dice.integers(0, int(0.7 * c), count),
        "strided by 7, 2 x": np.arange(count) * 7 % (2 * c + 1),
    }


def replayed(name: str, trace: Trace, capacity: int) -> Row:
    accesses = trace.tolist()
    ours = ResidentSet(capacity).replay(trace.astype(np.int64)) / len(accesses)
    best = opt(accesses, capacity) / len(accesses)
    others: dict[str, Callable[[list[int], int], int]] = {"LRU": lru, "CLOCK": clock, "FIFO": fifo}
    beside = {other: policy(accesses, capacity) / len(accesses) for other, policy in others.items()}
    return Row(
        f"replacement, {name}",
        ours,
        "misses",
        "OPT",
        best,
        ours / best,
        note=", ".join(f"{other} {misses:.2f} ({misses / best:.2f})" for other, misses in beside.items())
        + f"; {capacity} pages",
    )


def run(quick: bool) -> list[Row]:
    capacity, passes, words = (512, 50, 40_000) if quick else (2048, 100, 200_000)
    rows = [replayed(name, trace, capacity) for name, trace in generated(capacity, passes * capacity).items()]
    return rows + [replayed(name, trace, pages) for name, (trace, pages) in programs(words).items()]
