"""A fault thread that does not end: whoever leaves its region is told so in bounded time, and others do not notice."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontswap.conftest import DEADLINE, Engines, fault_threads

from ramster.testing.proxy import wait_until

GIVE_UP_S = 10.0

# Holds one thread of another process until its standard input ends: signals do not reach a thread that is traced so.
HOLD = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
SEIZE, INTERRUPT, ALL = 0x4206, 0x4207, 0x40000000
thread = int(sys.argv[1])
for request in (SEIZE, INTERRUPT):
    if libc.ptrace(request, thread, 0, 0):
        print(os.strerror(ctypes.get_errno()), flush=True)
        sys.exit(1)
while (os.waitpid(thread, ALL)[1] >> 16) != 128: pass
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def engines(directory: Path) -> Iterator[Engines]:
    made = Engines(directory)
    yield made
    made.close()


@contextlib.contextmanager
def held(thread: int) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(thread)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdin is not None and tracer.stdout is not None
        try:
            said = tracer.stdout.readline()
            if said != "held\n":
                pytest.skip(f"may not trace a thread: {said}")
            yield
        finally:
            tracer.stdin.close()  # and it runs again


def test_a_thread_that_does_not_end_is_given_up(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    before = fault_threads()
    agent, other = engines.agent(), engines.agent()
    agent.create(64, 32, "stuck")
    agent.run("a[:, 0] = 7")
    (thread,) = fault_threads() - before
    other.create(64, 32, "other")
    with held(thread):
        began = time.monotonic()
        agent.kill()
        assert other.ask("a.any()") == "False"
        wait_until(lambda: "does not end" in caplog.text, "it is given up", deadline_s=DEADLINE)
        assert GIVE_UP_S - 1 < time.monotonic() - began < GIVE_UP_S + 5
        # Its numbers are free for others, what it holds is kept: the thread may still use it.
        other.run("a[:, 0] = np.arange(64); region.evict()")
        assert other.ask("a[:, 0].tolist()") == list(range(64))
        assert [region.name for region in engines.describe()] == ["other"]
        third = engines.agent()
        third.create(64, 32, "stuck")
        assert third.ask("a.any()") == "False"
    wait_until(lambda: thread not in fault_threads(), "it ends by itself once it runs", deadline_s=DEADLINE)
