"""Random histories of a store in a tiny arena, held against the model: same answers, and stored = live throughout."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from tests.native.conftest import SEGMENT, fill, noise, text, uses

from ramster.engine.store import Store
from ramster.errors import PoolGone, StoreFull
from ramster.tmem.contract import GetMode, ObjectId
from ramster.tmem.model import Model

DENSE_PAGES = 40
objects = st.sampled_from([(0, 0, 0), (1, 0, 0), (0, 0, 1), (2**64 - 1,) * 3])
indices = st.integers(0, DENSE_PAGES - 1)
# Few distinct pages, so that an old one is often put again; each kind of entry.
contents = st.one_of(
    st.builds(noise, st.integers(0, 40)),
    st.builds(text, st.integers(0, 40), st.sampled_from([0.02, 0.5])),
    st.builds(fill, st.integers(0, 3)),
)


class StoreMachine(RuleBasedStateMachine):
    pools: Bundle[int] = Bundle("pools")
    destroyed: Bundle[int] = Bundle("destroyed")
    clean_low = 0.08

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(
            8 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=False, full_wait_ms=0, clean_low=self.clean_low
        )
        self.model = Model()
        self.dense: set[int] = set()

    def _create(self, pages: int | None, persistent: bool) -> int:
        pool = self.store.create_pool(pages=pages, persistent=persistent)
        assert pool == self.model.create_pool(pages=pages, persistent=persistent)
        (self.dense.discard if pages is None else self.dense.add)(pool)
        return pool

    def _oid(self, pool: int, oid: ObjectId) -> ObjectId:
        return (0, 0, 0) if pool in self.dense else oid

    @initialize(target=pools)
    def first_pools(self) -> MultipleResults[int]:
        return multiple(
            self._create(DENSE_PAGES, True),
            self._create(None, True),
            self._create(DENSE_PAGES, False),
            self._create(None, False),
        )

    @rule(target=pools, pages=st.sampled_from([None, DENSE_PAGES]), persistent=st.booleans())
    def create_pool(self, pages: int | None, persistent: bool) -> int:
        return self._create(pages, persistent)

    @rule(target=destroyed, pool=consumes(pools))
    def destroy_pool(self, pool: int) -> int:
        self.store.destroy_pool(pool)
        self.model.destroy_pool(pool)
        return pool

    @rule(pool=destroyed, index=indices, oid=objects, page=contents)
    def use_a_destroyed_pool(self, pool: int, index: int, oid: ObjectId, page: bytes) -> None:
        """Every call says that it is gone, whoever has its place by now."""
        for call in uses(self.store, pool, index, page, oid):
            with pytest.raises(PoolGone, match=f"pool {pool} was destroyed"):
                call()

    def _put(self, pool: int, index: int, oid: ObjectId, page: bytes) -> None:
        try:
            self.store.put(pool, index, page, oid)
        except StoreFull:
            assert page != page[:4] * 1024, "a page of one pattern needs no room"
            self.model.refused(pool, index, oid)
            old = self.model.get(pool, index, oid)
            assert self.store.get(pool, index, oid) == old, "neither the older page nor the newer one"
        else:
            self.model.put(pool, index, page, oid)

    @rule(pool=pools, index=indices, oid=objects, page=contents)
    def put(self, pool: int, index: int, oid: ObjectId, page: bytes) -> None:
        self._put(pool, index, self._oid(pool, oid), page)

    @rule(pool=pools, first=indices, oid=objects, seed=st.integers(0, 40))
    def put_run(self, pool: int, first: int, oid: ObjectId, seed: int) -> None:
        """Enough pages at once that the arena fills within a short history."""
        for index in range(first, DENSE_PAGES):
            self._put(pool, index, self._oid(pool, oid), noise(seed + index))

    @rule(pool=pools, first=indices, step=st.integers(1, 3), oid=objects, seed=st.integers(0, 40))
    def put_run_of_all_sizes(self, pool: int, first: int, step: int, oid: ObjectId, seed: int) -> None:
        """In a full arena these go into the room of dead entries: split, and joined again when neighbours die."""
        for index in range(first, DENSE_PAGES, step):
            self._put(pool, index, self._oid(pool, oid), text(seed + index, (seed + 7 * index) % 20 / 20))

    @rule(pool=pools, index=indices, oid=objects, mode=st.sampled_from(list(GetMode)))
    def get(self, pool: int, index: int, oid: ObjectId, mode: GetMode) -> None:
        oid = self._oid(pool, oid)
        got = self.store.get(pool, index, oid, mode)
        assert self.model.observe_get(got, pool, index, oid, mode)

    @rule(pool=pools, index=indices, oid=objects)
    def flush_page(self, pool: int, index: int, oid: ObjectId) -> None:
        oid = self._oid(pool, oid)
        assert self.model.observe_flush(self.store.flush_page(pool, index, oid), pool, index, oid)

    @rule(pool=pools, first=indices, step=st.integers(1, 3), oid=objects)
    def flush_run(self, pool: int, first: int, step: int, oid: ObjectId) -> None:
        oid = self._oid(pool, oid)
        for index in range(first, DENSE_PAGES, step):
            assert self.model.observe_flush(self.store.flush_page(pool, index, oid), pool, index, oid)

    @rule(pool=pools, oid=objects)
    def flush_object(self, pool: int, oid: ObjectId) -> None:
        if pool not in self.dense:
            assert self.model.observe_flush_object(self.store.flush_object(pool, oid), pool, oid)

    @rule()
    def seal_open(self) -> None:
        self.store.seal_open()

    @rule(segments=st.integers(1, 8))
    def clean(self, segments: int) -> None:
        before = self.store.statistics()
        self.store.clean(segments)
        after = self.store.statistics()
        assert (before.pages_stored, before.live_bytes) == (after.pages_stored, after.live_bytes)

    @invariant()
    def stored_is_live(self) -> None:
        self.store.verify()

    def teardown(self) -> None:
        for pool in self.model.pools():
            for oid, index in self.model.keys(pool):
                assert self.model.observe_get(self.store.get(pool, index, oid), pool, index, oid)
            self.store.destroy_pool(pool)
        self.store.verify()
        self.store.seal_open()
        statistics = self.store.statistics()
        assert (statistics.pages_stored, statistics.segments_local) == (0, 0)
        assert statistics.frames_free == statistics.frames_total
        self.store.close()


class PluggingMachine(StoreMachine):
    """Always short of frames: every put looks for the room of dead entries first."""

    clean_low = 1.0


examples = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = examples
TestPluggingMachine = PluggingMachine.TestCase
TestPluggingMachine.settings = examples
