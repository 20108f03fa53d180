"""Many threads, several regions at once, and a region that is far larger than the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.frontswap.conftest import Engines

MakeEngines = Callable[..., Engines]
PAGE = 4096


@pytest.mark.parametrize("fault_threads", [1, 4])
def test_sixteen_threads_in_three_regions(engines: MakeEngines, fault_threads: int) -> None:
    """Every touch reads the page that it asked for, and every page is counted once."""
    served = engines(fault_threads=fault_threads, evictor_threads=2)
    agent = served.agent()
    agent.run("""
        PAGES = 2000
        regions = [client.region(PAGES * PAGE, resident=250 * PAGE, name=f"region {n}") for n in range(3)]
        arrays = [region.array((PAGES, 512), np.uint64) for region in regions]
        for n, each in enumerate(arrays):
            each[:] = (np.arange(PAGES, dtype=np.uint64) + np.uint64(n << 32))[:, None]
        wrong, touched = [], [0] * 16
        def work(thread):
            rng = np.random.default_rng(thread)
            for turn in range(6):
                n = int(rng.integers(3))
                order = rng.integers(PAGES, size=400) if turn % 2 else np.arange(400) + int(rng.integers(PAGES - 400))
                touch = write_pages if rng.random() < 0.3 else read_pages
                memory = arrays[n].reshape(-1).view(np.uint8)
                _, words = touch(memory, order.astype(np.int64))
                touched[thread] += len(words)
                if (words != order.astype(np.uint64) + np.uint64(n << 32)).any(): wrong.append((thread, n))
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not wrong and sum(touched) == 16 * 6 * 400, (wrong, touched)
        for n, each in enumerate(arrays):
            assert (each == (np.arange(PAGES, dtype=np.uint64) + np.uint64(n << 32))[:, None]).all()
        for region in regions: region.evict()
    """)
    for region in served.regions.values():
        counters = region.statistics()
        assert counters["pages"] == counters["local_pages"] + counters["resident_pages"] == 2000
        assert counters["lost_pages"] == counters["refused"] == counters["never_touched_pages"] == 0
        assert counters["faults"] >= counters["faults_local"] + counters["faults_zero"] > 0
        assert counters["evictions"] > 2000 - 250


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_a_hundred_gibibytes_of_address_space(engines: MakeEngines) -> None:
    """Costs what is touched: memory of the node, statistics, closing."""
    served = engines()
    pages = (100 << 30) // PAGE
    before = resident_bytes()
    agent = served.agent()
    agent.create(pages, 256, "far")
    agent.run(f"""
        starts = np.linspace(0, {pages} - 100, 11).astype(np.int64)       # the last ones are the region's last
        spots = (starts[:, None] + np.arange(100)).ravel()
        for page in spots: a[page] = page + 1
    """)
    region = served.regions["far"]
    began = time.monotonic()
    counters = region.statistics()
    took = time.monotonic() - began
    assert took < 5, "the statistics of a region that is all but empty"
    assert counters["never_touched_pages"] + counters["resident_pages"] + counters["local_pages"] == pages
    assert counters["resident_pages"] <= 256 and counters["local_pages"] >= 1000 - 256
    agent.run("for page in spots: region.evict(a[page])")
    agent.run("for page in spots: assert (a[page] == page + 1).all(), page")
    # States take a byte per page of what was touched, and slots 2 MiB per GiB of it; a sanitizer adds its own.
    sanitized = "san" in os.environ.get("LD_PRELOAD", "")
    assert resident_bytes() - before < (256 << 20 if sanitized else 64 << 20)
    began = time.monotonic()
    agent.run("del a; region.close()")
    assert time.monotonic() - began < 5, "closing it"
    assert served.store.statistics().pages_stored == 0


def test_statistics_of_a_large_region_hold_nobody_up(engines: MakeEngines) -> None:
    """They are taken over and over while threads fault."""
    served = engines()
    agent = served.agent()
    agent.create(1 << 20, 256, "large")
    agent.run("""
        spots = np.arange(0, 1 << 20, 1 << 9, dtype=np.int64)
        memory = a.reshape(-1).view(np.uint8)
        for page in spots: a[page, 0] = page
    """)
    agent.send("int(sum(read_pages(memory, spots)[1].sum() for _ in range(3)))")
    region = served.regions["large"]
    seen = {region.statistics()["evictions"] for _ in range(3000)}
    assert len(seen) > 1, "faults went on meanwhile"
    assert agent.answer() == 3 * sum(range(0, 1 << 20, 1 << 9))
