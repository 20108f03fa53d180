"""Fault-around and read-ahead over pages that all are away until they are brought in."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster import errors
from ramster.engine._prefetch import ADVICE, AccessPattern

PAGES = 1 << 20


def touch(pattern: AccessPattern, order: Iterable[int], here: set[int] | None = None) -> tuple[int, int]:
    """(faults, pages brought in) when these pages are touched and nothing leaves."""
    here = set() if here is None else here
    faults = brought = 0
    for page in order:
        if page in here:
            continue
        faults += 1
        for first, end in pattern.fault(page, away=lambda at: at not in here):
            assert 0 <= first < end <= PAGES
            assert end - first <= 64
            assert here.isdisjoint(range(first, end))
            here.update(range(first, end))
            brought += end - first
        assert page in here
    return faults, brought


def test_random_faults_stay_at_one_page() -> None:
    faults, brought = touch(AccessPattern(PAGES), random.Random(1).sample(range(PAGES), 20_000))
    assert brought <= faults * 1.002


def test_random_faults_of_a_small_region_hardly_look_like_streams() -> None:
    faults, brought = touch(AccessPattern(2048), random.Random(1).sample(range(2048), 512))
    assert brought <= faults * 1.15


@pytest.mark.parametrize("order", [range(10_000, 20_000), range(20_000, 10_000, -1)], ids=["up", "down"])
def test_sequential(order: range) -> None:
    faults, brought = touch(AccessPattern(PAGES), order)
    assert faults < 100
    assert brought <= 10_000 + 3 * 64


@pytest.mark.parametrize("stride", [2, 7, 100, 4096, -3, -1000])
def test_strided_pages_come_in_and_the_gaps_do_not(stride: int) -> None:
    order = [PAGES // 2 + at * stride for at in range(100)]
    here: set[int] = set()
    faults, brought = touch(AccessPattern(PAGES), order, here)
    assert faults < 16
    assert brought < 100 + 20
    assert here >= set(order)


def test_a_column_of_rows_of_two_pages() -> None:
    order = [at * 50 + more for at in range(200) for more in (0, 1)]
    faults, brought = touch(AccessPattern(PAGES), order)
    assert faults < 60
    assert brought < 440


def test_streams_take_turns() -> None:
    """A merge of twelve runs, one of them downwards and two strided."""
    runs = [[at * 50_000 + i for i in range(1000)] for at in range(9)]
    runs += [[900_000 - i for i in range(1000)]]
    runs += [[500_000 + 9 * i for i in range(1000)], [700_000 + 50 * i for i in range(1000)]]
    dice = random.Random(2)
    order: list[int] = []
    places = [iter(run) for run in runs]
    while places:
        at = dice.randrange(len(places))
        page = next(places[at], None)
        if page is None:
            del places[at]
        else:
            order.append(page)
    faults, brought = touch(AccessPattern(PAGES), order)
    assert faults < 12_000 // 30, (faults, brought)
    assert brought < 12_000 * 1.15


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_the_window_learns_how_long_runs_are(size: int) -> None:
    """Records of equal size at random places: after a while one fault brings one in, and little beside it."""
    dice = random.Random(3)
    pattern = AccessPattern(PAGES)
    starts = dice.sample(range(0, PAGES - size, size * 2), 2000)
    touch(pattern, (at + i for at in starts[:500] for i in range(size)))
    assert pattern.counters["start_window"] == size
    faults, brought = touch(pattern, (at + i for at in starts[500:] for i in range(size)))
    assert faults < 1.7 * 1500
    assert brought < 1.35 * 1500 * size


def test_the_window_unlearns() -> None:
    dice = random.Random(4)
    pattern = AccessPattern(PAGES)
    starts = dice.sample(range(0, PAGES // 2, 32), 500)
    touch(pattern, (at + i for at in starts for i in range(16)))
    assert pattern.counters["start_window"] == 16
    touch(pattern, dice.sample(range(PAGES // 2, PAGES), 4000))
    assert pattern.counters["start_window"] == 1


@pytest.mark.parametrize(
    "order", [range(1000, 6000), range(5999, 999, -1), range(3, 6000, 7)], ids=["up", "down", "strided"]
)
def test_the_next_pass_of_a_cycle_begins_before_the_last_one_has_ended(order: range) -> None:
    pattern = AccessPattern(6000)
    touch(pattern, order)
    touch(pattern, order)
    here: set[int] = set()
    touch(pattern, order[len(order) // 2 :], here)
    assert len(here & set(order[: len(order) // 4])) >= 16, "fetched before anybody came back there"


def test_pages_evicted_before_use_shrink_the_window_and_use_grows_it() -> None:
    pattern = AccessPattern(PAGES)
    touch(pattern, range(2000))
    assert pattern.counters["window_now"] == 64
    for _ in range(1024 // 16):
        pattern.missed()
    assert pattern.counters["window_now"] == 64, "what was used speaks for the window"
    for _ in range(3):
        pattern.missed()
    assert pattern.counters["window_now"] == 8
    first, end = pattern.fault(500_000)[0]
    for _ in range(8):
        first, end = pattern.fault(end)[0]
        assert end - first <= 20
    touch(pattern, range(600_000, 650_000))
    assert pattern.counters["window_now"] == 64
    assert pattern.counters["wasted"] >= 3


def test_counters() -> None:
    pattern = AccessPattern(PAGES)
    faults, brought = touch(pattern, range(10_000))
    counters = pattern.counters
    assert counters["prefetched"] == brought - faults
    assert counters["hits"] > 9000 - faults
    assert counters["wasted"] == 0


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_window_beyond_what_the_budget_allows(limit: int) -> None:
    pattern = AccessPattern(PAGES, limit)
    assert all(end - first <= limit for page in range(0, 1000, 1) for first, end in pattern.fault(page))


def test_advice() -> None:
    pattern = AccessPattern(PAGES)
    pattern.advise("random", 0, 1000)
    assert [pattern.fault(page) for page in range(100)] == [[(page, page + 1)] for page in range(100)]
    pattern.advise("sequential", 5000, 1000)
    assert pattern.fault(5100)[:2] == [(5100, 5164), (5164, 5228)]
    assert pattern.fault(5990) == [(5990, 6000)], "an advice ends where its range does"
    pattern.advise("cyclic", 7000, 1000)
    assert pattern.fault(7900)[-1][1] <= 8000
    assert (7000, 7064) in pattern.fault(7999), "from the end to the beginning"
    pattern.advise("normal", 0, PAGES)
    assert pattern.ranges == []


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ADVICE)), st.integers(0, 99), st.integers(1, 100)), max_size=40),
)
def test_later_advice_replaces_earlier(given_advice: list[tuple[str, int, int]]) -> None:
    pattern = AccessPattern(200)
    model = ["normal"] * 200
    for kind, first, count in given_advice:
        pattern.advise(kind, first, count)
        model[first : first + count] = [kind] * count
        assert [pattern.advice(page) for page in range(200)] == model
        ranges = pattern.ranges
        assert all(a[1] < b[0] or (a[1] == b[0] and a[2] != b[2]) for a, b in itertools.pairwise(ranges))


def test_ranges_are_bounded() -> None:
    pattern = AccessPattern(PAGES)
    for at in range(64):
        pattern.advise("random", at * 10, 5)
    before = pattern.ranges
    with pytest.raises(errors.UsageError):
        pattern.advise("random", 1000, 5)
    with pytest.raises(errors.UsageError):
        pattern.advise("normal", 2, 1)
    assert pattern.ranges == before
    pattern.advise("random", 0, 100_000)
    assert pattern.ranges == [(0, 100_000, "random")]


@given(st.lists(st.integers(0, 400), max_size=200), st.integers(1, 64))
def test_any_order(order: list[int], window: int) -> None:
    pattern = AccessPattern(401, window)
    pattern.advise("cyclic", 50, 30)
    pattern.advise("sequential", 200, 100)
    dice = random.Random(5)
    here: set[int] = set()
    for page in order:
        if page not in here:
            for first, end in pattern.fault(page, away=lambda at: at not in here, remote=bool(page % 2)):
                assert 0 <= first < end <= 401
                assert here.isdisjoint(range(first, end))
                here.update(range(first, end))
        for gone in [at for at in sorted(here) if dice.random() < 0.2]:
            here.discard(gone)
