"""A region whose node has no room: reads go on, writes are refused quickly, nothing is lost by it, and room ends it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontswap.conftest import Agent, Engines

FULL_WAIT_S = 3.0
ARENA = 8 << 20  # 2,000 pages that do not compress, about
PAGES = 4000
RESIDENT = 256
SPARE = 64 + 64  # pages beyond the budget: of reads while it is full, and of minor faults

# Page by page, and a refusal is an error number instead of SIGBUS.
ACCESS = """
import errno
source = os.memfd_create("source")
def content(page, version=0):
    return np.random.default_rng([page, version]).bytes(PAGE)
def write(page, version=0):
    os.pwrite(source, content(page, version), 0)
    try: os.preadv(source, [a[page]], 0)
    except OSError as error: return error.errno
    return 0
def fill(first, last):
    "The first page that is refused."
    return next((page for page in range(first, last) if write(page)), last)
def wrong(pages):
    sink = os.memfd_create("sink")
    try:
        found = []
        for page in pages:
            try: os.pwrite(sink, a[page], 0)
            except OSError as error: found.append((page, error.errno))
            else:
                if os.pread(sink, PAGE, 0) != content(page): found.append((page, 0))
        return found
    finally: os.close(sink)
"""


@pytest.fixture
def engines(directory: Path) -> Iterator[Engines]:
    made = Engines(directory, ARENA, full_wait_ms=int(FULL_WAIT_S * 1000))
    yield made
    made.close()


@pytest.fixture
def full(engines: Engines) -> tuple[Agent, int]:
    """A process with a full region, and the first page that was refused."""
    agent = engines.agent()
    agent.create(PAGES, RESIDENT)
    if agent.ask("region.user_mode_only"):
        pytest.skip("needs faults of the kernel")
    agent.run(ACCESS)
    refused = agent.ask(f"fill(0, {PAGES})")
    assert 1000 < refused < PAGES and agent.ask("region.statistics().full") is True
    return agent, refused


def test_reads_of_a_full_region_do_not_wait_for_a_put(full: tuple[Agent, int]) -> None:
    agent, refused = full
    began = time.monotonic()
    for _ in range(2):
        assert agent.ask(f"wrong(range({refused}))") == []
    # Each page that would wait takes full_wait.
    assert time.monotonic() - began < 10 * FULL_WAIT_S
    assert agent.ask("region.statistics().resident_pages") <= RESIDENT + SPARE
    assert agent.ask("region.statistics().lost_pages") <= 1


def test_writes_to_a_full_region_are_refused_quickly_after_the_first(full: tuple[Agent, int]) -> None:
    agent, refused = full
    began = time.monotonic()
    errors = agent.ask(f"[write(page) for page in range({refused} + 1, {refused} + 41)]")
    assert sum(error != 0 for error in errors) > 30
    assert time.monotonic() - began < 10 * FULL_WAIT_S
    # Nor do they stop those who read.
    assert agent.ask(f"wrong(range(0, {refused}, 7))") == []


def test_writes_over_what_was_read_leave_room_for_reads(full: tuple[Agent, int]) -> None:
    """Each of them turns a clean page, which costs nothing to drop, into one that can go nowhere."""
    agent, refused = full
    agent.run(
        f"""
        missing = set()
        for page in range(0, {refused}, 3):
            if wrong([page]): missing.add((page, "read"))
            if write(page): missing.add((page, "write"))
        """
    )
    assert agent.ask("[page for page, what in missing if what == 'read']") == []
    # What was refused is not lost: its stored copy is untouched, and comes back with a pin of the page's own.
    assert agent.ask(f"wrong(range(1, {refused}, 3))") == []
    assert agent.ask("region.statistics().resident_pages") <= RESIDENT + SPARE


def test_prefetch_of_a_full_region_says_how_far_it_came(full: tuple[Agent, int]) -> None:
    agent, refused = full
    began = time.monotonic()
    pages = agent.ask("region.prefetch(a[:128]) // PAGE")
    assert isinstance(pages, int) and 0 <= pages <= 128
    assert time.monotonic() - began < 10 * FULL_WAIT_S
    assert agent.ask(f"wrong(range({refused}))") == []


def test_room_ends_it(engines: Engines) -> None:
    other = engines.agent()
    other.create(1000, 64, "other")
    other.run(ACCESS)
    assert other.ask("fill(0, 1000)") == 1000
    other.ask("region.evict()")
    agent = engines.agent()
    agent.create(PAGES, RESIDENT)
    agent.run(ACCESS)
    refused = agent.ask(f"fill(0, {PAGES})")
    assert refused < 1500
    assert agent.ask(f"write({refused} + 1)") != 0
    other.end()
    # Without another wait in vain: what was refused a moment ago is taken.
    last = agent.ask(f"fill({refused} + 2, {refused} + 400)")
    assert last == refused + 400
    assert agent.ask(f"wrong([*range({refused}), *range({refused} + 2, {last})])") == []
