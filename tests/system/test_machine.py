"""Random histories of stores, links and a region at once, held against the model.

Three engines in this process, linked over loopback TLS through proxies. `a` has the pools, in an arena too small for
them; `r` has a region that this process maps (where userfaultfd is permitted, else the machine runs without its
rules); `a` and `r` lend to each other, `b` lends to both. Lenders leave, restart and forget, links are cut: a page
that was only there may be lost, and which ones those are is known beforehand. Every other page comes back equal, a
lost one is said to be lost, none is ever wrong or zero. `a` has a small spill file too, and `r`, in some histories, one
that mirrors what it ships: then none of its pages may ever be lost, or wait for a link that is cut.

HYPOTHESIS_PROFILE=long runs 25 times as many histories, longer ones.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
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
    precondition,
    rule,
)

import ramster
from ramster.constants import PAGE_BYTES, SPILL_PEER
from ramster.engine.layout import SPILL_FIRST_IMAGE
from ramster.engine.links import TlsContext
from ramster.engine.spill import Spill
from ramster.errors import KernelUnsupported, PageLost, PermissionMissing, RegionLost, StoreFull
from ramster.testing import _stress, _touch
from ramster.testing.engines import SEGMENT, MappedRegion, Side, Wire, contexts
from ramster.testing.proxy import wait_until
from ramster.tmem.contract import GetMode, ObjectId
from ramster.tmem.model import Model

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
DENSE_PAGES = 40
REGION_PAGES = 96
RESIDENT = 32
A, R, B = 1, 2, 3
Key = tuple[int, ObjectId, int]

OBJECTS: list[ObjectId] = [(0, 0, 0), (1, 0, 0), (2**64 - 1,) * 3]
objects = st.sampled_from(OBJECTS)
indices = st.integers(0, DENSE_PAGES - 1)
lenders = st.sampled_from([A, R, B])
spans = st.tuples(st.integers(0, REGION_PAGES - 1), st.integers(1, 24))


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_BYTES)


def half(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_BYTES // 2) + b"\x5a" * (PAGE_BYTES // 2)


def filled(pattern: int) -> bytes:
    return pattern.to_bytes(4, "little") * (PAGE_BYTES // 4)


contents = st.one_of(
    st.builds(noise, st.integers(0, 30)), st.builds(half, st.integers(0, 30)), st.builds(filled, st.integers(0, 3))
)


def region_content(page: int, version: int) -> bytes:
    return half(page * 1000 + version) if version else bytes(PAGE_BYTES)


class World:
    """What lasts for the whole test: certificates and a loop."""

    contexts: dict[int, TlsContext]
    directory: Path
    region = True


@pytest.fixture(scope="module", autouse=True)
def world() -> Any:
    World.directory = Path(tempfile.mkdtemp(prefix="ramster-"))
    World.contexts = contexts(World.directory / "cluster", 3)
    try:
        _touch.bare_fault(np.zeros(1, np.int64), 1)
    except (KernelUnsupported, PermissionMissing):
        World.region = False
    yield
    shutil.rmtree(World.directory)


class Machine(RuleBasedStateMachine):
    pools: Bundle[int] = Bundle("pools")

    def __init__(self) -> None:
        super().__init__()
        times = {"request_deadline_ms": 1000, "give_up_ms": 2000}
        self.sides = {
            A: Side(A, World.contexts[A], 8, 8, **times),
            R: Side(R, World.contexts[R], 40, 16, **times),
            B: Side(B, World.contexts[B], 8, 24, **times),
        }
        self.a, self.r, self.b = (self.sides[n] for n in (A, R, B))
        # Too few rooms to be merged: verify() wants a store that nobody changes.
        self.spills = [Spill(self.a.links, World.directory / "a.img", SPILL_FIRST_IMAGE + 6 * SEGMENT)]
        self.mirrored = False
        self.wires = {
            frozenset(pair): Wire(self.sides[pair[0]], self.sides[pair[1]]) for pair in ((A, R), (A, B), (R, B))
        }
        self.cut: set[frozenset[int]] = set()
        self.gone = False  # b said goodbye and has not been started again
        for wire in self.wires.values():
            wire.connect()
        self.model = Model()
        self.dense: set[int] = set()
        self.lost: set[Key] = set()
        self.versions = [0] * REGION_PAGES
        self.may_be_lost: set[int] = set()
        self.mapped: MappedRegion | None = None
        self.region: ramster.Region | None = None
        if World.region:
            self.mapped = MappedRegion(self.r, REGION_PAGES, RESIDENT)
            self.region, self.view, self.region_pool = self.mapped.region, self.mapped.view, self.mapped.pool

    # --- pools of a ---------------------------------------------------------------------------------------------------

    def _create(self, pages: int | None, persistent: bool) -> int:
        pool = self.a.store.create_pool(pages=pages, persistent=persistent)
        assert pool == self.model.create_pool(pages=pages, persistent=persistent)
        (self.dense.discard if pages is None else self.dense.add)(pool)
        return pool

    def _oid(self, pool: int, oid: ObjectId) -> ObjectId:
        return (0, 0, 0) if pool in self.dense else oid

    def _peer(self, key: Key) -> int | None:
        """Which lender a's tables name for a key."""
        pool, oid, index = key
        reference = _stress.reference(self.a.store, pool, index, oid)
        return int(reference["peer"]) if reference["remote"] else None

    def _out_of_reach(self, peer: int | None, side: int) -> bool:
        return peer is not None and frozenset((side, peer)) in self.cut and not (side == R and self.mirrored)

    @initialize(target=pools, mirrored=st.booleans())
    def first(self, mirrored: bool) -> MultipleResults[int]:
        """Three full pools and a region, a part of which is away: what follows has something to go wrong with."""
        self.mirrored = mirrored
        if mirrored:
            size = SPILL_FIRST_IMAGE + 64 * SEGMENT
            self.spills.append(Spill(self.r.links, World.directory / "r.img", size, mirror=True))
        first = [self._create(DENSE_PAGES, True), self._create(None, True), self._create(None, False)]
        for pool in first:
            for index in range(DENSE_PAGES):
                self._put(pool, index, (0, 0, 0), half(pool * 100 + index))
        self.ship((A, R), True, 3)
        self.ship((A, B), True, 64)
        if self.region is not None:
            for turn, lender in enumerate((A, B)):
                self.write((turn * 40, 40), 1)
                self.region.evict()
                self.ship((R, lender), True, 64)
        return multiple(*first)

    @rule(target=pools, pages=st.sampled_from([None, DENSE_PAGES]), persistent=st.booleans())
    def create_pool(self, pages: int | None, persistent: bool) -> int:
        return self._create(pages, persistent)

    @rule(pool=consumes(pools))
    def destroy_pool(self, pool: int) -> None:
        self.a.store.destroy_pool(pool)
        self.model.destroy_pool(pool)
        self.lost = {key for key in self.lost if key[0] != pool}

    def _put(self, pool: int, index: int, oid: ObjectId, page: bytes) -> None:
        self.lost.discard((pool, oid, index))
        try:
            self.a.store.put(pool, index, page, oid)
        except StoreFull:
            self.model.refused(pool, index, oid)
        else:
            self.model.put(pool, index, page, oid)

    @rule(pool=pools, index=indices, oid=objects, page=contents)
    def put(self, pool: int, index: int, oid: ObjectId, page: bytes) -> None:
        self._put(pool, index, self._oid(pool, oid), page)

    @rule(pool=pools, first=indices, oid=objects, seed=st.integers(0, 30))
    def put_run(self, pool: int, first: int, oid: ObjectId, seed: int) -> None:
        """Overwrites what is remote, fills the arena."""
        for index in range(first, DENSE_PAGES):
            self._put(pool, index, self._oid(pool, oid), (noise if seed % 2 else half)(seed + index))

    @rule(target=pools, seed=st.integers(0, 30))
    def flood(self, seed: int) -> int:
        """More than the arena holds: some puts are refused, and leave nothing."""
        pool = self._create(None, True)
        for index in range(3 * DENSE_PAGES):
            self._put(pool, index % DENSE_PAGES, OBJECTS[index // DENSE_PAGES], noise(seed + index))
        return pool

    def _get(self, pool: int, index: int, oid: ObjectId, mode: GetMode) -> None:
        key = (pool, oid, index)
        if self._out_of_reach(self._peer(key), A):
            return  # waits for give_up; see out_of_reach_is_said
        try:
            got = self.a.links.get(pool, index, oid, mode)
        except PageLost:
            assert key in self.lost, f"{key} is said to be lost"
            return
        assert key not in self.lost or got is None, f"{key} cannot be had, and {got[:16] if got else got!r} came"
        self.lost.discard(key)
        assert self.model.observe_get(got, pool, index, oid, mode)

    @rule(pool=pools, index=indices, oid=objects, mode=st.sampled_from(list(GetMode)))
    def get(self, pool: int, index: int, oid: ObjectId, mode: GetMode) -> None:
        self._get(pool, index, self._oid(pool, oid), mode)

    @rule(pool=pools, oid=objects, step=st.integers(1, 4))
    def get_run(self, pool: int, oid: ObjectId, step: int) -> None:
        for index in range(0, DENSE_PAGES, step):
            self._get(pool, index, self._oid(pool, oid), GetMode.KEEP)

    @rule(pool=pools, first=indices, step=st.integers(1, 3), oid=objects)
    def flush_run(self, pool: int, first: int, step: int, oid: ObjectId) -> None:
        oid = self._oid(pool, oid)
        for index in range(first, DENSE_PAGES, step):
            assert self.model.observe_flush(self.a.store.flush_page(pool, index, oid), pool, index, oid)
            self.lost.discard((pool, oid, index))

    @rule(pool=pools, oid=objects)
    def flush_object(self, pool: int, oid: ObjectId) -> None:
        if pool not in self.dense:
            assert self.model.observe_flush_object(self.a.store.flush_object(pool, oid), pool, oid)
            self.lost = {key for key in self.lost if key[:2] != (pool, oid)}

    @rule(segments=st.integers(1, 8))
    def clean(self, segments: int) -> None:
        before = self.a.store.statistics()
        self.a.store.clean(segments)
        after = self.a.store.statistics()
        assert (before.pages_stored, before.live_bytes) == (after.pages_stored, after.live_bytes)

    # --- segments on their way ----------------------------------------------------------------------------------------

    @rule(way=st.sampled_from([(A, R), (A, B), (R, A), (R, B)]), seal=st.booleans(), most=st.sampled_from([1, 3, 64]))
    def ship(self, way: tuple[int, int], seal: bool, most: int) -> None:
        owner, lender = way
        side = self.sides[owner]
        if seal:
            side.store.seal_open()
        side.order(self.sides[lender], most)
        side.settle()

    @rule(seal=st.booleans(), most=st.sampled_from([1, 3, 64]))
    def spill(self, seal: bool, most: int) -> None:
        if seal:
            self.a.store.seal_open()
        for segment, generation, *_ in self.a.store.coldest(most):
            self.a.links.ship(segment, generation, SPILL_PEER)
        self.a.settle()

    @rule(pool=pools, lender=st.sampled_from([R, B]), oid=objects, first=indices, seed=st.integers(0, 30))
    def put_during_a_ship(self, pool: int, lender: int, oid: ObjectId, first: int, seed: int) -> None:
        """The lender has everything, its answers are on the way: put, flush and take out meanwhile."""
        if frozenset((A, lender)) in self.cut:
            return
        oid, proxy = self._oid(pool, oid), self.wires[frozenset((A, lender))].bulk
        self.a.store.seal_open()
        with proxy.down.held():
            self.a.order(self.sides[lender], 4)
            for index in range(first, DENSE_PAGES, 3):
                self._put(pool, index, oid, half(seed + index))
            for index in range(first + 1, DENSE_PAGES, 6):
                assert self.model.observe_flush(self.a.store.flush_page(pool, index, oid), pool, index, oid)
                self.lost.discard((pool, oid, index))
        self.a.settle()

    # --- links and lenders --------------------------------------------------------------------------------------------

    def _held_by(self, lender: int) -> tuple[set[Key], set[int]]:
        """Whose only stored copy is there: keys of a, pages of the region."""
        keys = {
            (pool, oid, index)
            for pool in self.model.pools()
            for oid, index in self.model.keys(pool)
            if self._peer((pool, oid, index)) == lender
        }
        if self.region is None:
            return keys, set()
        where = self.r.store.where
        return keys, {page for page in range(REGION_PAGES) if where(self.region_pool, page) == lender}

    def _lose(self, lender: int, owners: tuple[int, ...] = (A, R)) -> None:
        keys, pages = self._held_by(lender)
        if A in owners:
            self.lost |= keys
        if R in owners and not self.mirrored:
            self.may_be_lost |= pages

    @rule(pair=st.sampled_from([(A, R), (A, B), (R, B)]))
    def cut_links(self, pair: tuple[int, int]) -> None:
        if frozenset(pair) not in self.cut:
            self.cut.add(frozenset(pair))
            self.wires[frozenset(pair)].cut()

    @precondition(lambda self: self.cut)
    @rule()
    def connect_again(self) -> None:
        for pair in list(self.cut):
            if not (self.gone and B in pair):
                self.wires[pair].connect()
                self.cut.discard(pair)

    @rule()
    def restart_of_a_lender(self) -> None:
        """What it held is lost, and it is there again with empty hands."""
        for pair in ((A, B), (R, B)):
            self.cut_links(pair)
        self._lose(B)
        self.b.restart()
        self.gone = False
        for pair in ((A, B), (R, B)):
            self.wires[frozenset(pair)].connect()
            self.cut.discard(frozenset(pair))

    @precondition(lambda self: not self.gone and not any(B in pair for pair in self.cut))
    @rule()
    def goodbye_of_a_lender(self) -> None:
        self._lose(B)
        self.b.links.goodbye()
        for side in (self.a, self.r):
            wait_until(lambda side=side: _peer(side, B)["gone"], "goodbye is heard")  # type: ignore[misc]
        self.gone = True

    @rule(lender=lenders, owner=st.sampled_from([A, R]))
    def a_lender_forgets(self, lender: int, owner: int) -> None:
        """As after an owner's silence beyond its grace."""
        if lender != owner and not self.gone:
            self._lose(lender, (owner,))
            self.sides[lender].links.drop_foreign(owner)

    @precondition(lambda self: any(A in pair for pair in self.cut))
    @rule()
    def out_of_reach_is_said(self) -> None:
        """After give_up a get of what is beyond a cut fails at once; nothing is lost by that."""
        for lender in (R, B):
            if frozenset((A, lender)) not in self.cut:
                continue
            keys, _ = self._held_by(lender)
            for pool, oid, index in sorted(keys)[:1]:
                wait_until(lambda lender=lender: _peer(self.a, lender)["lost"], "given up")  # type: ignore[misc]
                try:
                    got = self.a.links.get(pool, index, oid)
                except PageLost:
                    continue
                assert got is None and self.model.observe_get(got, pool, index, oid)
                self.lost.discard((pool, oid, index))

    # --- the region ---------------------------------------------------------------------------------------------------

    def _touchable(self, page: int) -> bool:
        """Bring a page in; False where a touch would be SIGBUS or would wait for a link that is cut."""
        assert self.region is not None
        where = self.r.store.where(self.region_pool, page)
        if isinstance(where, int) and self._out_of_reach(where, R):
            return False
        try:
            self.region.prefetch((page * PAGE_BYTES, (page + 1) * PAGE_BYTES))
        except RegionLost as error:
            assert error.runs == [(page, 1)] and page in self.may_be_lost, f"page {page} is said to be lost"
            return False
        return True

    @precondition(lambda self: self.region is not None)
    @rule(span=spans, version=st.integers(1, 900))
    def write(self, span: tuple[int, int], version: int) -> None:
        for page in _pages(span):
            if self._touchable(page):
                self.view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = region_content(page, version)
                self.versions[page] = version
                self.may_be_lost.discard(page)

    @precondition(lambda self: self.region is not None)
    @rule(span=spans)
    def read(self, span: tuple[int, int]) -> None:
        for page in _pages(span):
            if self._touchable(page):
                found = self.view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
                assert found == region_content(page, self.versions[page]), f"page {page} of the region"

    @precondition(lambda self: self.region is not None)
    @rule(span=spans)
    def evict(self, span: tuple[int, int]) -> None:
        assert self.region is not None
        self.region.evict(_bytes(span))

    @precondition(lambda self: self.region is not None)
    @rule(first=st.integers(0, REGION_PAGES - 1), version=st.integers(1, 900))
    def pin_and_write(self, first: int, version: int) -> None:
        assert self.region is not None
        if not self._touchable(first):
            return
        with self.region.pin(_bytes((first, 1))):
            self.region.evict(None)
            self.view[first * PAGE_BYTES : (first + 1) * PAGE_BYTES] = region_content(first, version)
            self.versions[first] = version
            self.may_be_lost.discard(first)

    @precondition(lambda self: self.region is not None)
    @rule()
    def check(self) -> None:
        """Says what is known to be lost or given up, and nothing else."""
        assert self.region is not None
        try:
            self.region.check()
        except RegionLost as error:
            said = {page for first, count in error.runs for page in range(first, first + count)}
            where = self.r.store.where
            beyond = {page for page in said if self._out_of_reach(_number(where(self.region_pool, page)), R)}
            assert said - beyond <= self.may_be_lost

    @invariant()
    def stored_is_live(self) -> None:
        self.a.store.verify()

    def teardown(self) -> None:
        try:
            if self.gone:
                self.restart_of_a_lender()
            self.connect_again()
            for pool in self.model.pools():
                for oid, index in self.model.keys(pool):
                    self._get(pool, index, oid, GetMode.KEEP)
                self.a.store.destroy_pool(pool)
            if self.region is not None:
                self.read((0, REGION_PAGES))
        finally:
            if self.mapped is not None:
                self.mapped.close()
        for side in (self.a, self.r):
            side.store.seal_open()
            side.store.verify()
            statistics = side.store.statistics()
            assert (statistics.pages_stored, statistics.segments_local, statistics.pages_lost) == (0, 0, 0)
        wait_until(lambda: not any(side.lent_used() for side in self.sides.values()), "no frame is left at a lender")
        wait_until(lambda: not any(spill.statistics().bytes_used for spill in self.spills), "no room is left in use")
        for side in self.sides.values():
            side.stop()
        for spill in self.spills:
            spill.close()
        for wire in self.wires.values():
            wire.close()


def _pages(span: tuple[int, int]) -> range:
    return range(span[0], min(span[0] + span[1], REGION_PAGES))


def _bytes(span: tuple[int, int]) -> tuple[int, int]:
    pages = _pages(span)
    return pages.start * PAGE_BYTES, pages.stop * PAGE_BYTES


def _number(where: int | str) -> int | None:
    return where if isinstance(where, int) else None


def _peer(side: Side, number: int) -> dict[str, Any]:
    return next(row for row in side.links.peers() if row["number"] == number)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=750 if LONG else 30,
    stateful_step_count=100 if LONG else 50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
