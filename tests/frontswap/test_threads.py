"""Fault threads that are not to be had, or that have no time to end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontswap.conftest import DEADLINE, Agent, start_script
from tests.frontswap.test_stuck import GIVE_UP_S, held

from ramster.testing.proxy import wait_until

# A node that takes the first region as root and then is another user, whom the limit of threads binds.
NODE = """
from pathlib import Path
from tests.frontswap.conftest import Engines
engines = Engines(Path(sys.argv[1]), fault_threads=2)
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("leave "):
        user = int(line.split()[1])
        os.setgroups([]); os.setgid(user); os.setuid(user)
    else:
        more = int(line.split()[1])
        most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        resource.setrlimit(resource.RLIMIT_NPROC, (len(os.listdir("/proc/self/task")) + more, most))
    print("done", flush=True)
engines.close()
"""


@contextlib.contextmanager
def node(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    started = start_script(NODE, directory)
    try:
        assert started.stdout is not None and started.stdout.readline() == "ready\n"
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def tell(started: "subprocess.Popen[str]", line: str) -> None:
    assert started.stdin is not None and started.stdout is not None
    started.stdin.write(line + "\n")
    started.stdin.flush()
    assert started.stdout.readline() == "done\n"


def end(started: "subprocess.Popen[str]") -> str:
    """What it wrote to its standard error."""
    _, text = started.communicate(timeout=DEADLINE)
    assert started.returncode == 0, text
    return text


def threads(pid: int, name: str) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text() == name + "\n":
                found.add(int(task.name))
    return found


def nudged(pid: int, thread: int) -> bool:
    """Whether a signal waits for this thread alone."""
    for line in Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines():
        if line.startswith("SigPnd:"):
            return int(line.split()[1], 16) != 0
    raise AssertionError("no SigPnd")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user, whom the limit binds")
def test_a_region_whose_threads_are_not_to_be_had_names_the_limit(directory: Path) -> None:
    with node(directory) as started:
        agent = Agent(directory / "run" / "region.sock")
        try:
            agent.create(64, 32)  # its requests leave idle threads of the service behind, whose turn is first
            agent.run("del a; region.close()")
            wait_until(lambda: not threads(started.pid, "ramster-fault"), "it is gone")
            tell(started, f"leave {1 << 24 | os.getpid()}")
            for more in range(3):  # two fault threads, and then the evictor
                wait_until(lambda: not threads(started.pid, "ramster-fault"), "what was begun has ended")
                tell(started, f"limit {more}")
                code, text = agent.ask(f"client.region(64 * PAGE, resident=32 * PAGE, name='short {more}')")
                assert code == "limit-reached" and "ulimit -u" in text and str(started.pid) in text, text
            tell(started, "limit 8")
            agent.create(64, 32)
            agent.run("a[:, 0] = np.arange(64); region.evict()")
            assert agent.ask("a[:, 0].tolist()") == list(range(64))
        finally:
            agent.kill()
            agent.process.communicate()


def test_a_node_that_stood_still_gives_nobody_up(directory: Path) -> None:
    """It has given its threads no time to end: by the clock alone it would give up the first that it looks at."""
    with node(directory) as started:
        agent, other = (Agent(directory / "run" / "region.sock") for _ in range(2))
        try:
            agent.create(64, 32, "left")
            agent.run("a[:, 0] = 7")
            other_before = threads(started.pid, "ramster-fault")
            other.create(64, 32, "other")
            thread = min(other_before)
            with held(thread):
                agent.kill()
                wait_until(lambda: nudged(started.pid, thread), "it is to end")
                os.kill(started.pid, signal.SIGSTOP)
                stopped = time.monotonic()
                wait_until(
                    lambda: time.monotonic() > stopped + GIVE_UP_S + 1, "it has stood still", GIVE_UP_S + DEADLINE
                )
                os.kill(started.pid, signal.SIGCONT)
                other.run("a[:, 0] = np.arange(64); region.evict()")
                assert other.ask("a[:, 0].tolist()") == list(range(64)), "it runs again"
            wait_until(lambda: thread not in threads(started.pid, "ramster-fault"), "it ends", DEADLINE)
            other.end()
        finally:
            for each in (agent, other):
                if each.process.poll() is None:
                    each.kill()
                each.process.communicate()
        assert "does not end" not in end(started)
