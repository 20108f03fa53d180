"""Ship, get, put and flush in every order that once went wrong, each forced.

Proxies hold a link at the moment that matters: a push whose segment has arrived and whose answer has not, a get whose
request has and whose reply has not. The original's races (those of a region are in test_region_races.py):

=================================================  ====================================================================
the original's race                                forced by
=================================================  ====================================================================
get while the page is being pushed                 test_get_while_the_page_is_being_pushed
exclusive get while the push is in flight          test_exclusive_get_while_the_push_is_in_flight_leaves_no_orphan,
                                                   test_ephemeral_get_while_the_push_is_in_flight_leaves_no_orphan
flush while the push is in flight                  test_flush_while_the_push_is_in_flight_leaves_no_orphan,
                                                   test_object_flush_while_the_push_is_in_flight_leaves_no_orphan,
                                                   test_destroy_of_the_pool_while_the_push_is_in_flight
new put of the key while the push is in flight     test_new_put_of_the_same_key_while_the_push_is_in_flight
flush while the get is in flight                   test_flush_while_the_get_is_in_flight,
                                                   test_destroy_of_the_pool_while_the_get_is_in_flight
duplicate put while the get is in flight           test_duplicate_put_while_the_get_is_in_flight,
                                                   test_put_and_push_again_while_the_get_is_in_flight,
                                                   test_a_refused_put_while_the_get_is_in_flight_leaves_nothing
two gets on one key                                test_two_gets_on_one_key,
                                                   test_of_two_exclusive_gets_on_one_key_one_has_the_page
network failure with a get under way               test_link_cut_during_a_get_which_goes_on_with_the_next_connection,
                                                   test_link_cut_for_longer_than_give_up, test_a_get_has_a_deadline
ephemeral flush of a remote page                   test_flush_of_ephemeral_remote_pages_frees_the_lenders_frames
persistent flush of a remote page                  test_flushing_remote_pages_frees_the_lenders_frames,
                                                   test_freed_while_the_link_is_down_is_told_later
object flush, destroy of an ephemeral pool         test_object_flush_frees_what_every_lender_has_of_it,
                                                   test_destroying_a_pool_frees_what_it_has_away
stale marker after an exclusive or ephemeral get   test_after_an_exclusive_remote_get_nothing_stays_anywhere
the connection drops while a get waits for it      test_link_cut_during_a_get_which_goes_on_with_the_next_connection,
                                                   test_a_get_that_waits_for_a_lender_that_restarts_ends_at_once
object with pages at A, target switched to B       test_object_flush_frees_what_every_lender_has_of_it
=================================================  ====================================================================
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.links.conftest import BORROWER, LENDER, OTHER_LENDER, SEGMENT, MakePair, Pair, Side, page

from ramster.engine.links import BULK, GET, TlsContext
from ramster.errors import PageLost, PoolGone, StoreFull
from ramster.remotify.policy import Policy, Settings
from ramster.remotify.worker import Worker
from ramster.testing import _stress
from ramster.testing.proxy import wait_until

PAGES = range(200)
IN_FLIGHT = 8


def test_what_was_shipped_comes_back_equal(pair: Pair) -> None:
    pair.put(*PAGES)
    shipped = pair.ship()
    assert shipped > 3
    assert {pair.where(index) for index in PAGES} == {LENDER}
    pair.expect(PAGES)
    statistics = pair.a.store.statistics()
    assert (statistics.pages_local, statistics.pages_remote, statistics.segments_remote) == (0, len(PAGES), shipped)
    assert pair.b.lent_used() == shipped
    assert pair.a.links.counters()["remote_gets"] == len(PAGES)


def test_a_page_that_was_compacted_before_it_left_comes_back_equal(pair: Pair) -> None:
    pair.put(*PAGES)
    for index in PAGES[::3]:
        assert pair.a.store.flush_page(pair.pool, index)
    pair.a.store.seal_open()
    assert pair.a.store.clean(3) > 0
    pair.ship()
    for index in PAGES:
        assert pair.fetch(index) == (None if index % 3 == 0 else page(index))


def test_overwriting_remote_pages_frees_the_lenders_frames(pair: Pair) -> None:
    pair.put(*PAGES)
    shipped = pair.ship()
    pair.put(*PAGES, version=1)
    pair.wait_for_frees(0)
    statistics = pair.a.store.statistics()
    assert (statistics.pages_remote, statistics.segments_remote, statistics.live_bytes_remote) == (0, 0, 0)
    assert pair.a.links.counters()["frees_sent"] == shipped
    pair.a.store.verify()
    pair.expect(PAGES, version=1)


def test_flushing_remote_pages_frees_the_lenders_frames(pair: Pair) -> None:
    pair.put(*PAGES)
    shipped = pair.ship()
    for index in PAGES[:-1]:
        assert pair.a.store.flush_page(pair.pool, index)
    pair.wait_for_frees(1)
    assert shipped > 1
    pair.a.store.verify()
    assert pair.a.store.flush_page(pair.pool, PAGES[-1])
    pair.wait_for_frees(0)
    pair.a.store.verify()


@pytest.mark.parametrize("persistent", [True, False])
def test_destroying_a_pool_frees_what_it_has_away(pair: Pair, persistent: bool) -> None:
    pair.pool = pair.a.store.create_pool(pages=4096, persistent=persistent)
    pair.put(*PAGES)
    pair.ship()
    pair.a.store.destroy_pool(pair.pool)
    pair.wait_for_frees(0)


def test_flush_of_ephemeral_remote_pages_frees_the_lenders_frames(pair: Pair) -> None:
    pair.pool = pair.a.store.create_pool(pages=4096, persistent=False)
    pair.put(*PAGES)
    assert pair.ship() == pair.b.lent_used() > 3
    for index in PAGES:
        assert pair.a.store.flush_page(pair.pool, index)
    pair.wait_for_frees(0)
    assert all(pair.fetch(index) is None for index in PAGES)


@pytest.mark.parametrize("persistent", [True, False])
def test_object_flush_frees_what_every_lender_has_of_it(
    pair: Pair, contexts: dict[int, TlsContext], persistent: bool
) -> None:
    """Half of each of two objects' pages with one lender, half with another; segments are named where they are."""
    store, links = pair.a.store, pair.a.links
    other = Pair(pair.a, Side(OTHER_LENDER, contexts[OTHER_LENDER], 8, 16))
    other.connect()
    try:
        pool = store.create_pool(persistent=persistent)
        for first, lender in ((0, pair), (100, other)):
            for index in range(first, first + 100):
                for thing in (1, 2):
                    store.put(pool, index, page(index + 1000 * thing), (thing, 0, 0))
            assert lender.ship() == lender.b.lent_used() > 3
        expected = range(200)
        assert [links.get(pool, index, (1, 0, 0)) for index in expected] == [page(index + 1000) for index in expected]
        assert store.flush_object(pool, (1, 0, 0)) == 200
        assert all(links.get(pool, index, (1, 0, 0)) is None for index in expected)
        assert [links.get(pool, index, (2, 0, 0)) for index in expected] == [page(index + 2000) for index in expected]
        store.verify()
        assert store.flush_object(pool, (2, 0, 0)) == 200
        pair.wait_for_frees(0)
        other.wait_for_frees(0)
    finally:
        other.close(keep=pair.a)


