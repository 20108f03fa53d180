"""An application that puts pages into its region's file (fallocate, write): what was away stays as it was, or fails."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.frontswap.conftest import Agent, Engines

from ramster.testing.proxy import wait_until

PAGES = 128
RESIDENT = 64

FILE = """
import errno, re
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
file = next(int(fd) for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}") and "memfd:ramster-region" in os.readlink(f"/proc/self/fd/{fd}"))
def fallocate(first, count=1, mode=0):
    if libc.fallocate(file, mode, first * PAGE, count * PAGE): raise OSError(ctypes.get_errno(), "fallocate")
def look(first, count=1):
    "Through another mapping, which fills holes."
    with mmap.mmap(file, count * PAGE, offset=first * PAGE, prot=mmap.PROT_READ) as view: return any(view[:])
def content(page): return page * 1000 + 1
def wrong(pages): return [page for page in pages if a[page, 0] != content(page) or a[page, 511] != page]
a[:, 0] = np.arange(len(a)) * 1000 + 1
a[:, 511] = np.arange(len(a))
region.evict()
assert region.statistics().resident_pages == 0
"""


def ready(engines: Engines) -> Agent:
    agent = engines.agent()
    agent.create(PAGES, RESIDENT)
    if agent.ask("region.user_mode_only"):
        pytest.skip("needs faults of the kernel")
    agent.run(FILE)
    return agent


@pytest.fixture(params=["auto", "guard"])
def agent(request: pytest.FixtureRequest, directory: Path) -> Iterator[Agent]:
    engines = Engines(directory, poison=request.param)
    yield ready(engines)
    engines.close()


WAYS_IN = {
    "touch": "int(a[9, 0]); a[9, 511].item()",
    "prefetch": "region.prefetch(a[0:48])",
    "pin": "region.pin(a[0:48]).unpin()",
    "read ahead": "region.advise('sequential'); [a[page, 0].item() for page in range(0, 16)]",
    "write": "a[0:48, 100] = 7",
    "scattered write": "a[40, 100] = a[9, 100] = a[3, 100] = 7",
    "system call": "[errno_of(page) for page in range(48)]",
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("fill", ["fallocate(0, 128)", "look(0, 128)", "fallocate(9)"])
def test_what_was_away_comes_in_as_it_was(agent: Agent, way: str, fill: str) -> None:
    agent.run(fill)
    agent.run(WAYS_IN[way])
    assert agent.ask("wrong(range(48))") == []
    # And leaves as it was.
    agent.run("region.evict()")
    assert agent.ask("wrong(range(len(a)))") == []
    agent.run(fill + "; a[:, 5] = 3; region.evict(); " + fill)
    assert agent.ask("wrong(range(len(a)))") == []
    assert agent.ask("int(a[:, 5].sum())") == 3 * PAGES
    statistics = agent.ask("vars(region.statistics())")
    assert statistics["lost_pages"] == 0 and statistics["resident_pages"] <= RESIDENT + 1


def test_pages_that_are_in_ram_and_pages_never_touched_stay_what_they_are(agent: Agent) -> None:
    agent.run(
        "other = client.region(64 * PAGE, resident=32 * PAGE, name='other'); b = other.array((64, 512), np.uint64)"
    )
    agent.run("region.prefetch(a[:32]); a[:16, 7] = 5; fallocate(0, 128)")
    assert agent.ask("wrong(range(len(a)))") == []
    assert agent.ask("int(a[:16, 7].sum())") == 5 * 16
    assert agent.ask("int(b.sum())") == 0


def test_a_page_that_was_removed_and_then_allocated_is_lost(agent: Agent) -> None:
    """Its only copy was in RAM: what fallocate puts there must not pass for it."""
    agent.run("a[:8, 7] = 5")
    agent.run("fallocate(2, 2, 3); fallocate(2, 2)")  # a hole, then empty pages in it
    assert agent.ask("errno_of(2)") != 0
    agent.run("region.evict()")
    assert agent.ask("errno_of(3)") != 0
    assert agent.ask("wrong([0, 1, *range(4, len(a))])") == []
    assert agent.ask("region.statistics().lost_pages") == 2


def test_bytes_written_to_the_file_of_a_page_that_is_away_are_no_page(agent: Agent) -> None:
    """Neither what was written, beside zeros, nor what is stored is the page: it fails, and says so."""
    agent.run("os.pwrite(file, b'mine', 5 * PAGE + 64)")
    assert agent.ask("region.prefetch(a[4])") == 4096
    assert agent.ask("errno_of(5)") != 0
    assert agent.ask("region.prefetch(a[5])")[0] == "region-lost"
    assert agent.ask("region.check(a[5])")[0] == "region-lost"
    assert agent.ask("wrong([page for page in range(len(a)) if page != 5])") == []
    agent.run("region.evict(); os.pwrite(file, b'mine', 7 * PAGE + 64)")
    agent.send("int(a[7, 0])")
    with pytest.raises(EOFError, match="wrote over page"):
        agent.answer()
    assert agent.process.returncode == -signal.SIGBUS


def test_a_lost_page_does_not_read_as_what_was_allocated_there(agent: Agent) -> None:
    agent.run("a[:8, 7] = 5; fallocate(2, 1, 3)")
    assert agent.ask("errno_of(2)") != 0
    agent.run("fallocate(0, 8)")
    assert agent.ask("errno_of(2)") != 0
    assert agent.ask("region.check(a[2])")[0] == "region-lost"


@pytest.mark.parametrize("threads", [1, 3])
def test_several_processes(engines: Callable[..., Engines], threads: int) -> None:
    both = engines(fault_threads=threads, evictor_threads=threads)
    one = ready(both)
    two = both.agent()
    two.attach()
    two.run(FILE.split("a[:, 0]")[0])
    two.run("fallocate(0, 128)")
    assert one.ask("wrong(range(48))") == []
    assert two.ask("wrong(range(len(a)))") == []
    one.run("a[:32, 9] = 1; region.evict(); fallocate(0, 128); region.prefetch(a[:40])")
    assert two.ask("wrong(range(len(a)))") == []
    assert two.ask("int(a[:, 9].sum())") == 32
    # A hole, and empty pages in it, where the other one would map what is in RAM together.
    one.run("region.evict(); region.prefetch(a[:32]); fallocate(8, 4, 3); fallocate(8, 4)")
    assert two.ask("wrong(range(32))") == []


@pytest.mark.parametrize("threads", [1, 2])
def test_allocating_all_the_time(engines: Callable[..., Engines], threads: int) -> None:
    """While pages come in, are written and leave: every read is right, and every one of them ends."""
    agent = ready(engines(fault_threads=threads, evictor_threads=threads))
    agent.run(
        """
        stop = False
        def disturb():
            random = np.random.default_rng(1)
            while not stop:
                page = int(random.integers(len(a)))
                fallocate(page, min(8, len(a) - page))
        disturber = threading.Thread(target=disturb)
        disturber.start()
        random = np.random.default_rng(2)
        counts = np.zeros(len(a), np.uint64)
        bad = []
        for turn in range(1500):
            page = int(random.integers(len(a)))
            if wrong([page]) or a[page, 9] != counts[page]: bad.append(page)
            if turn % 3 == 0:
                a[page, 9] += 1
                counts[page] += 1
            if turn % 100 == 0: region.evict()
        stop = True
        disturber.join()
        """
    )
    assert agent.ask("bad") == []
    assert agent.ask("wrong(range(len(a)))") == [] and agent.ask("(a[:, 9] == counts).all()") == "True"


def test_the_node_is_gone(engines: Callable[..., Engines]) -> None:
    """The guardian does not take an empty page for one that is in RAM."""
    both = engines()
    agent = ready(both)
    agent.run("region.prefetch(a[:4]); fallocate(0, 128)")
    both._run(both.service.close())
    wait_until(lambda: agent.ask("errno_of(9)") != 0, "the guardian answers")
    assert agent.ask("wrong(range(4))") == []
