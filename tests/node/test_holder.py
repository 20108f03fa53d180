"""The holder keeps an arena's RAM while no node runs, hands it to the next one, and goes when it is told to."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramster.constants import MIB, PAGE_BYTES
from ramster.engine.store import Store
from ramster.errors import PortTaken, StoreFull
from ramster.node import holder
from ramster.testing.cluster import Cluster, Node
from ramster.testing.proxy import wait_until

SIZE = 64 * MIB
SEGMENT = 65536


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def field(pid: int, name: str) -> int:
    """Bytes, from /proc/PID/status."""
    found = re.findall(rf"^{name}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[0]) * 1024


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    try:
        holder.end(tmp_path / "run")
    except PortTaken as error:  # a test that failed in between
        os.kill(int(re.findall(r"process (\d+)", str(error))[0]), signal.SIGKILL)


def take(run_dir: Path, size: int = SIZE, segment: int = SEGMENT, keep_ms: int = 60_000) -> holder.KeptArena:
    return holder.take(run_dir, size, segment, True, keep_ms)


# --- by itself -----------------------------------------------------------------------------------------------------


def test_it_has_the_memory_and_keeps_it_when_its_user_is_gone(run_dir: Path) -> None:
    first = take(run_dir)
    assert not first.reused
    assert os.fstat(first.descriptor).st_blocks * 512 == SIZE
    assert field(first.pid, "RssShmem") == (SIZE if first.locked else 0)
    os.pwrite(first.descriptor, b"what the node before left", 1000)
    first.release(end=False)
    second = take(run_dir)
    assert second.reused and second.pid == first.pid
    assert os.pread(second.descriptor, 25, 1000) == b"what the node before left"
    if second.locked:
        assert field(second.pid, "VmLck") >= SIZE and second.check().state == "ok"
    second.release(end=True)
    wait_until(lambda: gone(first.pid), "it ends")
    assert not (run_dir / holder.HOLDER_SOCKET).exists()


def test_a_store_in_it_finds_its_memory_there(run_dir: Path) -> None:
    """Mapped, not touched page by page, and nothing is cleared."""
    with take(run_dir) as kept:
        if not kept.locked:
            pytest.skip("memory may not be locked here")
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        store = Store(SIZE, segment_bytes=SEGMENT, arena_fd=kept.descriptor, cleaner=False)
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        assert store.statistics().locked
        assert faults < SIZE // PAGE_BYTES // 8
        store.close()


def test_its_own_memory_is_small(run_dir: Path) -> None:
    with take(run_dir) as kept:
        assert field(kept.pid, "RssAnon") < 8 * MIB


@pytest.mark.parametrize(("size", "segment"), [(2 * SIZE, SEGMENT), (SIZE, 2 * SEGMENT)])
def test_an_arena_of_another_shape_is_replaced(run_dir: Path, size: int, segment: int) -> None:
    first = take(run_dir)
    first.release(end=False)
    second = take(run_dir, size, segment)
    assert not second.reused and second.pid != first.pid
    assert os.fstat(second.descriptor).st_size == size
    wait_until(lambda: gone(first.pid), "the old one is gone")
    second.release(end=True)


def test_two_nodes_cannot_have_it(run_dir: Path) -> None:
    with take(run_dir):
        with pytest.raises(PortTaken, match=f"process {os.getpid()}, already serves in .*run_dir"):
            take(run_dir)
        with pytest.raises(PortTaken):
            holder.end(run_dir)


def test_it_does_not_wait_for_ever(run_dir: Path) -> None:
    kept = take(run_dir, keep_ms=200)
    kept.release(end=False)
    wait_until(lambda: gone(kept.pid), "nobody came")
    assert not holder.end(run_dir)


def test_more_than_there_is(run_dir: Path) -> None:
    with pytest.raises(StoreFull, match="cannot reserve an arena"):
        take(run_dir, 1 << 50)
    assert not (run_dir / holder.HOLDER_SOCKET).exists()


def test_a_socket_that_nobody_listens_on_is_no_holder(run_dir: Path) -> None:
    first = take(run_dir)
    os.kill(first.pid, signal.SIGKILL)
    first.release(end=False)
    wait_until(lambda: gone(first.pid), "it dies")
    assert not holder.end(run_dir)
    with take(run_dir) as second:
        assert not second.reused


def test_a_start_that_fails_leaves_what_was_there_before_and_nothing_else(run_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), take(run_dir) as kept:
        raise ZeroDivisionError
    wait_until(lambda: gone(kept.pid), "it was made for this start")
    take(run_dir).release(end=False)
    with pytest.raises(ZeroDivisionError), take(run_dir) as kept:
        raise ZeroDivisionError
    again = take(run_dir)
    assert again.reused and again.pid == kept.pid
    again.release(end=True)


# --- with a node ---------------------------------------------------------------------------------------------------

ARENA = {"size": "64MiB", "keep": "1min", "lock": True}


@pytest.fixture
def node() -> Iterator[Node]:
    with Cluster({"alpha": {"arena": ARENA}}) as cluster:
        yield cluster["alpha"]


def start(node: Node) -> int:
    """Its holder."""
    node.start()
    status = node.wait(lambda status: status["state"] == "running", "runs")
    return int(re.findall(r"process (\d+) keeps 64 MiB", status["guard"]["holder"]["detail"])[0])


def test_a_node_that_was_killed_starts_again_in_the_same_memory(node: Node) -> None:
    pid = start(node)
    node.kill()
    assert field(pid, "RssShmem") in (0, SIZE) and not gone(pid)
    assert start(node) == pid
    assert f"the arena of 64 MiB is the one that process {pid} has kept" in node.log
    assert node.status()["arena"]["frames_free"] == node.status()["arena"]["frames_total"], (
        "contents are not taken over"
    )
    node.control.stop(force=True)
    assert node.wait_exit() == 0
    wait_until(lambda: gone(pid), "an orderly stop ends it")
    assert not (node.run_dir / holder.HOLDER_SOCKET).exists()


def test_a_second_node_in_the_directory_is_refused(node: Node) -> None:
    pid = start(node)
    other = Node(node.place, node.config)
    other.start()
    assert other.wait_exit() == 13
    assert "already serves in" in other.log and not gone(pid)
    assert node.running()


def test_without_keep_what_an_earlier_node_kept_is_given_back(node: Node) -> None:
    pid = start(node)
    node.kill()
    text = node.config.read_text()
    node.config.write_text(re.sub(r"(?m)^keep = .*\n", "", text))
    node.start()
    status = node.wait(lambda status: status["state"] == "running", "runs")
    assert "holder" not in status["guard"]
    wait_until(lambda: gone(pid), "the holder is gone")


def test_stop_gives_back_what_a_dead_node_kept(node: Node) -> None:
    pid = start(node)
    node.kill()
    command = [sys.executable, "-P", "-m", "ramster.cli", "stop", "--config", str(node.config)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0 and "given back" in told.stdout, told.stderr
    wait_until(lambda: gone(pid), "the holder is gone")
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 4