def test_a_full_lender_refuses_and_the_segment_stays(make_pair: MakePair) -> None:
    pair = make_pair(lend=2)
    pair.put(*PAGES)
    shipped = pair.ship()
    counters = pair.a.links.counters()
    assert (pair.b.lent_used(), counters["ships_refused"]) == (2, shipped - 2)
    assert pair.a.store.statistics().segments_remote == 2
    assert pair.a.links.peers()[0]["credit"] == 0
    pair.expect(PAGES)


def test_a_node_that_lends_nothing_refuses_everything(make_pair: MakePair) -> None:
    pair = make_pair(lend=0)
    pair.put(*PAGES)
    pair.ship()
    assert pair.a.store.statistics().segments_remote == 0
    pair.expect(PAGES)


def test_a_borrower_fills_no_more_than_its_share(make_pair: MakePair, contexts: dict[int, TlsContext]) -> None:
    pair = make_pair(borrower_share=0.25)
    second = Side(OTHER_LENDER, contexts[OTHER_LENDER], 24, 0)
    other = Pair(second, pair.b)
    other.connect()
    try:
        pair.put(*PAGES)
        shipped = pair.ship()
        assert shipped > 4 == pair.b.links.foreign()[1], "a quarter of 16 segments"
        assert _row(pair, LENDER)["credit"] == 0 and pair.a.store.statistics().segments_remote == 4
        other.put(*PAGES)
        other.ship()
        assert pair.b.links.foreign() == {1: 4, OTHER_LENDER: 4}
        pair.expect(PAGES)
        other.expect(PAGES)
    finally:
        other.close(keep=pair.b)


