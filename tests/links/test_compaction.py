"""Remote segments are compacted where they lie: what is dead leaves the lender, and no page crosses the network."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.links.conftest import LENDER, MakePair, Pair, page

from ramster.errors import PageLost
from ramster.testing import _stress
from ramster.testing.proxy import wait_until

PAGES = range(120)
KEPT = PAGES[::4]
# Image header and directory of a segment of these tests, whose entries have 300 bytes or more.
OVERHEAD_MAX = 64 + 2 * 220 + 8


def flush(pair: Pair, pages: list[int]) -> None:
    for index in pages:
        assert pair.a.store.flush_page(pair.pool, index)


def dead(pair: Pair) -> int:
    return pair.a.store.statistics().dead_bytes_remote


def compacted(pair: Pair) -> int:
    return int(pair.b.links.counters()["segments_compacted"])


def traffic(pair: Pair) -> tuple[int, int, int]:
    """Bytes that the borrower sent and received, and pages that the lender sent."""
    row = next(row for row in pair.a.links.peers() if row["number"] == LENDER)
    return row["bytes_sent"], row["bytes_received"], pair.b.links.counters()["gets_served"]


def settled(pair: Pair) -> None:
    """Nothing waits to be freed or compacted: each segment is live by half or more."""

    def done() -> bool:
        s = pair.a.store.statistics()
        return pair.b.lent_used() == s.segments_remote and s.dead_bytes_remote <= s.live_bytes_remote

    wait_until(done, "freed and compacted")


def held(pair: Pair) -> int:
    return int(pair.b.links.counters()["lent_bytes"])


def expect(pair: Pair, live: dict[int, bytes]) -> None:
    for index in range(300):
        assert pair.fetch(index) == live.get(index), f"page {index}"


def test_dead_pages_leave_the_lender_and_no_page_travels(pair: Pair) -> None:
    pair.put(*PAGES)
    segments = pair.ship()
    before, was_held, free = traffic(pair), held(pair), pair.b.links.counters()["lent_bytes_free"]
    flush(pair, [index for index in PAGES if index not in KEPT])
    settled(pair)
    sent, received, gets = (now - then for now, then in zip(traffic(pair), before, strict=True))
    orders = pair.a.links.counters()["compacts_sent"]
    assert segments <= orders == compacted(pair)
    assert sent <= orders * (48 + 16) and received <= orders * 48 and gets == 0
    statistics = pair.a.store.statistics()
    assert statistics.segments_remote == segments
    remote = statistics.live_bytes_remote + statistics.dead_bytes_remote
    assert remote <= held(pair) <= remote + segments * OVERHEAD_MAX < was_held
    assert pair.b.links.counters()["lent_bytes_free"] > free
    for index in KEPT:
        assert pair.fetch(index) == page(index)


def test_above_the_threshold_nothing_happens(make_pair: MakePair) -> None:
    pair = make_pair(compact_below=0)
    pair.put(*PAGES)
    pair.ship()
    flush(pair, [index for index in PAGES if index not in KEPT])
    pair.put(300)
    pair.ship()  # whatever was ordered before that has been told
    assert pair.a.links.counters()["compacts_sent"] == 0 and dead(pair) > 0


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_get_in_flight_while_its_segment_is_compacted(pair: Pair, direction: str) -> None:
    pair.put(*PAGES)
    pair.ship()
    with getattr(pair.get, direction).held():
        under_way = pair.later(lambda: pair.fetch(40))
        flush(pair, [index for index in PAGES if index not in KEPT])
        settled(pair)
        assert compacted(pair) > 0 and not under_way.done()
    assert under_way.result() == page(40)


def test_a_get_of_a_page_that_dies_and_is_compacted_away_is_no_loss(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.get.up.held():
        under_way = pair.later(lambda: pair.fetch(41))
        flush(pair, [index for index in PAGES if index not in KEPT])
        settled(pair)
    assert under_way.result() is None


def test_the_answer_is_lost_and_the_order_is_repeated(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    before = dead(pair)
    with pair.bulk.down.held():
        flush(pair, [index for index in PAGES if index not in KEPT])
        wait_until(lambda: compacted(pair) > 0, "the lender has done it")
        assert dead(pair) > before, "and its answer is on the way"
        pair.cut()
    pair.connect()
    settled(pair)
    for index in KEPT:
        assert pair.fetch(index) == page(index)


def test_dead_pages_that_pile_up_while_the_link_is_down_leave_afterwards(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    pair.cut()
    flush(pair, [index for index in PAGES if index not in KEPT])
    assert compacted(pair) == 0
    pair.connect()
    settled(pair)
    for index in KEPT:
        assert pair.fetch(index) == page(index)


def test_the_segment_dies_while_it_is_compacted(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.bulk.down.held():
        flush(pair, [index for index in PAGES if index not in KEPT])
        wait_until(lambda: compacted(pair) > 0, "the lender has done it")
        flush(pair, list(KEPT))
    pair.wait_for_frees(0)
    assert held(pair) == 0 and dead(pair) == 0


def test_the_lender_restarts_while_it_compacts(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.bulk.down.held():
        flush(pair, [index for index in PAGES if index not in KEPT])
        wait_until(lambda: compacted(pair) > 0, "the lender has done it")
        pair.cut()
        pair.b.restart()
    pair.connect()
    for index in KEPT:
        with pytest.raises(PageLost):
            pair.fetch(index)
    pair.put(*KEPT)
    pair.ship()
    for index in KEPT:
        assert pair.fetch(index) == page(index)


def test_pages_that_die_on_the_way_leave_once_the_segment_is_there(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.up.held():
        pair.order()
        wait_until(lambda: pair.a.links.peers()[0]["shipping"] > 0, "under way")
        flush(pair, [index for index in PAGES if index not in KEPT])
    pair.settle()
    settled(pair)
    for index in KEPT:
        assert pair.fetch(index) == page(index)


def test_slots_stay_valid(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    before = [_stress.reference(pair.a.store, pair.pool, index) for index in KEPT]
    flush(pair, [index for index in PAGES if index not in KEPT])
    settled(pair)
    assert compacted(pair) > 0
    assert [_stress.reference(pair.a.store, pair.pool, index) for index in KEPT] == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    overwritten=st.floats(0, 0.9),
    flushed=st.floats(0, 0.9),
    rounds=st.integers(1, 3),
)
def test_stored_is_live_at_the_lender(pair: Pair, seed: int, overwritten: float, flushed: float, rounds: int) -> None:
    """Whatever is put, overwritten and flushed: the lender holds at most twice what is live, plus directories."""
    dice = random.Random(seed)
    live: dict[int, bytes] = {}

    def put(index: int) -> None:
        size = dice.randrange(300, 3500)
        live[index] = dice.randbytes(size) + bytes(4096 - size)
        pair.a.store.put(pair.pool, index, live[index])

    for index in range(300):
        pair.a.store.flush_page(pair.pool, index)
    for index in dice.sample(range(300), 250):
        put(index)
    for _ in range(rounds):
        pair.ship()
        before = traffic(pair)
        shipped = pair.a.links.counters()["bytes_shipped"]
        for index in list(live):
            if dice.random() < flushed:
                assert pair.a.store.flush_page(pair.pool, index)
                del live[index]
            elif dice.random() < overwritten:
                put(index)
        settled(pair)
        sent, received, gets = (now - then for now, then in zip(traffic(pair), before, strict=True))
        # A frame, and a bit for each entry. An order is given at most once for each halving of a segment.
        assert sent <= 16 * 8 * (48 + 64) and received <= 16 * 8 * 48 and gets == 0
        assert pair.a.links.counters()["bytes_shipped"] == shipped
        statistics = pair.a.store.statistics()
        bound = 2 * statistics.live_bytes_remote + statistics.segments_remote * OVERHEAD_MAX
        assert held(pair) <= bound
        expect(pair, live)
    pair.a.store.verify()
