"""MADV_REMOVE by an application: it takes pages from under the node, and what is touched then fails, or is right."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontswap.conftest import Agent, Engines

REMOVE = """
import errno
libc = ctypes.CDLL(None, use_errno=True)
def remove(first, count=1):
    at, size = region.address + first * PAGE, count * PAGE
    if libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), mmap.MADV_REMOVE): return ctypes.get_errno()
a[:, 0] = np.arange(1, len(a) + 1)
"""


@pytest.fixture(params=["auto", "guard"])
def agent(request: pytest.FixtureRequest, directory: Path) -> Iterator[Agent]:
    engines = Engines(directory, poison=request.param)
    made = engines.agent()
    made.create(64, 48)
    if made.ask("region.user_mode_only"):
        pytest.skip("needs faults of the kernel")
    made.run(REMOVE)
    yield made
    engines.close()


def test_a_removed_page_that_was_only_in_ram_is_lost(agent: Agent) -> None:
    agent.ask("region.prefetch(a[:8])")
    agent.run("a[2:6, 1] = 7")
    assert agent.ask("remove(2, 2)") is None
    assert agent.ask("errno_of(2)") != 0
    assert agent.ask("errno_of(3)") != 0
    assert agent.ask("a[4:6, 0].tolist()") == [5, 6]
    agent.ask("region.evict()")
    assert agent.ask("errno_of(3)") != 0, "for good"
    assert agent.ask("region.check()")[0] == "region-lost"
    assert agent.ask("region.pin(a[2])")[0] == "region-lost"
    assert agent.ask("region.statistics().lost_pages") == 2
    agent.send("int(a[2, 0])")
    with pytest.raises(EOFError, match="MADV_REMOVE"):
        agent.answer()
    assert agent.process.returncode == -signal.SIGBUS


def test_a_removed_page_is_never_stored_as_zeros(agent: Agent) -> None:
    agent.run("a[2:6, 1] = 7; a[10:12] = 0")
    assert agent.ask("remove(2, 2)") is None
    agent.ask("region.evict()")  # reads the hole before anybody has touched it
    assert agent.ask("[errno_of(page) != 0 for page in range(8)]") == [False] * 2 + [True] * 2 + [False] * 4
    assert agent.ask("a[10:12].any()") == "False", "zeros that were written are zeros"
    assert agent.ask("region.statistics().lost_pages") == 2


def test_a_removed_page_whose_copy_is_stored_comes_back(agent: Agent) -> None:
    agent.ask("region.evict()")
    assert agent.ask("a[:8, 0].tolist()") == list(range(1, 9))  # clean now
    assert agent.ask("remove(0, 64)") is None
    assert agent.ask("a[:, 0].tolist()") == list(range(1, 65))
    agent.ask("region.evict()")
    assert agent.ask("a[:, 0].tolist()") == list(range(1, 65))
    assert agent.ask("region.statistics().lost_pages") == 0


def test_a_pinned_page_that_is_removed(agent: Agent) -> None:
    agent.run("pin = region.pin(a[4:8])")
    assert agent.ask("remove(5)") is None
    assert agent.ask("errno_of(5)") != 0
    agent.run("pin.unpin()")
    assert agent.ask("region.statistics().pinned_pages") == 0
    agent.ask("region.evict()")
    assert agent.ask("[a[page, 0].item() for page in (4, 6, 7)]") == [5, 7, 8]