def text(seed: int) -> bytes:
    """A page that zstd makes clearly smaller than LZ4 does: letters of few kinds in no order."""
    return bytes(random.Random(seed).choices(b"abcdefghijklmnop", k=4096))


@pytest.mark.parametrize("recompress", ["off", "auto", "always"])
@pytest.mark.parametrize("rate", [None, 2_000_000])
def test_pages_are_compressed_again_while_the_link_is_slow(
    make_pair: MakePair, recompress: str, rate: float | None
) -> None:
    pair = make_pair(recompress=recompress, segments=64, lend=48)
    for index in range(300):
        pair.a.store.put(pair.pool, index, text(index))
    sparse = pair.a.store.create_pool()
    pair.a.store.put(sparse, 7, text(7), (1, 2, 3))
    pair.bulk.up.throttle(rate)
    pair.ship()
    pair.bulk.up.throttle(None)
    statistics = pair.a.store.statistics()
    assert statistics.segments_local == 0
    if recompress == "always":
        assert statistics.recompressed_pages == 301
        assert statistics.recompressed_saved_bytes > 0.3 * 4096 * 301
    elif recompress == "off":
        assert statistics.recompressed_pages == 0
    elif rate is not None:
        assert 0 < statistics.recompressed_pages < 301
    pair.a.store.verify()
    for index in range(300):
        assert pair.fetch(index) == text(index)
    assert pair.a.links.get(sparse, 7, (1, 2, 3)) == text(7)


def test_no_page_is_compressed_again_while_nothing_waits_for_the_link(make_pair: MakePair) -> None:
    pair = make_pair(recompress="auto", segments=64, lend=48)
    for index in range(300):
        pair.a.store.put(pair.pool, index, text(index))
    pair.bulk.up.throttle(2_000_000)
    pair.ship()
    pair.bulk.up.throttle(None)
    slow = pair.a.store.statistics().recompressed_pages
    assert slow > 0
    for start in range(300, 550, 50):  # the pace of the slow link is still what is known
        for index in range(start, start + 50):
            pair.a.store.put(pair.pool, index, text(index))
        pair.a.store.seal_open()
        while pair.a.order(pair.b, most=2):
            pair.a.settle()
    assert pair.a.store.statistics().recompressed_pages == slow


def test_cold_data_in_an_open_segment_leaves(pair: Pair) -> None:
    pair.put(1, 2, 3)
    worker = Worker(pair.a.store, pair.a.links, Policy(Settings(cold_after_ms=20)), 50)
    wait_until(lambda: worker.step() >= 0 and pair.a.store.statistics().segments_remote == 1, "it has left")
    assert pair.where(2) == LENDER and worker.ordered == 1
    pair.expect(range(1, 4))


def test_credit_follows_what_the_lender_has_left(make_pair: MakePair) -> None:
    pair = make_pair(lend=8)
    pair.put(*range(60))
    shipped = pair.ship()
    assert pair.a.links.peers()[0]["credit"] == 8 - shipped
    for index in range(60):
        pair.a.store.flush_page(pair.pool, index)
    wait_until(lambda: pair.a.links.peers()[0]["credit"] == 8, "credit comes back with the frees")


