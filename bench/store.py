"""put and local get of the store, native loop, beside LZ4 alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

from bench.data import half_pages, real_pages
from bench.rows import Row, compare

from ramster.engine.store import Store
from ramster.testing import _floors

MIB = 1 << 20


def _store(pages: bytes) -> Store:
    # twice the raw size: a round always finds room without cleaning, unless it is meant to clean
    return Store(2 * len(pages) + 16 * MIB, lock=True)


def bench_put(name: str, pages: bytes, rounds: int) -> Row:
    store = _store(pages)
    _, stored = _floors.lz4_compress(pages)

    def ours() -> float:
        pool = store.create_pool(pages=len(pages) // 4096)
        # the page table's memory is taken once per 2 MiB of slots, not per put: keep it out
        store.put(pool, 0, b"\1" * 4096)
        took = _floors.store_put_pages(store, pool, pages)
        store.destroy_pool(pool)
        return took

    row = compare(
        f"put, {name}",
        "ns/page",
        ours,
        "LZ4 compress",
        lambda: _floors.lz4_compress(pages)[0],
        rounds=rounds,
        note=f"{4096 / stored:.2f} : 1",
    )
    store.close()
    return row


def bench_overwrite(name: str, pages: bytes, rounds: int) -> Row:
    """Keys drawn at random in an arena a third larger than what is live: the cleaner works all the time."""
    _, stored = _floors.lz4_compress(pages)
    live = int((stored + 48) * (len(pages) // 4096))
    store = Store(max(4 * MIB, live * 4 // 3), lock=True)
    pool = store.create_pool(pages=len(pages) // 4096)
    _floors.store_put_pages(store, pool, pages)
    seeds = itertools.count(1, 1 << 20)
    row = compare(
        f"put over a put, arena 75 % live, {name}",
        "ns/page",
        lambda: _floors.store_put_pages(store, pool, pages, next(seeds)),
        "LZ4 compress",
        lambda: _floors.lz4_compress(pages)[0],
        rounds=rounds,
    )
    cleaned = store.statistics()
    store.close()
    copied = cleaned.cleaned_bytes / cleaned.bytes_compressed
    return replace(row, note=f"the cleaner copied {copied:.2f} bytes per byte put")


def bench_local_get(name: str, pages: bytes, rounds: int) -> Row:
    store = _store(pages)
    pool = store.create_pool(pages=len(pages) // 4096)
    _floors.store_put_pages(store, pool, pages)
    row = compare(
        f"local get, {name}",
        "ns/page",
        lambda: _floors.store_get_pages(store, pool, pages),
        "LZ4 decode + memcpy",
        lambda: _floors.lz4_decode_and_copy(pages),
        rounds=rounds,
    )
    store.close()
    return row


def run(quick: bool) -> list[Row]:
    count, rounds = (1024, 5) if quick else (8192, 15)
    rows = []
    for name, pages in (("files of /usr", real_pages(count)), ("synthetic 2 : 1", half_pages(count))):
        rows += [
            bench_put(name, pages, rounds),
            bench_local_get(name, pages, rounds),
            bench_overwrite(name, pages, rounds),
        ]
    return rows
