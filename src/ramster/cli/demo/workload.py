"""The work itself, the same for a region, a plain array and a memmap: fill, walks, sort, each page compared.

Runs in the worker process. A page that the region reports lost is counted and not touched; everything else must compare
equal to digests that another process computed from the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ramster.cli.demo import digest
from ramster.cli.demo.plan import CHECKED_PHASES, PHASES, STEP_PAGES, Work
from ramster.constants import PAGE_BYTES

Emit = Callable[[dict[str, Any]], None]
_WRONG_SHOWN = 8


class Target(Protocol):
    """The array under work and what can be asked about it."""

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes, one-dimensional."""

    def lost_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        """Runs (first page, pages) of `count` pages from `first` that are lost; no page is touched."""

    def fault_counts(self) -> dict[str, int]:
        """faults, faults_local, faults_remote so far; empty where nobody counts."""


def run(work: Work, target: Target, emit: Emit) -> None:
    """Runs all phases, emits phase-start, progress and phase events. ValueError on digest tables of wrong length.

    The plain worker has no digests of the sorted copy yet: it makes them from its own sorted array, after checking that
    the array is in order and holds the same words as the source.
    """
    expected = digest.load(Path(work.digests), work.pages)
    if not digest.checker_works(np.fromfile(work.source, dtype=np.uint8, count=PAGE_BYTES).data):
        raise ValueError("the comparison does not notice a flipped bit")
    for phase in PHASES:
        if phase == "verify-sorted":
            expected = digest.load(Path(work.sorted_digests), work.pages)
        emit({"event": "phase-start", "kind": work.kind, "phase": phase, "pages": work.planned(phase)})
        before = target.fault_counts()
        started = time.perf_counter()
        if phase == "fill":
            counts = _fill(work, target, emit)
        elif phase == "sort":
            counts = _sort(work, target)
        else:
            counts = _walk(work, phase, target, expected, emit)
        wall = time.perf_counter() - started
        after = target.fault_counts()
        emit(
            {
                "event": "phase",
                "kind": work.kind,
                "phase": phase,
                "wall_s": wall,
                "planned": work.planned(phase),
                **counts,
                **{name: after[name] - before.get(name, 0) for name in after},
            }
        )
        if phase == "sort" and work.kind == "plain":
            _make_sorted_digests(work, target.array)
        if phase == "sort" and counts["lost"]:
            return  # unsorted, so there is nothing to verify


def _fill(work: Work, target: Target, emit: Emit) -> dict[str, Any]:
    """Copies the source in, one step at a time.

    The copy is made by user code: a read() straight into the region would fault inside the kernel, which an
    unprivileged userfaultfd does not serve.
    """
    lost = 0
    with Path(work.source).open("rb", buffering=0) as source:
        for first in range(0, work.pages, STEP_PAGES):
            count = min(STEP_PAGES, work.pages - first)
            data = source.read(count * PAGE_BYTES)
            if len(data) != count * PAGE_BYTES:
                raise ValueError(f"{work.source} ended early")
            step = np.arange(first, first + count, dtype=np.int64)
            gone = _lost_mask(target, step)
            for start, end in _runs(~gone):
                target.array[(first + start) * PAGE_BYTES : (first + end) * PAGE_BYTES] = np.frombuffer(
                    data, dtype=np.uint8, count=(end - start) * PAGE_BYTES, offset=start * PAGE_BYTES
                )
            lost += int(np.count_nonzero(gone))
            _progress(emit, work, "fill", first + count, 0, 0, lost)
    return {"checked": 0, "wrong": 0, "lost": lost}


def _walk(work: Work, phase: str, target: Target, expected: digest.Digests, emit: Emit) -> dict[str, Any]:
    """Compares each page of the phase's order with its digest; asks for lost pages before each step."""
    data = target.array.data
    checked = wrong = lost = 0
    wrong_pages: list[int] = []
    gone = np.zeros(work.pages, dtype=np.bool_)
    for step in work.steps(phase):
        mask = _lost_mask(target, step)
        good = step[~mask]
        gone[step[mask]] = True
        lost += len(step) - len(good)
        found = digest.page_digests(data, good.tolist())
        bad = good[found != expected[good]]
        checked += len(found)
        wrong += len(bad)
        wrong_pages += bad[: _WRONG_SHOWN - len(wrong_pages)].tolist()
        _progress(emit, work, phase, checked + lost, checked, wrong, lost)
    # A page that is lost is met once per pass of the cyclic walk.
    distinct = int(np.count_nonzero(gone))
    return {"checked": checked, "wrong": wrong, "lost": lost, "distinct_lost": distinct, "wrong_pages": wrong_pages}


def _lost_mask(target: Target, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of `pages` are lost. One question, over the span that they cover."""
    first, last = int(pages.min()), int(pages.max())
    mask = np.zeros(last + 1 - first, dtype=np.bool_)
    for start, count in target.lost_runs(first, last + 1 - first):
        mask[max(start - first, 0) : max(start + count - first, 0)] = True
    return mask[pages - first]


def _runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs [start, end) where `mask` is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _sort(work: Work, target: Target) -> dict[str, Any]:
    """Sorts the array in place as int64; not begun when a page is lost, since a sort touches them all."""
    lost = sum(count for _, count in target.lost_runs(0, work.pages))
    if not lost:
        target.array.view(np.int64).sort()
    return {"checked": 0, "wrong": 0, "lost": lost}


def _make_sorted_digests(work: Work, array: npt.NDArray[np.uint8]) -> None:
    words = array.view(np.int64)
    source = np.memmap(work.source, dtype=np.int64, mode="r")
    ordered = all(bool(np.all(part[1:] >= part[:-1])) for part in _overlapping(words))
    if not ordered or _mix(words) != _mix(source):
        raise ValueError("the plain sort lost order or words; this machine's RAM or numpy is broken")
    digest.save(digest.all_digests(array.data), Path(work.sorted_digests))


def _overlapping(words: npt.NDArray[np.int64], size: int = 1 << 20) -> list[npt.NDArray[np.int64]]:
    """Views that share their edge words, so that order over the edges is seen too."""
    return [words[first : first + size + 1] for first in range(0, len(words), size)]


def _mix(words: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Sum and exclusive or of all words: equal for every order of the same words."""
    return int(np.add.reduce(words)), int(np.bitwise_xor.reduce(words))


def _progress(emit: Emit, work: Work, phase: str, done: int, checked: int, wrong: int, lost: int) -> None:
    emit(
        {
            "event": "progress",
            "kind": work.kind,
            "phase": phase,
            "done": done,
            "checked": checked,
            "wrong": wrong,
            "lost": lost,
        }
    )


def complete(work: Work, phase: str, event: dict[str, Any]) -> bool:
    """True if a finished phase accounts for each page that was planned: none was silently left out."""
    if phase not in CHECKED_PHASES:
        return not event["lost"]
    return bool(event["checked"] + event["lost"] == work.planned(phase) == event["planned"])
