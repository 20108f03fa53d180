"""The policy of remotify, without any node: what leaves, to whom, and when not."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.constants import SPILL_PEER
from ramster.remotify.policy import (
    COPIES_MAX,
    SHIPS_PER_DECISION_MAX,
    URGENT_MAX,
    Lender,
    Policy,
    Segment,
    Settings,
    Ship,
    Snapshot,
    SpillRoom,
    Upkeep,
)
from ramster.remotify.trust import BACKLOG_MAX

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
    spill: SpillRoom | None = None,
) -> Snapshot:
    coldest = segments(min(used, 50)) if coldest is None else coldest
    lenders = [Lender(2, True, 1000, 0)] if lenders is None else lenders
    return Snapshot(total, total - used, coldest, lenders, under_way, spill)


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


SPILL = SpillRoom(1000, 0)


def places(ships: list[Ship]) -> Counter[int]:
    return Counter(ship.lender for ship in ships)


def test_what_no_lender_takes_goes_to_the_spill_file() -> None:
    for lenders in ([], [Lender(2, False, 10, 0)], [Lender(2, True, 0, 0)], [Lender(2, True, 4, 4)]):
        assert places(Policy(SETTINGS).decide(look(80, lenders=lenders, spill=SPILL))) == {SPILL_PEER: 20}


def test_lenders_first() -> None:
    assert places(Policy(SETTINGS).decide(look(80, spill=SPILL))) == {2: 20}
    assert places(Policy(SETTINGS).decide(look(80, lenders=[Lender(2, True, 5, 0)], spill=SPILL))) == {
        2: 5,
        SPILL_PEER: 15,
    }


def test_the_spill_file_takes_what_it_has_room_for_and_only_while_it_can_be_written() -> None:
    for spill, expected in ((SpillRoom(5, 2), 3), (SpillRoom(5, 5), 0), (SpillRoom(50, 0, ready=False), 0)):
        assert len(Policy(SETTINGS).decide(look(80, lenders=[], spill=spill))) == expected


def test_nothing_is_spilled_for_age_alone_and_nothing_ephemeral() -> None:
    assert Policy(SETTINGS).decide(look(10, coldest=segments(5, 10**6), lenders=[], spill=SPILL)) == []
    ephemeral = [Segment(1, 1, 10, 1, 5, True), Segment(2, 1, 10, 1, 5, False)]
    assert Policy(SETTINGS).decide(look(90, coldest=ephemeral, lenders=[], spill=SPILL)) == [Ship(2, 1, SPILL_PEER)]


def test_a_lender_that_stands_still_is_passed_over_where_there_is_a_spill_file() -> None:
    still = [Lender(2, True, 1000, 40, stalled_ms=SETTINGS.stalled_ms)]
    policy = Policy(SETTINGS)
    assert policy.stalled(still, SPILL) == [], "without pressure it may take its time"
    assert places(policy.decide(look(80, lenders=still, under_way=40, spill=SPILL))) == {SPILL_PEER: 20}
    assert policy.stalled(still, SPILL) == [2]
    assert policy.stalled(still, None) == [] and policy.stalled(still, SpillRoom(0, 0)) == []
    assert policy.stalled([Lender(2, True, 1000, 40, SETTINGS.stalled_ms - 1)], SPILL) == []
    # Without one, or with one that takes nothing, there is nothing better than to wait for it.
    for spill in (None, SpillRoom(0, 0), SpillRoom(9, 0, ready=False)):
        assert places(Policy(SETTINGS).decide(look(80, lenders=still, spill=spill))) == {2: 20}


def test_while_puts_are_about_to_wait_the_spill_file_helps_lenders_that_are_slow() -> None:
    slow = [Lender(2, True, 1000, 40, stalled_ms=5)]
    assert Policy(SETTINGS).decide(look(90, lenders=slow, under_way=40, spill=SPILL)) == []
    assert places(Policy(SETTINGS).decide(look(96, lenders=slow, under_way=40, spill=SPILL))) == {
        SPILL_PEER: URGENT_MAX
    }
    waiting = SpillRoom(1000, URGENT_MAX)
    assert Policy(SETTINGS).decide(look(96, lenders=slow, under_way=40, spill=waiting)) == []


def test_a_full_mirror_keeps_nothing_from_a_lender_with_room() -> None:
    for spill in (SpillRoom(3, 0, mirror=True), SpillRoom(0, 0, mirror=True), SpillRoom(9, 0, False, mirror=True)):
        assert places(Policy(SETTINGS).decide(look(80, spill=spill))) == {2: 20}


def test_room_that_copies_will_take_is_not_spilled_to_as_well() -> None:
    some = [Lender(2, True, 5, 0)]
    assert places(Policy(SETTINGS).decide(look(80, lenders=some, spill=SpillRoom(8, 0, mirror=True)))) == {
        2: 5,
        SPILL_PEER: 3,
    }


FULL, ROOM, DOWN, STILL = (
    [Lender(2, True, 0, 0)],
    [Lender(2, True, 50, 0)],
    [Lender(2, False, 50, 0)],
    [Lender(2, True, 50, 5, 900)],
)


@pytest.mark.parametrize(
    ("what", "used", "lenders", "spill", "expected"),
    [
        ("no spill file", 80, FULL, None, Upkeep()),
        ("no mirror", 80, FULL, SpillRoom(0, 0, total=64), Upkeep()),
        ("the disk fails", 80, FULL, SpillRoom(0, 0, False, True, 64, 60, 4), Upkeep()),
        ("pages need the room, no lender has any", 80, FULL, SpillRoom(0, 0, True, True, 64, 60, 4), Upkeep(room=5)),
        ("the lender is down", 80, DOWN, SpillRoom(2, 1, True, True, 64, 60, 4), Upkeep(room=6)),
        ("the lender stands still", 80, STILL, SpillRoom(2, 1, True, True, 640, 60, 4), Upkeep(room=9)),
        ("nothing there but pages", 80, FULL, SpillRoom(0, 0, True, True, 64, 0, 0), Upkeep()),
        ("there is room for pages", 80, FULL, SpillRoom(8, 0, True, True, 64, 50, 4), Upkeep()),
        ("the lender has room for pages", 80, ROOM, SpillRoom(0, 0, True, True, 64, 60, 4), Upkeep()),
        ("no pressure, no room", 50, FULL, SpillRoom(0, 0, True, True, 64, 60, 4), Upkeep()),
        ("room is back", 50, ROOM, SpillRoom(30, 0, True, True, 64, 30, 4), Upkeep(copies=4)),
        ("room is back, under pressure too", 80, ROOM, SpillRoom(30, 0, True, True, 64, 30, 4), Upkeep(copies=4)),
        ("some room is back", 50, ROOM, SpillRoom(10, 1, True, True, 64, 30, 4), Upkeep(copies=1)),
        ("what would be given up next is not made", 50, ROOM, SpillRoom(8, 0, True, True, 64, 30, 4), Upkeep()),
        ("not all at once", 50, ROOM, SpillRoom(900, 0, True, True, 1000, 9, 90), Upkeep(copies=COPIES_MAX)),
        ("all mirrored", 50, ROOM, SpillRoom(900, 0, True, True, 1000, 99, 0), Upkeep()),
        ("a small file", 50, ROOM, SpillRoom(3, 0, True, True, 4, 0, 2), Upkeep(copies=2)),
    ],
)
def test_copies_are_given_up_for_pages_and_made_when_there_is_room(
    what: str, used: int, lenders: list[Lender], spill: SpillRoom | None, expected: Upkeep
) -> None:
    policy = Policy(SETTINGS)
    now = look(used, lenders=lenders, spill=spill)
    policy.decide(now)
    assert policy.upkeep(now) == expected, what


LENDERS = st.lists(
    st.builds(Lender, st.integers(0, 254), st.booleans(), st.integers(0, 300), st.integers(0, 20), st.integers(0, 500)),
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
SPILLS = st.none() | st.builds(
    SpillRoom,
    st.integers(0, 60),
    st.integers(0, 20),
    ready=st.booleans(),
    mirror=st.booleans(),
    total=st.integers(60, 100),
    mirrored=st.integers(0, 60),
    unmirrored=st.integers(0, 60),
)
SNAPSHOTS = st.integers(0, 500).flatmap(
    lambda total: st.builds(
        Snapshot, st.just(total), st.integers(0, total), SEGMENTS, LENDERS, st.integers(0, 300), SPILLS
    )
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
        if now.spill is not None and now.spill.ready:
            room[SPILL_PEER] = now.spill.free - now.spill.waiting
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
        going = now.under_way
        if any(each.stalled_ms < SETTINGS.stalled_ms for each in now.lenders) or (
            now.spill is not None and now.spill.ready and now.spill.free
        ):
            going -= sum(each.shipping for each in now.lenders if each.stalled_ms >= SETTINGS.stalled_ms)
        urgent = URGENT_MAX if now.spill is not None and now.frames_free <= 0.05 * now.frames_total else 0
        assert len(young) <= max(0, used - SETTINGS.low * now.frames_total - going, urgent)
        # The last tier is for what lasts, and takes nothing for its age.
        spilled = [by_number[ship.segment] for ship in ships if ship.lender == SPILL_PEER]
        assert not any(segment.ephemeral for segment in spilled) and (policy.draining or not spilled)
        # Copies are given up or made, never both, and only what is there or missing.
        care = policy.upkeep(now)
        assert not (care.room and care.copies) and 0 <= care.copies <= COPIES_MAX
        if care.room:
            assert now.spill is not None and now.spill.mirrored and policy.draining
        if care.copies:
            assert now.spill is not None and care.copies <= min(now.spill.unmirrored, now.spill.free)
