"""The policy of remotify, without any node: what leaves, to whom, and when not."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ramster.remotify.policy import (
    BACKLOG_MAX,
    SHIPS_PER_DECISION_MAX,
    Lender,
    Policy,
    Segment,
    Settings,
    Ship,
    Snapshot,
)

SETTINGS = Settings(high=0.75, low=0.60, cold_after_ms=30_000)


def segments(n: int, age_ms: int = 1000) -> list[Segment]:
    return [Segment(i, i + 7, 50_000, 20, age_ms + n - i, False) for i in range(n)]


def look(
    used: int,
    *,
    total: int = 100,
    coldest: list[Segment] | None = None,
    lenders: list[Lender] | None = None,
    under_way: int = 0,
) -> Snapshot:
    coldest = segments(min(used, 50)) if coldest is None else coldest
    lenders = [Lender(2, True, 1000, 0)] if lenders is None else lenders
    return Snapshot(total, total - used, coldest, lenders, under_way)


def test_below_the_high_mark_nothing_leaves() -> None:
    assert Policy(SETTINGS).decide(look(75)) == []


def test_above_the_high_mark_the_coldest_leave_down_to_the_low_one() -> None:
    ships = Policy(SETTINGS).decide(look(76))
    assert ships == [Ship(i, i + 7, 2) for i in range(16)]


def test_between_the_marks_it_goes_on_only_if_it_had_begun() -> None:
    policy = Policy(SETTINGS)
    assert policy.decide(look(70)) == []
    assert len(policy.decide(look(80))) == 20
    assert len(policy.decide(look(70))) == 10
    assert len(policy.decide(look(61))) == 1
    assert policy.decide(look(60)) == []
    assert policy.decide(look(70)) == []


def test_what_is_on_its_way_counts_as_gone() -> None:
    assert len(Policy(SETTINGS).decide(look(80, under_way=15))) == 5
    assert Policy(SETTINGS).decide(look(80, under_way=40)) == []


def test_cold_segments_leave_without_pressure() -> None:
    old = [Segment(1, 1, 50_000, 20, 30_000, False), Segment(2, 1, 50_000, 20, 29_999, False)]
    assert Policy(SETTINGS).decide(look(10, coldest=old)) == [Ship(1, 1, 2)]


def test_a_cold_after_of_zero_is_never() -> None:
    settings = Settings(cold_after_ms=0)
    old = [Segment(1, 1, 50_000, 20, 10**9, False)]
    assert Policy(settings).decide(look(10, coldest=old)) == []
    assert Policy(settings).decide(look(90, coldest=old)) == [Ship(1, 1, 2)]


def test_a_segment_without_live_pages_is_left_to_itself() -> None:
    assert Policy(SETTINGS).decide(look(90, coldest=[Segment(1, 1, 0, 0, 10**6, False)])) == []


def test_ephemeral_segments_leave_too() -> None:
    assert Policy(SETTINGS).decide(look(90, coldest=[Segment(1, 1, 10, 1, 5, True)])) == [Ship(1, 1, 2)]


def test_open_segments_are_sealed_by_age_only_while_somebody_would_take_them() -> None:
    lender = Lender(2, up=True, credit=3, shipping=2)
    assert Policy(SETTINGS).seal_after_ms([lender]) == 30_000
    assert Policy(SETTINGS).seal_after_ms([]) == 0
    assert Policy(SETTINGS).seal_after_ms([Lender(2, up=True, credit=3, shipping=3)]) == 0
    assert Policy(SETTINGS).seal_after_ms([Lender(2, up=False, credit=3, shipping=0)]) == 0
    assert Policy(Settings(enabled=False)).seal_after_ms([lender]) == 0
    assert Policy(Settings(cold_after_ms=0)).seal_after_ms([lender]) == 0


def test_switched_off_nothing_leaves_and_draining_is_forgotten() -> None:
    policy = Policy(Settings(enabled=False), draining=True)
    assert policy.decide(look(99)) == []
    assert not policy.draining


def test_nobody_to_lend_nothing_to_ship() -> None:
    for lenders in ([], [Lender(2, False, 10, 0)], [Lender(2, True, 0, 0)], [Lender(2, True, 4, 4)]):
        assert Policy(SETTINGS).decide(look(90, lenders=lenders)) == []


def test_a_lender_that_gets_no_further_does_not_attract_everything() -> None:
    lenders = [Lender(2, up=True, credit=1000, shipping=BACKLOG_MAX - 1), Lender(3, up=True, credit=5, shipping=0)]
    ships = Policy(SETTINGS).decide(look(90, lenders=lenders))
    assert [ship.lender for ship in ships] == [2, 3, 3, 3, 3, 3]


def test_the_lender_with_most_room_first_and_equals_share() -> None:
    ships = Policy(SETTINGS).decide(look(90, lenders=[Lender(2, True, 20, 0), Lender(3, True, 20, 0)]))
    assert Counter(ship.lender for ship in ships) == {2: 15, 3: 15}
    ships = Policy(SETTINGS).decide(look(90, lenders=[Lender(2, True, 5, 0), Lender(3, True, 100, 0)]))
    assert Counter(ship.lender for ship in ships) == {3: 30}


LENDERS = st.lists(
    st.builds(Lender, st.integers(0, 254), st.booleans(), st.integers(0, 300), st.integers(0, 20)),
    max_size=6,
    unique_by=lambda lender: lender.number,
)
SEGMENTS = st.lists(
    st.builds(
        Segment,
        st.integers(0, 10**6),
        st.integers(0, 16383),
        st.integers(0, 262144),
        st.integers(0, 60),
        st.integers(0, 60_000),
        st.booleans(),
    ),
    max_size=200,
    unique_by=lambda segment: segment.number,
).map(lambda found: sorted(found, key=lambda segment: -segment.age_ms))
SNAPSHOTS = st.integers(0, 500).flatmap(
    lambda total: st.builds(Snapshot, st.just(total), st.integers(0, total), SEGMENTS, LENDERS, st.integers(0, 300))
)


@given(st.lists(SNAPSHOTS, min_size=1, max_size=6))
def test_in_any_situation(looks: list[Snapshot]) -> None:
    policy = Policy(SETTINGS)
    for now in looks:
        was_draining = policy.draining
        ships = policy.decide(now)
        used = now.frames_total - now.frames_free
        by_number = {segment.number: segment for segment in now.coldest}
        # Never more to a lender than it has room for, never to one that is down.
        room = {lender.number: lender.credit - lender.shipping for lender in now.lenders if lender.up}
        for number, n in Counter(ship.lender for ship in ships).items():
            assert n <= room[number]
        # Each at most once, only what was shown, bounded.
        assert len({ship.segment for ship in ships}) == len(ships) <= SHIPS_PER_DECISION_MAX
        assert all(by_number[ship.segment].generation == ship.generation for ship in ships)
        assert all(by_number[ship.segment].live_pages for ship in ships)
        # Coldest first.
        ages = [by_number[ship.segment].age_ms for ship in ships]
        assert ages == sorted(ages, reverse=True)
        # Without pressure only what is cold; with it, no more young ones than needed for the low mark.
        young = [ship for ship in ships if by_number[ship.segment].age_ms < SETTINGS.cold_after_ms]
        if used <= SETTINGS.low * now.frames_total or (used <= SETTINGS.high * now.frames_total and not was_draining):
            assert not young and not policy.draining
        assert len(young) <= max(0, used - SETTINGS.low * now.frames_total - now.under_way)
