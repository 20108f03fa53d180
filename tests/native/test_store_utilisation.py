"""A nearly full arena under overwrites: how much of it is live, and how many bytes the cleaner copies per byte put."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from ramster.engine.store import Store

MIB = 1 << 20
ARENA = 64 * MIB
VOLUMES = 3


def page_of(seed: int, share: float) -> bytes:
    """About `share` of it is left after compression; words repeat, as in data of programs."""
    chosen = random.Random(seed)
    fresh = int(4096 * share)
    words = [chosen.randbytes(8) for _ in range(8)]
    return chosen.randbytes(fresh) + b"".join(chosen.choices(words, k=512))[: 4096 - fresh]


def mixed(seed: int, count: int, low: float = 0.02, high: float = 0.85, raw: float = 0.1) -> list[bytes]:
    """Pages of all sizes, most of them around the middle, and some that do not compress."""
    chosen = random.Random(seed)
    shares = [1.0 if chosen.random() < raw else low + (high - low) * chosen.betavariate(2.5, 2.5) for _ in range(count)]
    return [page_of(seed * count + n, share) for n, share in enumerate(shares)]


@dataclass
class Filled:
    """A store of one pool, what each key holds, and the counters when overwriting began."""

    store: Store
    pool: int
    held: list[bytes | None]

    def put(self, key: int, page: bytes) -> None:
        self.store.put(self.pool, key, page)
        self.held[key] = page

    def trim(self, live: float, draw: Callable[[], int]) -> None:
        """Flush keys drawn until no more than this share of the arena is live."""
        while self.live_share() > live:
            for _ in range(32):
                key = draw()
                self.store.flush_page(self.pool, key)
                self.held[key] = None

    def live_share(self) -> float:
        statistics = self.store.statistics()
        return statistics.live_bytes / statistics.arena_bytes

    def check(self) -> None:
        self.store.verify()
        assert all(self.store.get(self.pool, key) == page for key, page in enumerate(self.held))
        assert self.store.statistics().puts_refused == 0


def filled(live: float, pages: Iterator[bytes]) -> Filled:
    store = Store(ARENA, lock=False, full_wait_ms=20000)
    made = Filled(store, store.create_pool(pages=1 << 20), [])
    while len(made.held) % 64 or made.live_share() < live:
        made.held.append(None)
        made.put(len(made.held) - 1, next(pages))
    return made


def overwrite(made: Filled, draw: Callable[[], int], pages: Iterator[bytes], volumes: float) -> float:
    """Put `volumes` arenas of stored bytes over what is there; returns the write amplification."""
    before = made.store.statistics()
    stored = 0
    while stored < volumes * ARENA:
        for _ in range(256):
            made.put(draw(), next(pages))
        now = made.store.statistics()
        stored = now.bytes_compressed - before.bytes_compressed + 40 * (now.puts - before.puts)  # without padding
    return 1 + (now.cleaned_bytes - before.cleaned_bytes) / stored


def zipf(keys: int, seed: int, exponent: float = 1.0) -> Callable[[], int]:
    chosen = random.Random(seed)
    order = list(range(keys))
    chosen.shuffle(order)
    weights = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(keys)))
    return lambda: order[bisect.bisect(weights, chosen.random() * weights[-1])]


@pytest.mark.parametrize("pattern", ["uniform", "zipf"])
def test_nine_tenths_live_at_a_write_amplification_of_two(pattern: str) -> None:
    pages = itertools.cycle(mixed(1, 3001))
    made = filled(0.91, pages)
    uniform = random.Random(2)
    keys = len(made.held)
    draw = zipf(keys, 3) if pattern == "zipf" else lambda: uniform.randrange(keys)
    amplification = overwrite(made, draw, pages, VOLUMES)
    assert made.live_share() >= 0.9
    assert amplification <= 2
    assert made.store.statistics().puts_plugged > 0
    made.check()
    made.store.close()


def test_pages_that_grow_and_shrink_end_in_cleaning_not_in_refusal() -> None:
    """The room that small pages leave fits no large one: it has to be gathered by copying, and is."""
    pages = itertools.cycle(mixed(4, 2000, 0.02, 0.25, raw=0))
    made = filled(0.91, pages)
    chosen = random.Random(5)

    def draw() -> int:
        return chosen.randrange(len(made.held))

    copied = []
    for high in (0.4, 0.6, 0.85, 0.5, 0.25):
        pages = itertools.cycle(mixed(6 + int(100 * high), 1000, high / 2, high, raw=0.1 if high > 0.8 else 0))
        copied.append(0.0)
        for _ in range(12):
            made.trim(0.88, draw)
            copied[-1] += (overwrite(made, draw, pages, 0.02) - 1) / 12
        while made.live_share() < 0.88:
            made.put(draw(), next(pages))
    made.check()
    assert max(copied) < 8, "no worse than cleaning alone at nine tenths"
    assert copied[-1] < 1, "small pages find room where large ones were"
    made.store.close()


def test_small_pages_make_way_for_large_ones() -> None:
    """Every second small page flushed: half the arena is free in pieces of which none takes a raw page."""
    small = itertools.cycle(mixed(7, 2000, 0.05, 0.2, raw=0))
    large = itertools.cycle(mixed(8, 500, raw=1.0))
    made = filled(0.91, small)
    for key in range(0, len(made.held), 2):
        made.store.flush_page(made.pool, key)
        made.held[key] = None
    key = 0
    while made.live_share() < 0.9:
        made.put(key, next(large))
        key += 2
    assert made.store.statistics().cleaned_segments > 100
    made.check()
    made.store.close()
