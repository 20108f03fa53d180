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


def test_nobody_reads_what_it_says(start_node: StartNode) -> None:
    """A full pipe: the child dies without its line rather than stay."""
    run_script(
        FORKS
        + """
read, full = os.pipe()
os.set_blocking(full, False)
with contextlib.suppress(BlockingIOError):
    while True: os.write(full, bytes(4096))
os.set_blocking(full, True)
def into_a_full_pipe():
    os.dup2(full, 2)
    touch()
assert child(into_a_full_pipe) == ("", -signal.SIGSEGV)
""",
        start_node("--pattern").socket,
    )


def test_threads_say_it_once(start_node: StartNode) -> None:
    run_script(
        FORKS
        + """
def by_threads():
    together = threading.Barrier(4)
    def one():
        together.wait()
        np.sum(a)                           # without the interpreter's lock
    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
said, status = child(by_threads)
assert said.startswith(LINE) and said.count("\\n") == 1 and status == -signal.SIGSEGV, said
""",
        start_node("--pattern").socket,
    )


def test_a_handler_from_before_the_fork_goes_on(start_node: StartNode) -> None:
    """One that mends its own faults gets the first one that is not a region's, and all that follow."""
    run_script(
        FORKS
        + """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
own = libc.mmap(None, ctypes.c_size_t(2 * PAGE), 0, 0x22, -1, ctypes.c_long(0))
class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
mended = []
@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def mend(number, info, context):
    at = ctypes.c_uint64.from_address(info + 16).value // PAGE * PAGE
    mended.append(at)
    if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), 3): os._exit(7)
action = Action(handler=ctypes.cast(mend, ctypes.c_void_p).value, flags=4)
assert libc.sigaction(int(signal.SIGSEGV), ctypes.byref(action), None) == 0
def faults():
    ctypes.memset(own, 1, 2 * PAGE)         # the lock of the interpreter is not held there
    return 5 if mended == [own, own + PAGE] else 6
assert child(faults) == ("", 5)
""",
        start_node("--pattern").socket,
    )
