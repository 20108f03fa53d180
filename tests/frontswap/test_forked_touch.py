"""A forked child that touches its parent's array says why it dies, and dies as it would have died."""

from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Node, run_script

StartNode = Callable[..., Node]

FORKS = """
a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64, name="matrix")
a[1] = 11
def child(work):
    "What it printed on standard error, and how it ended."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
        os._exit(work() or 0)
    os.close(write)
    with open(read) as stream: said = stream.read()
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def touch(): return int(a[1, 0]) & 0
def elsewhere(): ctypes.string_at(16)
LINE = "ramster: a forked child touched an array of region 'matrix' of its parent"
"""


def test_it_says_why_and_dies_of_the_same_signal(start_node: StartNode) -> None:
    run_script(
        FORKS
        + """
said, status = child(touch)
assert said.startswith(LINE) and "ramster.attach" in said and said.count("\\n") == 1, said
assert status == -signal.SIGSEGV
def write(): a[9, 0] = 1
assert child(write) == (said, status)
assert a[1, 0] == 11
""",
        start_node("--pattern").socket,
    )


def test_others_are_silent(start_node: StartNode) -> None:
    run_script(
        FORKS
        + """
assert child(lambda: 3) == ("", 3)
assert child(elsewhere) == ("", -signal.SIGSEGV)
assert child(lambda: os.kill(os.getpid(), signal.SIGSEGV)) == ("", -signal.SIGSEGV), "sent, not a fault"
def system_call():
    try: os.pwrite(2, a[1], 0)
    except OSError: return 4
assert child(system_call) == ("", 4)
assert child(lambda: os.execv("/bin/sh", ["sh", "-c", "kill -SEGV $$"])) == ("", -signal.SIGSEGV)
""",
        start_node("--pattern").socket,
    )


def test_a_grandchild_says_it_too(start_node: StartNode) -> None:
    run_script(
        FORKS
        + """
def grandchild():
    said, status = child(touch)
    return 0 if said.startswith(LINE) and said.count("\\n") == 1 and status == -signal.SIGSEGV else 1
assert child(grandchild) == ("", 0)
def of_its_own():
    global a
    mine = ramster.connect(sys.argv[1]).empty((2, 512), np.uint64, name="mine")
    mine[0] = 5
    assert grandchild() == 0
    a, line = mine, LINE.replace("matrix", "mine")
    said, status = child(touch)
    return 0 if said.startswith(line) and status == -signal.SIGSEGV and mine[0, 0] == 5 else 1
assert child(of_its_own) == ("", 0)
""",
        start_node("--pattern").socket,
    )


@pytest.mark.parametrize("work", ["touch", "elsewhere"])
def test_faulthandler_follows(start_node: StartNode, work: str) -> None:
    run_script(
        FORKS
        + """
import faulthandler, tempfile
with tempfile.TemporaryFile("w+") as trace:
    faulthandler.enable(trace)
    said, status = child(globals()[sys.argv[2]])
    assert said.startswith(LINE) == (sys.argv[2] == "touch") and said.count("\\n") <= 1, said
    assert status == -signal.SIGSEGV
    trace.seek(0)
    text = trace.read()
    assert text.count("Segmentation fault") == 1 and f"in {sys.argv[2]}" in text, text
""",
        start_node("--pattern").socket,
        work,
    )
