"""Region.discard: what is given up reads as zeros, everywhere, and nothing is fetched, stored or kept for it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.frontswap.conftest import Agent, Engines
from tests.frontswap.test_full_regions import ACCESS, PAGES, RESIDENT

from ramster.constants import PAGE_BYTES
from ramster.frontswap.discarding import Parts, parts_of

SMALL = 48  # pages
REMOVE = """
libc = ctypes.CDLL(None)
def remove(first): libc.madvise(ctypes.c_void_p(region.address + first * PAGE), ctypes.c_size_t(PAGE), mmap.MADV_REMOVE)
"""


@pytest.mark.parametrize(
    ("start", "stop", "pages", "edges"),
    [
        (0, 0, range(0), ()),
        (5, 5, range(1, 1), ()),
        (0, 4096, range(1), ()),
        (0, 4095, range(0), ((0, 4095),)),
        (1, 4096, range(1, 1), ((1, 4096),)),
        (100, 200, range(1, 1), ((100, 200),)),
        (100, 4196, range(1, 1), ((100, 4096), (4096, 4196))),
        (4096, 12288, range(1, 3), ()),
        (4095, 12289, range(1, 3), ((4095, 4096), (12288, 12289))),
    ],
)
def test_how_a_range_falls_apart(start: int, stop: int, pages: range, edges: tuple[tuple[int, int], ...]) -> None:
    assert parts_of(start, stop) == Parts(pages, edges)


@given(st.integers(0, 40000), st.integers(0, 40000))
def test_its_parts_are_the_range(start: int, length: int) -> None:
    parts = parts_of(start, start + length)
    spans = [(page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in parts.pages]
    found = sorted([*spans, *parts.edges])
    assert sum(stop - low for low, stop in found) == length
    at = start
    for low, stop in found:
        assert low == at and low < stop and low // PAGE_BYTES == (stop - 1) // PAGE_BYTES
        at = stop


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    engines = Engines(tmp_path_factory.mktemp("d"))
    yield engines.agent()
    engines.close()


BYTES = SMALL * PAGE_BYTES
SPAN = st.tuples(st.integers(0, BYTES), st.integers(0, BYTES)).map(sorted)
PAGE_SPAN = st.tuples(st.integers(0, SMALL), st.integers(0, SMALL)).map(lambda s: [n * PAGE_BYTES for n in sorted(s)])
STEP = st.one_of(
    st.tuples(st.just("write"), SPAN, st.integers(0, 255)),
    st.tuples(st.sampled_from(["discard", "discard", "read", "evict", "prefetch", "pin", "unpin"]), PAGE_SPAN | SPAN),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.lists(STEP, max_size=25))
def test_any_use_of_it_beside_a_twin(agent: Agent, steps: list[Any]) -> None:
    agent.run(
        """
        region = client.region(48 * PAGE, resident=32 * PAGE)
        a = region.array(48 * PAGE, "u1")
        twin, pins = np.zeros_like(a), []
        """
    )
    agent.run(
        f"""
        for what, (start, stop), *rest in {steps!r}:
            if what == "write": a[start:stop] = twin[start:stop] = rest[0]
            elif what == "discard":
                whole = max(0, stop // PAGE - -(-start // PAGE)) * PAGE
                assert region.discard(a[start:stop]) == whole
                twin[start:stop] = 0
            elif what == "read": assert (a[start:stop] == twin[start:stop]).all(), (start, stop)
            elif what == "pin":
                stop = min(stop, start + 4 * PAGE)
                if len(pins) < 3: pins.append(region.pin(a[start:stop]))
            elif what == "unpin": pins and pins.pop().unpin()
            else: getattr(region, what)(a[start:stop])
        assert (a == twin).all()
        assert region.statistics().lost_pages == 0
        while pins: pins.pop().unpin()
        """
    )
    agent.run("region.discard()")
    assert agent.ask("region.statistics().resident_pages + region.statistics().local_pages") == 0
    agent.run("assert not a.any(); del a; region.close()")


def test_a_full_region_is_emptied(directory: Path) -> None:
    """No page of it needs room, and what has room then takes what was refused."""
    engines = Engines(directory, 8 << 20, full_wait_ms=3000)
    try:
        agent = engines.agent()
        agent.create(PAGES, RESIDENT)
        agent.run(ACCESS)
        refused = agent.ask(f"fill(0, {PAGES})")
        assert 1000 < refused < PAGES
        began = time.monotonic()
        assert agent.ask(f"region.discard(a[:{refused // 2}])") == refused // 2 * PAGE_BYTES
        assert time.monotonic() - began < 3.0, "waits for no put"
        assert agent.ask(f"wrong(range({refused // 2}, {refused}))") == []
        assert agent.ask(f"write({refused})") == 0
        assert agent.ask(f"a[:{refused // 2}].any()") == "False"
        again = refused * 3 // 8  # what is left over in segments differs
        assert agent.ask(f"fill(0, {again})") == again
        assert agent.ask(f"wrong([*range({again}), *range({refused // 2}, {refused + 1})])") == []
        agent.run("region.discard()")
        assert engines.store.statistics().pages_stored == 0
        assert agent.ask("region.statistics().resident_pages") == 0
    finally:
        engines.close()


def test_zeros_leave_a_full_region(directory: Path) -> None:
    """A page of one word needs no room in the store: it leaves also beside pages that cannot."""
    engines = Engines(directory, 8 << 20, full_wait_ms=100)
    try:
        agent = engines.agent()
        agent.create(PAGES, RESIDENT)
        agent.run(ACCESS)
        refused = agent.ask(f"fill(0, {PAGES})")
        dirty = agent.ask(f"region.prefetch(a[{refused - 32}:{refused}]) and list(range({refused - 32}, {refused}))")
        assert len(dirty) == 32
        # In RAM and dirty already: writing zeros to every second one needs nothing.
        agent.run("os.ftruncate(source, 2 * PAGE)")
        zeroed = agent.ask(f"[page for page in {dirty} if page % 2 and os.preadv(source, [a[page]], PAGE) == PAGE]")
        assert len(zeroed) == 16
        error, text = agent.ask(f"region.evict(a[{refused - 32}:{refused}])")
        assert error == "region-full"
        assert int(text.split("more pages: ")[1].split(" ")[0]) >= len(zeroed)
    finally:
        engines.close()


def test_refused_writes_leave_pages_that_are_read_again(directory: Path) -> None:
    """Though there still is no room: the stored page was good all the time."""
    engines = Engines(directory, 8 << 20, full_wait_ms=300)
    try:
        agent = engines.agent()
        agent.create(PAGES, RESIDENT)
        if not agent.ask("bool(region.features >> 14 & 1)"):
            pytest.skip("needs UFFDIO_POISON")
        agent.run(ACCESS)
        refused = agent.ask(f"fill(0, {PAGES})")
        overwritten = agent.ask(f"[page for page in range(0, {refused} - {RESIDENT}, 5) if write(page, 1)]")
        assert len(overwritten) > 100
        agent.run(f"until(lambda: not wrong({overwritten}))")
        assert agent.ask("region.statistics().full") is True
        assert agent.ask(f"wrong([page for page in range({refused}) if page % 5])") == []
        assert agent.ask("region.statistics().resident_pages") <= RESIDENT + 128
        assert agent.ask(f"write({overwritten[0]}, 1)") != 0
    finally:
        engines.close()


@pytest.mark.parametrize("poison", ["auto", "guard"])
def test_a_lost_page(engines: Callable[..., Engines], poison: str) -> None:
    made = engines(poison=poison)
    agent = made.agent()
    agent.create(64, 48)
    other = made.agent()
    other.attach()
    agent.run(REMOVE + "a[:] = 5")
    agent.run("a[10:14] = 6; remove(10); remove(12)")
    for each in (agent, other):
        assert each.ask("errno_of(10)") != 0
    answer = agent.ask("region.discard(a[8:16])")
    if poison == "auto":
        assert answer == 8 * PAGE_BYTES
        assert other.ask("a[8:16].any()") == agent.ask("a[8:16].any()") == "False"
        agent.run("a[10] = 7; region.evict()")
        assert other.ask("int(a[10].sum())") == 7 * 512
        assert agent.ask("region.check()") is None
        assert agent.ask("region.statistics().lost_pages") == 0
        assert next(iter(made.service.troubles().values()))[2:] == (0, 0, 1, False)
    else:
        assert answer[0] == "region-lost" and "stay lost" in answer[1]
        assert agent.ask("errno_of(10)") != 0
        assert agent.ask("a[[8, 9, 11, 13, 14, 15]].any()") == "False"


def test_pinned_pages_stay_in_place(engines: Callable[..., Engines]) -> None:
    agent = engines().agent()
    agent.create(64, 48)
    agent.run("a[:] = 5; pin = region.pin(a[4:8])")
    assert agent.ask("region.discard(a[:16])") == 16 * PAGE_BYTES
    assert agent.ask("region.statistics().resident_pages") >= 4
    faults = agent.ask("region.statistics().faults")
    agent.run("a[4:8] = 9")
    assert agent.ask("region.statistics().faults") == faults, "mapped and writable all the time"
    assert agent.ask("int(a[:16].sum())") == 4 * 512 * 9
    agent.run("pin.unpin(); region.evict()")
    assert agent.ask("int(a.sum())") == 4 * 512 * 9 + 48 * 512 * 5


def test_others_touch_it_meanwhile(engines: Callable[..., Engines]) -> None:
    """Each page reads as one of its contents or as zeros, never as a mixture, and every touch ends."""
    made = engines(fault_threads=2, evictor_threads=2)
    agent, other = made.agent(), made.agent()
    agent.create(64, 24)
    other.attach()
    other.run(
        """
        stop, bad = False, []
        def read():
            random = np.random.default_rng(1)
            while not stop:
                page = int(random.integers(64))
                seen = set(a[page, ::64].tolist()) - {0}
                if not seen <= {page + 1}: bad.append((page, seen))
        threads = [threading.Thread(target=read) for _ in range(2)]
        [thread.start() for thread in threads]
        """
    )
    agent.run(
        """
        random = np.random.default_rng(2)
        for turn in range(400):
            first = int(random.integers(60))
            for page in range(first, first + 4): a[page] = page + 1
            low = int(random.integers(56))
            region.discard(a[low:low + 8])
            assert turn % 20 or not a[low:low + 8].any()
        """
    )
    other.run("stop = True; [thread.join() for thread in threads]")
    assert other.ask("bad") == []


def test_what_is_not_contiguous_is_refused(engines: Callable[..., Engines]) -> None:
    agent = engines().agent()
    agent.create(16, 16)
    agent.run("a[:] = 5")
    for wrong in ("a[:, :256]", "a[::2]", "slice(0, 8192, 2)", "(4096, 99999999)", "5", "np.zeros(4)"):
        assert agent.ask(f"region.discard({wrong})")[0] == "usage", wrong
    assert agent.ask("(a == 5).all()") == "True"
    assert agent.ask("region.discard(a[3:5].T)") == 2 * PAGE_BYTES
    assert agent.ask("region.discard(a[0, :10])") == 0
    assert agent.ask("int(a.sum())") == 5 * (14 * 512 - 10)
