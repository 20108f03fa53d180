"""A pool's id is never used again: whoever has one of a destroyed pool reaches nothing, least of all its successor."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.native.conftest import Factory, fill, noise, text, uses

from ramster.engine import layout
from ramster.engine.store import Store
from ramster.errors import PageLost, PoolGone, StoreFull, UsageError
from ramster.testing import _stress

KEY = bytes(range(32))
PLACES = 4096


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=40))
def test_no_two_pools_ever_have_the_same_id(store: Store, steps: list[int | None]) -> None:
    """None: make one; a number: destroy one of those that live. Each holds one page, which says whose it is."""
    living: list[int] = []
    ever: set[int] = set()
    for step in steps:
        if step is None or not living:
            pool = store.create_pool(pages=None if len(living) % 2 else 4)
            assert pool not in ever
            ever.add(pool)
            living.append(pool)
            store.put(pool, 0, text(pool))
        else:
            store.destroy_pool(living.pop(step % len(living)))
        assert {pool % PLACES for pool in living} <= set(range(len(ever))), "places are used again"
        assert all(store.get(pool, 0) == text(pool) for pool in living)
    for pool in ever - set(living):
        with pytest.raises(PoolGone):
            store.get(pool, 0)
    for pool in living:
        store.destroy_pool(pool)


@pytest.mark.parametrize("heirs", [4, None])
@pytest.mark.parametrize("pages", [4, None])
def test_every_use_of_a_destroyed_pool_says_so_and_leaves_its_successor_alone(
    store: Store, pages: int | None, heirs: int | None
) -> None:
    pool = store.create_pool(pages=pages)
    store.put(pool, 0, text(1))
    store.destroy_pool(pool)
    heir = store.create_pool(pages=heirs)
    assert heir % PLACES == pool % PLACES
    store.put(heir, 0, text(2))
    for call in uses(store, pool, 0, noise(1)):
        with pytest.raises(PoolGone, match=f"pool {pool} was destroyed"):
            call()
    assert (store.get(heir, 0), store.statistics().pages_stored) == (text(2), 1)


def test_all_places_are_used_again(store: Store) -> None:
    pools = [store.create_pool() for _ in range(PLACES)]
    with pytest.raises(StoreFull, match="4096"):
        store.create_pool()
    store.destroy_pool(pools[77])
    heir = store.create_pool()
    assert (heir % PLACES, heir in pools) == (77, False)
    for pool in pools:
        if pool != pools[77]:
            store.destroy_pool(pool)
    store.destroy_pool(heir)


def test_an_index_beyond_the_end_is_told_from_a_pool_that_is_gone(store: Store) -> None:
    pool = store.create_pool(pages=4)
    with pytest.raises(UsageError, match="beyond the end"):
        store.where(pool, 4)


# --- what was stored for it ---


def test_a_same_filled_page_of_a_predecessor_is_none_of_its_successor(make_store: Factory) -> None:
    store = make_store(verify=False)
    pool = store.create_pool(pages=4)
    store.put(pool, 1, fill(7))
    slot = _stress.reference(store, pool, 1)["slot"]
    store.destroy_pool(pool)
    heir = store.create_pool(pages=4)
    store.put(heir, 1, fill(7))
    assert store.get(heir, 1) == fill(7)
    _stress.overwrite_slot(store, heir, 1, int(slot))
    with pytest.raises(PageLost):
        store.get(heir, 1)
    store.close()


def test_a_sealed_page_of_a_predecessor_is_none_of_its_successor(make_store: Factory) -> None:
    """Not even with the successor's key, seal id and ordinal, which nobody but this node could seal with."""
    store = make_store(node_key=KEY)
    pool = store.create_pool(pages=4)
    store.put(pool, 1, text(1))
    store.seal_open()
    (segment, generation, *_), *_ = store.coldest(1)
    old = _stress.ship(store, segment, generation, peer=1)
    assert old is not None
    store.destroy_pool(pool)

    heir = store.create_pool(pages=4)
    store.put(heir, 1, text(2))
    store.seal_open()
    (segment, generation, *_), *_ = store.coldest(1)
    image = _stress.ship(store, segment, generation, peer=1)
    assert image is not None
    (entry,), (before,) = layout.walk_image(image), layout.walk_image(old)
    assert (entry.header.pool, before.header.pool) == (heir, pool)
    assert pool % PLACES == heir % PLACES
    seal_id = layout.decode_image_header(image).seal_id
    key = AESGCM(HKDFExpand(SHA256(), 32, layout.seal_info(seal_id)).derive(KEY))

    def sealed(header: layout.EntryHeader, plain: bytes) -> bytes:
        data = layout.seal_associated_data(seal_id, entry.ordinal, header, (0, 0, 0))
        secret = key.encrypt(layout.seal_nonce(entry.ordinal), plain, data)
        return struct.pack(layout.ENTRY_HEADER.format, *header[:6], secret[-16:]) + secret[:-16]

    data = layout.seal_associated_data(seal_id, entry.ordinal, entry.header, (0, 0, 0))
    plain = key.decrypt(layout.seal_nonce(entry.ordinal), entry.body + entry.header.check, data)
    right = sealed(entry.header, plain)
    assert _stress.unseal(store, heir, 1, right) == text(2)
    with pytest.raises(PageLost):
        _stress.unseal(store, heir, 1, sealed(entry.header._replace(pool=pool), plain))
    with pytest.raises(PageLost):
        _stress.unseal(store, heir, 1, struct.pack(layout.ENTRY_HEADER.format, *before.header) + before.body)
    altered = entry.header._replace(pool=pool)
    with pytest.raises(PageLost):
        _stress.unseal(store, heir, 1, struct.pack(layout.ENTRY_HEADER.format, *altered) + entry.body)
