"""A process that holds the inode lock of its region's memfd, for as long as it likes: it holds up nobody else."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.frontswap.conftest import Agent, Engines, fault_threads

from ramster.testing.proxy import wait_until

MakeEngines = Callable[..., Engines]

PROMPT_S = 2.0
# A node that is held up altogether could not end the test: the process that holds it ends by itself.
HOLDS_S = 12

# A write to the memfd from memory whose faults nobody answers.
HOLD = f"""
signal.alarm({HOLDS_S})
import fcntl
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
folder = "/proc/self/fd/"
def is_memfd(fd):
    try: return "memfd:ramster-region" in os.readlink(folder + fd)
    except OSError: return False
(memfd,) = (int(fd) for fd in os.listdir(folder) if is_memfd(fd))
faults = fcntl.ioctl(os.open("/dev/userfaultfd", os.O_RDWR), 0xAA00, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(faults, 0xC018AA3F, bytearray(struct.pack("<QQQ", 0xAA, 0, 0)))
trap = libc.mmap(None, PAGE, 3, 0x22, -1, 0)
fcntl.ioctl(faults, 0xC020AA00, bytearray(struct.pack("<QQQQ", trap, PAGE, 1, 0)))
threading.Thread(target=libc.pwrite, args=(memfd, trap, PAGE, 0), daemon=True).start()
"""

# A page that is resident and not mapped any more: the node has to look whether the file has it.
LOOK = """
libc.madvise(region.address, PAGE, 4)
threading.Thread(target=libc.memset, args=(region.address, 1, 8), daemon=True).start()
"""

pytestmark = pytest.mark.skipif(
    not os.access("/dev/userfaultfd", os.R_OK | os.W_OK),
    reason="needs a userfaultfd that serves faults of system calls",
)


def state_of(thread: int) -> str:
    try:
        return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def hold(agent: Agent) -> None:
    agent.run(HOLD)
    trap = agent.ask("faults")
    agent.run(f"import select; until(lambda: select.select([{trap}], [], [], 0)[0])")  # it has faulted


def test_who_holds_his_regions_file_holds_up_nobody_else(engines: MakeEngines) -> None:
    served = engines()
    before = fault_threads()
    evil, other = served.agent(), served.agent()
    evil.create(64, 32, "evil")
    evil.run("a[:16, 0] = 1")
    (thread,) = fault_threads() - before
    other.create(256, 32, "other")
    other.run("a[:, 0] = np.arange(256)")
    hold(evil)
    evil.run(LOOK)
    wait_until(lambda: state_of(thread) == "D", "its fault thread waits for the file", deadline_s=HOLDS_S / 2)
    began = time.monotonic()
    assert set(served.service.troubles()) == {1, 2}
    assert {info.name for info in served.describe()} == {"evil", "other"}
    assert other.ask("int(a[:, 0].sum())") == 255 * 128
    other.run("client.capacity()")
    evil.run("region.advise('random')")
    took = time.monotonic() - began
    assert state_of(thread) == "D", "it still waits"
    assert took < PROMPT_S