def test_get_while_the_page_is_being_pushed(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():  # the lender has it, its answer is on the way
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        pair.expect(PAGES)
        assert pair.a.links.counters()["remote_gets"] == 0
        assert pair.where(0) == "here"
    pair.settle()
    pair.expect(PAGES)
    assert pair.where(0) == LENDER


def test_new_put_of_the_same_key_while_the_push_is_in_flight(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        pair.put(*PAGES[:150], version=1)
    pair.settle()
    pair.expect(PAGES[:150], version=1)
    pair.expect(PAGES[150:])
    pair.a.store.verify()
    assert pair.a.store.statistics().pages_remote == 50
    pair.put(*PAGES[150:], version=1)
    pair.wait_for_frees(0)


def test_flush_while_the_push_is_in_flight_leaves_no_orphan(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        for index in PAGES:
            assert pair.a.store.flush_page(pair.pool, index)
    pair.wait_for_frees(0)
    assert all(pair.fetch(index) is None for index in PAGES)
    pair.a.store.verify()


def test_exclusive_get_while_the_push_is_in_flight_leaves_no_orphan(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        for index in PAGES:
            assert pair.fetch(index, mode=1) == page(index)
    pair.wait_for_frees(0)
    assert all(pair.fetch(index) is None for index in PAGES)


def test_ephemeral_get_while_the_push_is_in_flight_leaves_no_orphan(pair: Pair) -> None:
    pair.pool = pair.a.store.create_pool(pages=4096, persistent=False)
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        for index in PAGES:
            assert pair.fetch(index, mode=0) == page(index)
    pair.wait_for_frees(0)
    assert all(pair.fetch(index) is None for index in PAGES)


def test_object_flush_while_the_push_is_in_flight_leaves_no_orphan(pair: Pair) -> None:
    store = pair.a.store
    pool = store.create_pool()
    for index in PAGES:
        store.put(pool, index, page(index), (1, 2, 3))
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        assert store.flush_object(pool, (1, 2, 3)) == len(PAGES)
    pair.wait_for_frees(0)
    assert all(pair.a.links.get(pool, index, (1, 2, 3)) is None for index in PAGES)


def test_destroy_of_the_pool_while_the_push_is_in_flight(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        heir = replace_pool(pair)
    pair.wait_for_frees(0)
    assert all(pair.a.links.get(heir, index) is None for index in PAGES), "nothing of the former pool of that place"


def test_destroy_of_the_pool_while_the_get_is_in_flight(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        heir = replace_pool(pair)
        pair.a.store.put(heir, 7, page(100_007))
    with pytest.raises(PoolGone):
        under_way.result()
    assert pair.a.links.get(heir, 7) == page(100_007), "the page of the former pool of that place is not this one's"


def replace_pool(pair: Pair) -> int:
    """Destroy the pair's pool and make another in its place."""
    pair.a.store.destroy_pool(pair.pool)
    heir = pair.a.store.create_pool(pages=4096)
    assert heir % 4096 == pair.pool % 4096
    return heir


def test_flush_while_the_get_is_in_flight(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        assert pair.a.store.flush_page(pair.pool, 7)
    assert under_way.result() is None


def test_duplicate_put_while_the_get_is_in_flight(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        pair.put(7, version=1)
    assert under_way.result() == page(100_007)


def test_put_and_push_again_while_the_get_is_in_flight(pair: Pair) -> None:
    """The old reply arrives when the key is remote again, in another segment: look again, and ask for that."""
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        pair.put(7, version=1)
        pair.ship()
        assert pair.where(7) == LENDER
    assert under_way.result() == page(100_007)


def test_a_refused_put_while_the_get_is_in_flight_leaves_the_page(make_pair: MakePair) -> None:
    pair = make_pair(segments=8)
    pair.put(7)
    pair.ship()
    with pytest.raises(StoreFull):
        pair.put(*range(1000, 1400))
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        with pytest.raises(StoreFull):
            pair.put(7, version=1)
    assert under_way.result() == page(7)
    pair.wait_for_frees(1)
    assert pair.fetch(7) == page(7)


def test_two_gets_on_one_key(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        both = [pair.later(lambda: pair.fetch(7)) for _ in range(2)]
        assert not any(each.done() for each in both)
    assert [each.result() for each in both] == [page(7)] * 2


def test_of_two_exclusive_gets_on_one_key_one_has_the_page(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    for index in range(20):
        with pair.get.down.held():
            both = [pair.later(lambda index=index: pair.fetch(index, mode=1)) for _ in range(2)]  # type: ignore[misc]
        assert sorted([each.result() for each in both], key=bool) == [None, page(index)]


@pytest.mark.parametrize(("persistent", "mode"), [(True, 1), (False, 1), (False, 0)])
def test_after_an_exclusive_remote_get_nothing_stays_anywhere(pair: Pair, persistent: bool, mode: int) -> None:
    pair.pool = pair.a.store.create_pool(pages=4096, persistent=persistent)
    pair.put(*PAGES)
    pair.ship()
    for index in PAGES:
        assert pair.fetch(index, mode=mode) == page(index)
    pair.wait_for_frees(0)
    asked = pair.a.links.counters()["remote_gets"]
    assert all(pair.fetch(index) is None for index in PAGES)
    assert pair.a.links.counters()["remote_gets"] == asked, "a miss costs no round trip"


def test_a_late_reply_is_ignored(make_pair: MakePair) -> None:
    pair = make_pair(request_deadline_ms=50)
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        wait_until(lambda: pair.b.links.counters()["gets_served"] >= 3, "asked again twice")
    assert under_way.result() == page(7)
    wait_until(lambda: pair.a.links.counters()["late_replies"] >= 1, "the replies to the other requests")
    pair.expect(PAGES)


def test_a_get_has_a_deadline(make_pair: MakePair) -> None:
    pair = make_pair(request_deadline_ms=50, give_up_ms=200)
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        with pytest.raises(PageLost, match="does not answer"):
            under_way.result()
    pair.expect(PAGES)  # late, not lost


def test_link_cut_during_a_get_which_goes_on_with_the_next_connection(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = [pair.later(lambda index=index: pair.fetch(index)) for index in range(4)]  # type: ignore[misc]
        pair.cut()
    pair.connect()
    assert [each.result() for each in under_way] == [page(index) for index in range(4)]
    pair.expect(PAGES)


def test_link_cut_for_longer_than_give_up(make_pair: MakePair) -> None:
    pair = make_pair(request_deadline_ms=50, give_up_ms=200)
    pair.put(*PAGES)
    pair.ship()
    pair.cut()
    with pytest.raises(PageLost, match="does not answer"):
        pair.fetch(7)
    wait_until(lambda: pair.a.links.peers()[0]["lost"], "out of reach for longer than give_up")
    assert pair.a.links.unreachable() == {LENDER: len(PAGES)}
    assert pair.a.store.statistics().pages_lost == 0
    before = pair.a.links.counters()["unreachable"]
    with pytest.raises(PageLost, match="does not answer"):
        pair.fetch(8)
    assert pair.a.links.counters()["unreachable"] == before + 1, "at once, without a wait of its own"
    pair.connect()
    pair.expect(PAGES)


def test_a_bulk_connection_that_is_down_does_not_stop_gets(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    pair.bulk.cut()
    wait_until(lambda: not pair.a.links.up(LENDER, BULK), "bulk is down")
    pair.expect(PAGES)
    assert pair.a.links.up(LENDER, GET)


def test_link_cut_during_a_push_keeps_the_segment_here_and_frees_the_orphan(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        pair.cut()
    pair.settle()
    assert pair.a.store.statistics().segments_remote == 0
    assert pair.b.lent_used() == n, "the lender cannot know yet"
    pair.expect(PAGES)
    pair.connect()
    pair.wait_for_frees(0)
    # The lender has forgotten them; they may go there again once the owner has been told so.
    wait_until(lambda: pair.ship() >= 0 and pair.a.store.statistics().segments_local == 0, "pushed again")
    pair.put(*PAGES[:10], version=1)
    pair.expect(PAGES[10:])
    assert pair.b.lent_used() == n


def test_an_orphan_is_freed_at_a_node_that_lends_nothing(make_pair: MakePair) -> None:
    """It has no tables to look in; that FREE of what is not there is fine holds for it, too."""
    pair = make_pair(lend=0)
    pair.put(*PAGES)
    with pair.bulk.down.held():
        pair.order()
        wait_until(lambda: pair.a.links.counters()["bytes_shipped"] > 0, "on its way")
        pair.cut()
    pair.settle()
    pair.connect()
    wait_until(
        lambda: pair.ship() > 0 and pair.a.links.counters()["ships_refused"] > 0,
        "the orphan is gone: asked again, refused",
    )
    pair.expect(PAGES)


def test_a_segment_is_not_pushed_again_before_its_orphan_is_gone(pair: Pair) -> None:
    """The FREE of the first copy must not take the second: they have one name."""
    pair.put(*range(40))
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        pair.cut()
    pair.settle()
    pair.bulk.up.delay(0.1)
    pair.connect()
    pair.order()
    pair.settle()
    assert pair.a.store.statistics().segments_remote == 0, "the FREE is still on its way"
    pair.bulk.up.delay(0)
    pair.wait_for_frees(0)
    wait_until(lambda: pair.ship() == 0, "pushed in the end")
    pair.expect(range(40))
    assert pair.b.lent_used() == n


def test_link_cut_again_before_the_orphan_is_freed(pair: Pair) -> None:
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        pair.cut()
    pair.settle()
    for _ in range(3):
        pair.connect(GET)
        pair.connect(BULK)
        pair.cut()
    pair.connect()
    pair.wait_for_frees(0)


def test_link_cut_with_half_a_segment_on_the_way(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.bulk.up.throttle(2_000_000)
    before = pair.bulk.up.bytes
    pair.order()
    wait_until(lambda: pair.bulk.up.bytes > before + SEGMENT // 2, "half a segment")
    pair.cut()
    pair.bulk.up.throttle(None)
    pair.settle()
    pair.connect()
    pair.expect(PAGES)
    wait_until(lambda: pair.b.lent_used() == pair.a.store.statistics().segments_remote, "no frame without an owner")
    pair.ship()
    pair.expect(PAGES)


def test_freed_while_the_link_is_down_is_told_later(pair: Pair) -> None:
    pair.put(*PAGES)
    n = pair.ship()
    pair.cut()
    for index in PAGES:
        assert pair.a.store.flush_page(pair.pool, index)
    assert pair.b.lent_used() == n
    pair.connect()
    pair.wait_for_frees(0)
    pair.a.store.verify()


def test_a_corrupted_byte_on_the_wire_costs_the_connection_not_the_page(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    pair.get.down.corrupt(after=40)
    under_way = pair.later(lambda: pair.fetch(7))
    wait_until(lambda: not pair.a.links.up(LENDER, GET), "TLS refuses the record")
    pair.connect(GET)
    assert under_way.result() == page(7)


def test_the_lender_restarts_and_what_it_had_is_lost(pair: Pair) -> None:
    pair.put(*PAGES[:100])
    pair.ship()
    pair.put(*PAGES[100:])
    pair.cut()
    pair.b.restart()
    pair.connect()
    for index in PAGES[:100]:
        with pytest.raises(PageLost, match="the only node that held it is gone"):
            pair.fetch(index)
        assert pair.where(index) == "lost"
    pair.expect(PAGES[100:])
    statistics = pair.a.store.statistics()
    assert (statistics.pages_lost, statistics.pages_remote) == (100, 0)
    pair.a.store.verify()
    # A put replaces a lost page, a flush forgets it; both leave nothing behind.
    pair.put(*PAGES[:50], version=1)
    for index in PAGES[50:100]:
        assert pair.a.store.flush_page(pair.pool, index)
    pair.expect(PAGES[:50], version=1)
    statistics = pair.a.store.statistics()
    assert (statistics.pages_lost, statistics.segments_lost) == (0, 0)
    pair.ship()
    pair.expect(PAGES[:50], version=1)


def test_an_ephemeral_page_that_its_lender_lost_is_a_miss(pair: Pair) -> None:
    store = pair.a.store
    pool = store.create_pool(pages=100, persistent=False)
    for index in range(100):
        store.put(pool, index, page(index))
    pair.ship()
    assert store.statistics().pages_remote == 100
    assert pair.a.links.get(pool, 3) == page(3)
    assert pair.a.links.get(pool, 4, mode=0) == page(4)
    assert pair.a.links.get(pool, 4) is None, "an ephemeral get by type takes the page along"
    pair.cut()
    pair.b.restart()
    pair.connect()
    assert [pair.a.links.get(pool, index) for index in range(100)] == [None] * 100
    statistics = store.statistics()
    assert (statistics.pages_lost, statistics.pages_stored, statistics.segments_lost) == (0, 0, 0)


def test_a_get_that_waits_for_a_lender_that_restarts_ends_at_once(make_pair: MakePair) -> None:
    pair = make_pair(give_up_ms=60_000)
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        pair.cut()
    pair.b.restart()
    pair.connect()
    with pytest.raises(PageLost, match="gone"):
        under_way.result()


def test_a_push_under_way_survives_the_restart_of_its_lender(pair: Pair) -> None:
    """The former life's answer arrives after the new one has been met on the other connection."""
    pair.put(*PAGES)
    with pair.bulk.down.held():
        n = pair.order()
        wait_until(lambda: pair.b.lent_used() == n, "the lender has everything")
        pair.get.cut()
        wait_until(lambda: not pair.a.links.up(LENDER, GET) and not pair.b.links.up(1, GET), "get is down")
        pair.b.generation += 100
        pair.connect(GET)
        wait_until(lambda: not pair.a.links.up(LENDER, BULK), "the former life's connection goes first")
    pair.settle()
    assert pair.a.store.statistics().segments_remote == 0
    pair.expect(PAGES)


def test_the_owner_restarts_and_the_lender_drops_what_it_held(pair: Pair) -> None:
    pair.put(*PAGES)
    n = pair.ship()
    pair.cut()
    assert pair.b.lent_used() == n
    pair.a.restart()
    pair.pool = pair.a.store.create_pool(pages=4096)
    pair.connect()
    assert pair.b.lent_used() == 0
    pair.put(*PAGES, version=2)
    pair.ship()
    pair.expect(PAGES, version=2)


def test_goodbye_of_the_lender(make_pair: MakePair) -> None:
    pair = make_pair(give_up_ms=60_000)
    pair.put(*PAGES[:100])
    pair.ship()
    pair.put(*PAGES[100:])
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.links.peers()[0]["gone"], "goodbye is heard")
    with pytest.raises(PageLost):
        pair.fetch(7)
    assert pair.order() > 0
    pair.settle()
    pair.expect(PAGES[100:])
    assert pair.where(150) == "here", "nothing is sent to one who leaves"


def test_goodbye_while_a_push_is_in_flight(pair: Pair) -> None:
    """What it took in on the way out goes with it: the segment stays here."""
    pair.put(*PAGES)
    pair.bulk.up.hold()
    n = pair.order()
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.links.peers()[0]["gone"], "goodbye is heard")
    pair.bulk.up.release()
    pair.settle()
    assert pair.a.store.statistics().segments_local >= n
    pair.expect(PAGES)


def test_goodbye_of_the_owner_frees_the_lender(pair: Pair) -> None:
    pair.put(*PAGES)
    pair.ship()
    pair.a.links.goodbye()
    pair.wait_for_frees(0)


def test_silence_of_the_owner_beyond_its_grace_is_a_loss_that_is_told(pair: Pair) -> None:
    pair.put(*PAGES)
    n = pair.ship()
    pair.cut()
    assert pair.b.links.drop_foreign(1) == n
    pair.connect()
    with pytest.raises(PageLost, match="gone"):
        pair.fetch(7)
    assert pair.where(7) == "lost"
    assert pair.a.store.statistics().segments_lost == 1
    pair.put(7, version=1)
    assert pair.fetch(7) == page(100_007)


@pytest.mark.parametrize("offset", [0, 4, 12, 64, 66, 512, 520, 530, 2000])
def test_a_tampered_lent_frame_is_a_loss_never_wrong_bytes(pair: Pair, offset: int) -> None:
    pair.put(*range(20))
    assert pair.ship() == 1
    frame = next(f for f in range(16) if _holds(pair, f))
    pair.b.links.tamper(frame, offset)
    right = 0
    for index in range(20):
        try:
            assert pair.fetch(index) == page(index)
            right += 1
        except PageLost:
            pass
    assert right < 20 or offset in (0, 4, 12), "those bytes are the lender's own, read at arrival"
    pair.b.links.tamper(frame, offset)


def _holds(pair: Pair, frame: int) -> bool:
    reference = _stress.reference(pair.a.store, pair.pool, 0)
    return reference["handle"] == frame


def test_swapped_entries_are_refused(pair: Pair) -> None:
    """A lender that answers with another entry, of this segment or another, of this sealing or an older one."""
    pair.put(*range(60))
    pair.a.store.seal_open()
    images = {}
    entries: dict[int, bytes] = {}
    for segment, generation, *_ in pair.a.store.coldest(64):
        image = _stress.ship(pair.a.store, segment, generation, LENDER)
        assert image is not None
        images[segment] = image
    references = {index: _stress.reference(pair.a.store, pair.pool, index) for index in range(60)}
    for index, reference in references.items():
        entries[index] = _entry(images[int(reference["segment"])], int(reference["ordinal"]))
        assert _stress.unseal(pair.a.store, pair.pool, index, entries[index]) == page(index)
    for index in range(60):
        for other in (index + 1, index + 30):
            with pytest.raises(PageLost):
                _stress.unseal(pair.a.store, pair.pool, index, entries[other % 60])
    # The same page again: another sealing, and the old entry is of no use for it.
    pair.put(5)
    pair.a.store.seal_open()
    ((segment, generation, *_),) = pair.a.store.coldest(1)
    assert _stress.ship(pair.a.store, segment, generation, LENDER) is not None
    with pytest.raises(PageLost):
        _stress.unseal(pair.a.store, pair.pool, 5, entries[5])


def _entry(image: bytes, ordinal: int) -> bytes:
    entries = int.from_bytes(image[12:16], "little")
    base = (64 + 2 * entries + 7) // 8 * 8
    offset = int.from_bytes(image[64 + 2 * ordinal : 66 + 2 * ordinal], "little") * 8
    length = int.from_bytes(image[base + offset : base + offset + 2], "little")
    return image[base + offset : base + offset + 40 + length]


def test_two_owners_never_meet_in_one_lender(make_pair: MakePair, contexts: dict[int, TlsContext]) -> None:
    """Equal segment numbers and generations, different owners and bytes: frames are found by owner too."""
    one = make_pair(lend=32)
    other = Pair(Side(OTHER_LENDER, contexts[OTHER_LENDER], 24, 0), one.b)
    other.connect()
    try:
        one.put(*range(400))
        other.put(*range(400), version=7)
        names = []
        for pair in (one, other):
            pair.a.store.seal_open()
            names.append({each[:2] for each in pair.a.store.coldest(256)})
            pair.ship()
        assert names[0] & names[1], "no number and generation names a segment of both: the test shows nothing"
        foreign = one.b.links.foreign()
        assert set(foreign) == {BORROWER, OTHER_LENDER} and sum(foreign.values()) == one.b.lent_used()
        one.expect(range(400))
        other.expect(range(400), version=7)
        one.a.store.destroy_pool(one.pool)
        wait_until(lambda: set(one.b.links.foreign()) == {OTHER_LENDER}, "what the first one had is forgotten")
        other.expect(range(400), version=7)
    finally:
        other.close(keep=one.b)


def test_a_lender_that_stands_still_holds_up_no_other(pair: Pair, contexts: dict[int, TlsContext]) -> None:
    """Segments for a lender that takes nothing wait, then stay here; those for another lender pass them."""
    still = Pair(pair.a, Side(OTHER_LENDER, contexts[OTHER_LENDER], 8, 16))
    still.connect()
    try:
        pair.put(*range(400))
        pair.a.store.seal_open()
        segments = pair.a.store.coldest(24)
        with still.bulk.up.held():
            for segment, generation, *_ in segments[:12]:
                assert pair.a.links.ship(segment, generation, OTHER_LENDER)
            wait_until(lambda: _row(pair, OTHER_LENDER)["shipping"] == IN_FLIGHT, "as many as may be under way")
            for segment, generation, *_ in segments[12:]:
                assert pair.a.links.ship(segment, generation, LENDER)
            wait_until(lambda: pair.a.store.statistics().segments_remote == len(segments) - 12, "the others are there")
            waiting = {number: shipping for number, _, _, shipping, *_ in pair.a.links.lenders()}
            assert waiting == {LENDER: 0, OTHER_LENDER: 12}
            wait_until(lambda: pair.a.links.shipping() == IN_FLIGHT, "orders without progress are given up")
        wait_until(lambda: pair.a.links.shipping() == 0, "what was under way arrives late")
        pair.expect(range(400))
    finally:
        still.close(keep=pair.a)


def _row(pair: Pair, number: int) -> dict[str, Any]:
    return next(row for row in pair.a.links.peers() if row["number"] == number)


def test_stop_ends_gets_that_wait(make_pair: MakePair) -> None:
    pair = make_pair(give_up_ms=60_000, request_deadline_ms=60_000)
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        under_way = pair.later(lambda: pair.fetch(7))
        pair.a.links.stop()
        with pytest.raises(PageLost):
            under_way.result()


def test_events_are_raised_for_connections_that_come_and_go(make_pair: MakePair) -> None:
    """The node's shell waits for these: without the first a grace time would go on although the owner is back."""
    import os

    pair = make_pair(connected=False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(pair.b.links.event_fd)
    pair.connect()
    assert os.eventfd_read(pair.b.links.event_fd) >= 1
    pair.cut()
    wait_until(lambda: _raised(pair.b.links.event_fd), "a connection that goes down is told")


def _raised(fd: int) -> bool:
    import os

    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


def test_both_sides_may_lend_and_borrow_at_once(make_pair: MakePair) -> None:
    pair = make_pair()
    pool = pair.b.store.create_pool(pages=64)
    for index in range(40):
        pair.b.store.put(pool, index, page(index + 500_000))
    pair.put(*PAGES)
    pair.ship()
    pair.expect(PAGES)
    for index in range(40):
        assert pair.b.links.get(pool, index) == page(index + 500_000)
