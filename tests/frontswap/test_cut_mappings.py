"""A mapping that the application has cut (mlock or madvise of a part): a window may lie on both sides of a cut."""

from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Agent, Engines

MakeEngines = Callable[..., Engines]
PAGES = 256
RESIDENT = 128
TOUCHED = 40

CUT = """
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    if result: raise OSError(ctypes.get_errno(), "refused")
def pages(first, count): return ctypes.c_void_p(region.address + first * PAGE), ctypes.c_size_t(count * PAGE)
def lock(first, count):
    done(libc.mlock(*pages(first, count)))
    done(libc.munlock(*pages(first, count)))
def mappings():
    with open("/proc/self/maps") as maps:
        ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return sum(first < region.address + region.nbytes and end > region.address for first, end in ends)
def cut():
    done(libc.madvise(*pages(8, 4), mmap.MADV_SEQUENTIAL))
    assert mappings() == 3
def wrong(): return [page for page in range(len(a)) if a[page, 0] != page + 1 or a[page, 511] != page + 1]
"""

# Each asks for a whole window at once, from page 0 (or 4) on.
WAYS_IN = {
    "read": "cut(); assert a[0, 0] == 1",
    "write": "cut(); a[0, 100] = 7",
    "pin": "cut(); region.pin(a[0:48]).unpin()",
    "prefetch": "cut(); assert region.prefetch(a[0:48]) == 48 * PAGE",
    "lock": "lock(4, 8); assert mappings() == 1",
}


def filled(agent: Agent) -> None:
    agent.run("a[:] = np.arange(1, len(a) + 1, dtype=np.uint64)[:, None]; region.evict(); region.advise('sequential')")


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
def test_pages_come_in_across_a_cut(engines: MakeEngines, way: str) -> None:
    agent = engines().agent()
    agent.create(PAGES, RESIDENT)
    filled(agent)
    agent.run(CUT)
    agent.run(way)
    assert agent.ask("wrong()") == []


@pytest.mark.parametrize("way", [WAYS_IN["read"], WAYS_IN["write"], WAYS_IN["lock"]], ids=["read", "write", "lock"])
def test_what_another_process_brought_in_is_mapped_across_a_cut(engines: MakeEngines, way: str) -> None:
    served = engines()
    a, b = served.agent(), served.agent()
    a.create(PAGES, RESIDENT)
    b.attach()
    filled(a)
    b.run(CUT)
    assert a.ask(f"a[:{TOUCHED}, 0].tolist()") == list(range(1, TOUCHED + 1))
    before = served.regions["shared"].statistics()["faults_minor"]
    b.run(way)
    assert served.regions["shared"].statistics()["faults_minor"] > before
    assert b.ask("wrong()") == []
