"""Whoever still has the id of a destroyed pool never reaches the one that has its place now: a caller of the links, an
export, a region.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.links.conftest import LENDER, MakeMirrored, Pair, page

from ramster.constants import PAGE_BYTES, SPILL_PEER
from ramster.engine.region import Region
from ramster.errors import PoolGone, UsageError
from ramster.testing.nbd import ServedExport
from ramster.testing.proxy import wait_until
from ramster.wire.nbd import Command, Errno, ExtentState

PAGES = range(60)


def replace(pair: Pair, pool: int) -> int:
    """Destroy a pool and make another in its place, with pages of its own under the same indices."""
    pair.a.store.destroy_pool(pool)
    heir = pair.a.store.create_pool(pages=4096)
    assert heir % 4096 == pool % 4096
    for index in PAGES:
        pair.a.store.put(heir, index, page(500_000 + index))
    return heir


def untouched(pair: Pair, heir: int) -> bool:
    return all(pair.a.links.get(heir, index) == page(500_000 + index) for index in PAGES)


def test_a_get_says_that_the_pool_is_gone(pair: Pair) -> None:
    heir = replace(pair, pair.pool)
    with pytest.raises(PoolGone, match=f"pool {pair.pool} was destroyed"):
        pair.fetch(7, mode=1)
    assert untouched(pair, heir)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(away=st.lists(st.sampled_from([LENDER, SPILL_PEER]), min_size=2, max_size=2), turns=st.integers(1, 3))
def test_what_was_lent_or_spilled_never_becomes_a_page_of_a_successor(
    make_mirrored: MakeMirrored, away: list[int], turns: int
) -> None:
    """One pool after the other in the same place, each with its pages away: of those before nothing is left."""
    pair, spill = make_mirrored(mirror=False)
    pool = pair.pool
    for turn in range(turns):
        for index in PAGES:
            pair.a.store.put(pool, index, page(turn * 1000 + index))
        pair.a.store.seal_open()
        for n, (segment, generation, *_) in enumerate(pair.a.store.coldest(64)):
            assert pair.a.links.ship(segment, generation, away[n % 2])
        pair.settle()
        assert all(pair.a.links.get(pool, index) == page(turn * 1000 + index) for index in PAGES)
        before = pool
        pair.a.store.destroy_pool(pool)
        pool = pair.a.store.create_pool(pages=4096)
        assert pool % 4096 == before % 4096
        assert [pair.a.links.get(pool, index) for index in PAGES] == [None] * len(PAGES)
        with pytest.raises(PoolGone):
            pair.a.links.get(before, 0)
    pair.wait_for_frees(0)
    wait_until(lambda: spill.statistics().bytes_used == 0, "all rooms are free")


def test_an_export_of_a_pool_that_is_gone_reads_and_writes_nothing(pair: Pair) -> None:
    with ServedExport(pair.a.links, len(PAGES)) as export:
        client = export.connect()
        client.write(0, page(1))
        heir = replace(pair, export.pool)
        assert client.ask(Command.READ, 0, PAGE_BYTES).error == Errno.EIO
        assert client.ask(Command.WRITE, 0, PAGE_BYTES, payload=page(2)).error == Errno.EIO
        assert client.ask(Command.WRITE, PAGE_BYTES, PAGE_BYTES, payload=bytes(PAGE_BYTES)).error == Errno.EIO
        assert client.ask(Command.WRITE, 5, 10, payload=b"0123456789").error == Errno.EIO
        client.ask(Command.TRIM, 0, PAGE_BYTES * len(PAGES))
        client.ask(Command.WRITE_ZEROES, 0, PAGE_BYTES)
        client.ask(Command.CACHE, 0, PAGE_BYTES * len(PAGES))
        holes = client.ask(Command.BLOCK_STATUS, 0, PAGE_BYTES).runs
        assert all(not state & ExtentState.ZERO for _, state in holes), "what cannot be read is not said to be zeros"
        assert untouched(pair, heir)
        with pytest.raises(PoolGone, match=f"pool {export.pool} was destroyed"):
            export.server.add_export(export.pool, PAGE_BYTES, PAGE_BYTES)


def test_an_export_fits_into_its_pool(pair: Pair) -> None:
    with ServedExport(pair.a.links, len(PAGES)) as export:
        with pytest.raises(UsageError, match="60 pages"):
            export.server.add_export(export.pool, PAGE_BYTES, PAGE_BYTES * (len(PAGES) + 1))
        with pytest.raises(UsageError, match="not a dense pool"):
            export.server.add_export(pair.a.store.create_pool(), PAGE_BYTES, PAGE_BYTES)
        with pytest.raises(UsageError, match="no pool 77"):
            export.server.add_export(77, PAGE_BYTES, PAGE_BYTES)


def test_a_region_that_ends_leaves_its_pools_successor_alone(pair: Pair) -> None:
    region = Region(pair.a.links, 64, 64, name="late", full_wait_ms=100)
    pool = region.pool
    heir = replace(pair, pool)
    assert region.statistics()["lost_pages"] == 0
    region.close()
    assert untouched(pair, heir)
