"""Descriptors that a node shares with an application: what that does to its own copies must not hold up the node."""

import ctypes
import fcntl
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontswap.conftest import DEADLINE, Engines, fault_threads

from ramster.constants import REGION_MESSAGE_BYTES_MAX
from ramster.frontswap import messages
from ramster.frontswap._client import FEATURES
from ramster.testing.proxy import wait_until

BLOCKING = "import fcntl; fcntl.fcntl(region.fault_fd, fcntl.F_SETFL, 0)"
PROCESSES = 10  # more than the region service has threads
SYS_USERFAULTFD = 323
UFFDIO_API = 0xC018AA3F
EVENT_REMOVE = 1 << 3


@pytest.fixture(params=[1, 3])
def engines(request: pytest.FixtureRequest, directory: Path) -> Iterator[Engines]:
    made = Engines(directory, fault_threads=request.param)
    yield made
    made.close()


def test_a_blocking_userfaultfd_holds_up_nobody(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    """O_NONBLOCK belongs to the open file: the application can take it from the node's threads."""
    before = fault_threads()
    for number in range(PROCESSES):
        agent = engines.agent()
        agent.create(64, 16, f"region {number}")
        agent.run(BLOCKING)
        agent.run("a[:, 0] = np.arange(64)")
        assert agent.ask("a[:, 0].tolist()") == list(range(64))
        if number % 2:
            agent.end()
        else:
            agent.kill()
    other = engines.agent()
    other.create(64, 16, "other")
    other.run(BLOCKING)
    assert other.ask("int(a.sum())") == 0
    wait_until(lambda: [region.name for region in engines.describe()] == ["other"], "the others have gone")
    # A node that stops does not wait for a process that lives.
    engines._run(engines.service.close())
    assert other.process.poll() is None
    # Nor does it give up a single thread.
    assert "does not end" not in caplog.text and fault_threads() <= before


def userfaultfd(features: int | None) -> int:
    """A new one; features None: not settled."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    if features is not None:
        fcntl.ioctl(fd, UFFDIO_API, struct.pack("<QQQ", 0xAA, features, 0))
    return int(fd)


@pytest.mark.parametrize("engines", [1], indirect=True)
@pytest.mark.parametrize(
    ("features", "claimed", "reason"),
    [
        (None, 0, "has not settled its features"),
        (EVENT_REMOVE, 0, "features that a region must not have: 0x8"),
        (0, FEATURES, f"{FEATURES:#x} are not on"),
    ],
)
def test_a_userfaultfd_that_would_hold_up_the_engine_is_refused(
    engines: Engines, features: int | None, claimed: int, reason: str
) -> None:
    fd = userfaultfd(features)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as talker:
        talker.settimeout(DEADLINE)
        talker.connect(str(engines.socket))
        talker.send(json.dumps({"op": "create", "version": messages.VERSION, "pages": 8}).encode())
        for received in socket.recv_fds(talker, REGION_MESSAGE_BYTES_MAX, 4)[1]:
            os.close(received)
        attach = {"op": "attach", "base": 1 << 20, "features": claimed}
        socket.send_fds(talker, [json.dumps(attach).encode()], [fd])
        os.close(fd)
        answer = json.loads(talker.recv(REGION_MESSAGE_BYTES_MAX))
    assert answer["error"] == "usage" and reason in answer["message"]
