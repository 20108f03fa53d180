"""A verifying walk of memory twice the size of its RAM: a region beside zram swap on this kernel.

The same program on the same pages, one beside the other: as a process under a memory cgroup that swaps to zram, and on
a region whose resident budget is the cgroup's limit and whose node is alone. Every byte of every visited page is
compared, every second page rewritten, natively. Skipped, with the reason, where there is no zram, no memory cgroup or
no root; whatever happens, the swap device, the zram disk and the cgroup are taken away again.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.data import PAGE
from bench.latency import cpu_ns
from bench.nodes import cluster
from bench.rows import Row, Unavailable, compare, installed

import ramster
from ramster.cli.demo.nodes import spawn
from ramster.errors import KernelUnsupported, PermissionMissing
from ramster.testing._walk import Walk

MIB: Final = 1 << 20
CODEC: Final = "lz4"  # the codec that we use; a kernel without it takes its own default
CONTROL: Final = Path("/sys/class/zram-control")
DEADLINE_S: Final = 120.0

# order, every n-th visited page is rewritten, bound to one processor (the walk on zram is not: its faults never leave
# its thread), name of the path
WALKS: Final = (
    ("random", 2, False, "verifying random walk, half rewritten"),
    ("random", 0, False, "verifying random walk, reading"),
    ("random", 2, True, "the same, bound to one processor, half rewritten"),
    ("random", 0, True, "the same, bound to one processor, reading"),
    ("stride", 2, False, "verifying walk by one large stride, half rewritten"),
    ("sequential", 2, False, "verifying sequential pass, half rewritten"),
    ("sequential", 0, False, "verifying sequential pass, reading"),
    ("sequential", 2, True, "the same, bound to one processor, half rewritten"),
    ("sequential", 0, True, "the same, bound to one processor, reading"),
)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")


@contextlib.contextmanager
def swap(device: str, *options: str) -> Iterator[None]:
    """A device or file is swap, switched on with these options; it loses what it holds."""
    if os.geteuid() != 0:
        raise Unavailable("swap needs root")
    mkswap, swapon, swapoff = (installed(name) for name in ("mkswap", "swapon", "swapoff"))
    subprocess.run([mkswap, device], check=True, capture_output=True)
    done = subprocess.run([swapon, "-p", "5", *options, device], check=False, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run([swapoff, device], check=False, capture_output=True)


@contextlib.contextmanager
def zram(size: int) -> Iterator[str]:
    """A swap device of `size` bytes on a zram disk of its own: the name of its codec."""
    if os.geteuid() != 0:
        raise Unavailable("zram needs root")
    if not CONTROL.is_dir():
        raise Unavailable("this kernel has no zram")
    with contextlib.ExitStack() as undo:
        number = (CONTROL / "hot_add").read_text(encoding="ascii").strip()
        disk, device = Path(f"/sys/block/zram{number}"), f"/dev/zram{number}"
        undo.callback(_write, CONTROL / "hot_remove", number)
        undo.callback(_write, disk / "reset", "1")
        with contextlib.suppress(OSError):
            _write(disk / "comp_algorithm", CODEC)
        codec = (disk / "comp_algorithm").read_text(encoding="ascii").partition("[")[2].partition("]")[0]
        _write(disk / "disksize", str(size))
        until = time.monotonic() + 5.0
        while not Path(device).exists() and time.monotonic() < until:
            time.sleep(0.01)  # udev makes the node
        undo.enter_context(swap(device))
        yield codec


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup of its own, version 1 or 2: its cgroup.procs."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (one / "memory.limit_in_bytes").exists():
        group, knob = one / f"ramster-hog-{os.getpid()}", "memory.limit_in_bytes"
    elif (two / "cgroup.subtree_control").exists() and "memory" in (two / "cgroup.subtree_control").read_text().split():
        group, knob = two / f"ramster-hog-{os.getpid()}", "memory.max"
    else:
        raise Unavailable("there is no memory cgroup")
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"cannot make a memory cgroup: {error.strerror}") from None
    try:
        _write(group / knob, str(limit))
        yield group / "cgroup.procs"
    finally:
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            try:
                group.rmdir()
                break
            except OSError:  # its last process is still going
                time.sleep(0.05)


class Hog:
    """The walking process. `where`: a cgroup.procs to enter, or a region socket."""

    def __init__(self, kind: str, where: Path, size: int, resident: int) -> None:
        self._process = spawn(
            [sys.executable, str(Path(__file__).resolve()), kind, str(where), str(size), str(resident)],
            outlive=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pages = size // PAGE
        self.seed = 0
        self.cpu_us = 0.0  # per page, of the pass before
        self.ask(order="sequential", dirty=1)  # fill

    def ask(self, **how: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(how).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the walk ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if wrong := {name: answer[name] for name in ("empty", "stale", "foreign", "altered") if answer[name]}:
            raise AssertionError(f"wrong pages: {wrong}, the first {answer['first']}")
        return answer

    def rate(self, order: str, dirty: int, seconds: float = DEADLINE_S) -> float:
        """Pages per second of one pass, or of so much of it as `seconds` allow."""
        self.seed += 1
        answer = self.ask(order=order, dirty=dirty, seed=self.seed, seconds=seconds)
        self.cpu_us = answer["cpu_ns"] / answer["visits"] / 1000
        return float(answer["visits"]) * 1e9 / float(answer["ns"])

    def bind(self, cpus: set[int]) -> None:
        """Where the walk may run; it has one thread that matters."""
        os.sched_setaffinity(self._process.pid, cpus)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that what was set up is taken down."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(quick: bool) -> list[Row]:
    size, resident, rounds = (128 * MIB, 64 * MIB, 2) if quick else (256 * MIB, 128 * MIB, 7)
    rows = []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruptible())
            codec = stack.enter_context(zram(size * 5 // 4))
            group = stack.enter_context(memory_cgroup(resident))
            nodes = stack.enter_context(cluster({"a": {"arena": {"size": size}}})).start()
            theirs = stack.enter_context(Hog("cgroup", group, size, resident))
            ours = stack.enter_context(Hog("region", nodes["a"].region_socket, size, resident))
            node = nodes["a"].process
            assert node is not None
            everywhere = os.sched_getaffinity(0)
            for order, dirty, bound, name in WALKS[:: 4 if quick else 1]:
                ours.bind({min(everywhere)} if bound else everywhere)
                row = compare(
                    name,
                    "pages/s",
                    lambda order=order, dirty=dirty: ours.rate(order, dirty),  # type: ignore[misc]
                    f"zram swap, {codec}",
                    lambda order=order, dirty=dirty: theirs.rate(order, dirty),  # type: ignore[misc]
                    rounds=rounds,
                    more_is_better=True,
                )
                before = cpu_ns(node.pid)
                ours.rate(order, dirty)
                note = (
                    f"{size // MIB} MiB in {resident // MIB}; CPU per page: {ours.cpu_us:.1f} us of the application, "
                    f"{(cpu_ns(node.pid) - before) / ours.pages / 1000:.1f} us of the node; "
                    f"{theirs.cpu_us:.1f} us of the process that swaps"
                )
                rows.append(replace(row, note=note))
    except (Unavailable, PermissionMissing, KernelUnsupported) as error:
        return [Row("verifying walk beside zram", None, "pages/s", "", None, note=f"skipped: {error}")]
    return rows


def main() -> None:
    """The walking process: a line of JSON on stdin is a pass, its totals go to stdout."""
    kind, where, size, resident = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    memory: Any
    if kind == "region":
        region = ramster.connect(where).region(size, resident=resident, name="hog")
        memory = memoryview(region)
    else:
        # Only now: what the interpreter has taken so far stays charged to the group it comes from.
        _write(where, str(os.getpid()))
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    walk = Walk(memory, 7)
    for line in sys.stdin:
        before = time.process_time_ns()
        totals = walk.run(**{"visits": walk.pages, "seconds": DEADLINE_S, **json.loads(line)})
        print(json.dumps({**totals, "cpu_ns": time.process_time_ns() - before}), flush=True)


if __name__ == "__main__":
    main()
