"""How far a lender's word is believed: what it did, by the ms, and what it gets then."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.constants import SPILL_PEER
from ramster.remotify.policy import FAULT_STALLS, Lender, Policy, Segment, Settings, Snapshot, SpillRoom
from ramster.remotify.trust import BACKLOG_MAX, LEVEL_MAX, Change, Trust

STALLED_MS = 1000
LIAR, GOOD = 2, 3


def seen(accepted: int = 0, refused: int = 0, shipping: int = 0, stalled_ms: int = 0) -> Lender:
    return Lender(LIAR, True, 10**6, shipping, stalled_ms, accepted, refused, "it is full")


@pytest.mark.parametrize(
    ("history", "allowed", "word"),
    [
        ([], BACKLOG_MAX, "trusted"),
        ([(0, seen(accepted=5))], BACKLOG_MAX, "trusted"),
        ([(0, seen(shipping=8, stalled_ms=STALLED_MS - 1))], BACKLOG_MAX, "trusted"),
        # One that is full while several bring at once refuses some and takes others.
        ([(0, seen(accepted=4, refused=4))], BACKLOG_MAX, "trusted"),
        ([(0, seen(refused=1)), (499, seen(refused=1))], 0, "gets no segments for 0.0 s"),
        ([(0, seen(refused=1)), (500, seen(refused=1))], 1, "gets 1 segment at a time"),
        # Within a pause it is the same fault, not another.
        ([(0, seen(refused=1)), (200, seen(refused=9)), (500, seen(refused=9))], 1, "gets 1 segment at a time"),
        ([(0, seen(refused=1)), (500, seen(refused=2)), (501, seen(refused=2))], 0, "gets no segments for 2.0 s"),
        ([(0, seen(shipping=8, stalled_ms=STALLED_MS))], 0, "gets no segments for 0.5 s: it does not answer"),
        # Success restores, one step at a time.
        ([(0, seen(refused=1)), (500, seen(refused=1, accepted=1))], 4, "gets 4 segments at a time"),
        (
            [(0, seen(refused=1)), (500, seen(refused=1, accepted=1)), (501, seen(refused=1, accepted=2))],
            BACKLOG_MAX,
            "trusted",
        ),
        # Also before the pause is over: what was stuck moves again.
        ([(0, seen(shipping=8, stalled_ms=STALLED_MS)), (9, seen(accepted=8))], 4, "gets 4 segments at a time"),
    ],
)
def test_standing(history: list[tuple[int, Lender]], allowed: int, word: str) -> None:
    trust = Trust(STALLED_MS)
    for now_ms, lender in history:
        trust.look(now_ms, [lender])
    assert trust.allowed(LIAR) == allowed
    assert trust.word(LIAR).startswith(word)


def test_pauses_grow_to_half_a_minute_and_each_change_is_said_once() -> None:
    trust, changes, pauses, refused, now_ms = Trust(STALLED_MS), [], [], 0, 0
    for _ in range(6):
        refused += 1
        changes += trust.look(now_ms, [seen(refused=refused)])
        began = now_ms
        while not trust.allowed(LIAR):
            now_ms += 10
            changes += trust.look(now_ms, [seen(refused=refused)])
        pauses.append(now_ms - began)
    assert pauses == [500, 2000, 8000, 32_000, 32_000, 32_000]
    why = "it refused segments that it said it has room for (it is full)"
    assert changes == [Change(LIAR, False, why, 2000)]
    for accepted in range(1, LEVEL_MAX + 1):
        changes += trust.look(now_ms, [seen(accepted, refused)])
    assert changes[1:] == [Change(LIAR, True, why, 0)] and trust.word(LIAR) == "trusted"


def test_one_that_takes_a_segment_and_refuses_the_next_gains_nothing_by_it() -> None:
    trust, accepted, refused = Trust(STALLED_MS), 0, 0
    for now_ms in range(0, 120_000, 100):
        trust.look(now_ms, [seen(accepted, refused)])
        if allowed := trust.allowed(LIAR):
            accepted, refused = (accepted + 1, refused) if allowed == 1 else (accepted, refused + allowed)
    assert refused < BACKLOG_MAX + 4 * 120, "not 64 each time, and not each time"


def segments(n: int) -> list[Segment]:
    return [Segment(i, 1, 50_000, 20, 1000 + n - i, False) for i in range(n)]


def decide(policy: Policy, lenders: list[Lender], under_way: int, spill: SpillRoom | None = None) -> Counter[int]:
    return Counter(each.lender for each in policy.decide(Snapshot(100, 10, segments(32), lenders, under_way, spill)))


def test_what_stands_still_at_one_peer_is_not_under_way_where_another_takes_it() -> None:
    """30 segments are to leave; all 30 stand still."""
    still = Lender(LIAR, True, 10**6, 30, stalled_ms=250)
    good = Lender(GOOD, True, 100, 0)
    policy = Policy(Settings())
    assert decide(policy, [still, good], 30) == {GOOD: 30}
    assert policy.stalled([still, good], None) == [LIAR]
    assert decide(policy, [still], 30, SpillRoom(100, 0)) == {SPILL_PEER: 30}
    assert decide(policy, [still], 30) == {}, "nobody else is there"
    assert policy.stalled([still], None) == []


def test_who_is_at_fault_loses_its_orders_and_then_gets_a_single_one() -> None:
    policy = Policy(Settings())
    good = Lender(GOOD, True, 100, 0)
    fault = Lender(LIAR, True, 10**6, 20, FAULT_STALLS * 250)
    policy.look(0, [fault, good])
    assert policy.stalled([fault, good], None) == policy.stalled([fault], None) == [LIAR]
    free = Lender(LIAR, True, 10**6, 0)
    assert decide(policy, [free, good], 0) == {GOOD: 30}
    assert policy.seal_after_ms([free]) == 0 < policy.seal_after_ms([free, good])
    policy.look(500, [free, good])
    assert decide(policy, [free, good], 0) == {LIAR: 1, GOOD: 29}
    assert decide(policy, [Lender(LIAR, True, 10**6, 1), good], 0) == {GOOD: 30}


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5000)),
        max_size=60,
    )
)
def test_whatever_it_does_pauses_are_bounded_and_success_restores(
    steps: list[tuple[int, int, int, int, int]],
) -> None:
    trust, now_ms, accepted, refused = Trust(STALLED_MS), 0, 0, 0
    for passed_ms, more, less, shipping, stalled_ms in steps:
        now_ms, accepted, refused = now_ms + passed_ms, accepted + more, refused + less
        trust.look(now_ms, [seen(accepted, refused, shipping, stalled_ms)])
        assert 0 <= trust.level(LIAR) <= LEVEL_MAX and 0 <= trust.allowed(LIAR) <= BACKLOG_MAX
    for _ in range(LEVEL_MAX):
        accepted += 1
        trust.look(now_ms, [seen(accepted, refused)])
    assert trust.word(LIAR) == "trusted" and trust.allowed(LIAR) == BACKLOG_MAX
