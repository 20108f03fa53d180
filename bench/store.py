"""put and local get of the store, native loop, beside LZ4 alone."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def bench_overwrite(name: str, pages: bytes, rounds: int, share: float) -> Row:
    """Keys drawn at random in an arena of which `share` is live: every put needs room that another page left."""
    pages *= max(1, 8192 * 4096 // len(pages))  # in a small arena two free segments would be a large share
    _, stored = _floors.lz4_compress(pages)
    live = int((stored + 44) * (len(pages) // 4096))
    store = Store(max(4 * MIB, int(live / share)), lock=True)
    pool = store.create_pool(pages=len(pages) // 4096)
    _floors.store_put_pages(store, pool, pages)
    seeds = itertools.count(1, 1 << 20)
    before = store.statistics()
    row = compare(
        f"put over a put, arena {100 * share:.0f} % live, {name}",
        "ns/page",
        lambda: _floors.store_put_pages(store, pool, pages, next(seeds)),
        "LZ4 compress",
        lambda: _floors.lz4_compress(pages)[0],
        rounds=rounds,
    )
    end = store.statistics()
    store.close()
    put = end.bytes_compressed + 40 * end.puts - before.bytes_compressed - 40 * before.puts
    amplification = 1 + (end.cleaned_bytes - before.cleaned_bytes) / put
    live_share = end.live_bytes / end.arena_bytes
    return replace(row, note=f"write amplification {amplification:.2f}, {100 * live_share:.0f} % live at the end")


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


def bench_incompressible(count: int, rounds: int) -> Row:
    pages = random.Random(1).randbytes(count * 4096)
    store = _store(pages)
    pool = store.create_pool(pages=count)
    row = compare(
        "put, random bytes",
        "ns/page",
        lambda: _floors.store_put_pages(store, pool, pages),
        "memcpy + CRC32C",
        lambda: _floors.copy_and_checksum(pages),
        rounds=rounds,
    )
    statistics = store.statistics()
    store.close()
    return replace(row, note=f"LZ4 not tried with {100 * statistics.puts_untried / statistics.puts:.0f} %")


def bench_threads(what: str, pages: bytes, threads: int, rounds: int) -> Row:
    """Wall time per page of so many threads at once, each with a pool of its own in one store; native loops."""
    store = _store(pages * threads)
    pools = [store.create_pool(pages=len(pages) // 4096) for _ in range(threads)]
    for pool in pools:
        _floors.store_put_pages(store, pool, pages)
    count = threads * (len(pages) // 4096)
    with ThreadPoolExecutor(threads) as executor:

        def at_once(each: Callable[[int], float]) -> float:
            begin = time.perf_counter_ns()
            list(executor.map(each, pools))
            return (time.perf_counter_ns() - begin) / count

        if what == "put":
            row = compare(
                f"put, {threads} threads",
                "ns/page",
                lambda: at_once(lambda pool: _floors.store_put_pages(store, pool, pages)),
                f"LZ4 compress, {threads} threads",
                lambda: at_once(lambda _: _floors.lz4_compress(pages)[0]),
                rounds=rounds,
            )
        else:
            row = compare(
                f"local get, {threads} threads",
                "ns/page",
                lambda: at_once(lambda pool: _floors.store_get_pages(store, pool, pages)),
                f"LZ4 decode + memcpy, {threads} threads",
                lambda: at_once(lambda _: _floors.lz4_decode_and_copy(pages)),
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
            bench_overwrite(name, pages, rounds, 0.75),
            bench_overwrite(name, pages, rounds, 0.9),
        ]
    rows.append(bench_incompressible(count, rounds))
    rows += [
        bench_threads(what, half_pages(count), threads, rounds) for what in ("put", "get") for threads in (1, 2, 4)
    ]
    return rows
