"""Faults of a region whose pages are all on this machine, and eviction, beside a bare userfaultfd handler.

The application is this process, the node a process of its own. Touches run without the GIL; every page that is read is
compared with what was written.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from bench.data import PAGE
from bench.latency import HERE, THERE, Nanoseconds, compare_latencies, cpu_ns, on_core, place, same, same_pages
from bench.nodes import cluster
from bench.rows import Row, compare
from numpy.typing import NDArray

import ramster
from ramster.errors import KernelUnsupported, PermissionMissing
from ramster.testing import _touch
from ramster.testing.cluster import Node

BARE = "bare handler + LZ4 decode"
MEMMAP = "numpy.memmap, page cache dropped"
DISK = Path("/var/tmp")  # /tmp is often memory


class Bench:
    """A region of `pages` real pages with a quarter of them resident, filled, and everything written out."""

    def __init__(self, node: Node, client: ramster.Client, count: int, rounds: int) -> None:
        self.node = node
        self.client = client
        self.count = count
        self.rounds = rounds
        self.random = np.random.default_rng(1)
        self.source = np.frombuffer(same_pages(count), np.uint8)
        self.words = self.source.view(np.uint64)[:: PAGE // 8]
        self.blocks = _touch.Blocks(self.source)
        self.region = client.region(count * PAGE, resident=count // 4 * PAGE, name="bench")
        self.memory = self.region.array((count * PAGE,), np.uint8)
        self.memory[:] = self.source
        self.region.evict()
        self.core: int | None = None
        self.in_order = np.arange(count)
        self._slices = self._walk(count // 8)

    def close(self) -> None:
        """At the end of a run that went well; after a failure the region goes with the process."""
        del self.memory
        self.region.close()

    def _walk(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Pieces of one endless walk in which a page comes back only after all others: it is never still resident."""
        order = self.random.permutation(self.count)
        for at in itertools.count(step=size):
            yield order[at % self.count : at % self.count + size]

    def read(self, order: NDArray[np.int64]) -> Nanoseconds:
        return same(_touch.read_pages(self.memory, order), self.words[order], "region")

    def bare(self, order: NDArray[np.int64], window: int = 1) -> Nanoseconds:
        got = _touch.bare_fault(order, self.count, window, self.blocks, core=self.core)
        return same(got, self.words[order], "floor")

    @contextlib.contextmanager
    def handlers_on(self, core: int | None) -> Iterator[None]:
        """Application on one core, fault handlers (the node's and the floor's) on this; None: any."""
        assert self.node.process is not None
        place(self.node.process.pid, core, "ramster-fault")
        self.core = core
        with contextlib.nullcontext() if core is None else on_core(HERE):
            yield

    def some(self) -> NDArray[np.int64]:
        return self.random.permutation(self.count)[: self.count // 8]

    def with_room(self) -> Nanoseconds:
        self.region.evict()
        return self.read(self.some())

    def full(self) -> Nanoseconds:
        return self.read(next(self._slices))

    def burnt(self, faults: int) -> str:
        """CPU of the node per fault, over one more piece of the walk."""
        assert self.node.process is not None
        before = cpu_ns(self.node.process.pid)
        self.full()
        return f"node: {(cpu_ns(self.node.process.pid) - before) / faults / 1000:.0f} us of CPU per fault"


def bench_random(b: Bench) -> list[Row]:
    rows = []
    for where, core in (("one core", HERE), ("two cores", THERE)):
        with b.handlers_on(core):
            rows += compare_latencies(
                f"local fault, random, {where}", b.with_room, BARE, lambda: b.bare(b.some()), rounds=b.rounds
            )
    with b.handlers_on(HERE):
        rows += compare_latencies(
            "local fault, random, evicting, one core",
            b.full,
            BARE,
            lambda: b.bare(b.some()),
            rounds=b.rounds,
            note=lambda: b.burnt(b.count // 8),
        )
    return rows


def bench_zero(b: Bench) -> list[Row]:
    """First touches; a region in which everything has room."""
    touches = b.count // 8
    pages = touches * (b.rounds + 1)
    memory = b.client.empty(pages * PAGE, np.uint8, resident=2 * pages * PAGE, name="bench-zero")
    assert b.node.process is not None
    place(b.node.process.pid, b.core, "ramster-fault")
    order = iter(b.random.permutation(pages).reshape(-1, touches))
    nothing = np.zeros(touches, np.uint64)
    return compare_latencies(
        "first touch, random, one core",
        lambda: same(_touch.read_pages(memory, next(order)), nothing, "first touch"),
        "bare handler",
        lambda: _touch.bare_fault(b.some(), b.count, core=b.core)[0],
        rounds=b.rounds,
    )


def bench_sequential(b: Bench) -> list[Row]:
    def written() -> float:
        took, _ = _touch.write_pages(b.memory, b.in_order)
        return float(took.mean())

    batches = b.count // 4 * PAGE
    return [
        compare(
            "sequential pass, reading",
            "ns/page",
            lambda: float(b.read(b.in_order).mean()),
            "the same, 32 pages per copy",
            lambda: float(b.bare(b.in_order, 32).mean()),
            rounds=b.rounds,
        ),
        compare(
            "sequential pass, writing",
            "ns/page",
            written,
            "the same + LZ4, pread, punch",
            lambda: float(b.bare(b.in_order, 32).mean()) + _touch.write_out(b.source[:batches]),
            rounds=b.rounds,
        ),
    ]


def bench_evict(b: Bench) -> list[Row]:
    pages = b.count // 8

    def ours(dirty: bool) -> float:
        b.region.evict()
        (_touch.write_pages if dirty else _touch.read_pages)(b.memory, b.in_order[:pages])
        begin = time.perf_counter_ns()
        if (evicted := b.region.evict((0, pages * PAGE))) != pages * PAGE:
            raise AssertionError(f"{evicted} bytes of {pages} pages evicted")
        return (time.perf_counter_ns() - begin) / pages

    def floor(dirty: bool) -> float:
        return _touch.write_out(b.source[: pages * PAGE], compress=dirty)

    return [
        compare(
            f"eviction of {name} pages",
            "ns/page",
            partial(ours, dirty),
            floor_name,
            partial(floor, dirty),
            rounds=b.rounds,
            note="64 at a time, asked for by the application",
        )
        for name, dirty, floor_name in (("dirty", True, "pread, LZ4, punch"), ("clean", False, "punch"))
    ]


def bench_memmap(b: Bench) -> list[Row]:
    """What a user has without us: the same bytes in a file, mapped. The disk's own cache cannot be dropped."""
    rows = []
    with tempfile.TemporaryFile(dir=DISK if DISK.is_dir() else None) as file:
        file.write(b.source.tobytes())
        file.flush()
        os.fsync(file.fileno())
        waits: list[float] = []

        def mapped(order: NDArray[np.int64]) -> Nanoseconds:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            memory = np.memmap(file, np.uint8, "r")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            took = same(_touch.read_pages(memory, order), b.words[order], "memmap")
            waits.append((resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before) / len(order))
            return took

        def ours(sequential: bool) -> float:
            return float((b.read(b.in_order) if sequential else b.full()).mean())

        def theirs(sequential: bool) -> float:
            return float(mapped(b.in_order if sequential else b.some()).mean())

        for sequential in (False, True):
            waits.clear()
            row = compare(
                f"{'sequential' if sequential else 'random'} pass beside a mapped file",
                "ns/page",
                partial(ours, sequential),
                MEMMAP,
                partial(theirs, sequential),
                rounds=b.rounds,
            )
            rows.append(
                replace(row, note=f"RAM of the file not limited; {np.mean(waits):.0%} of its touches wait for the disk")
            )
    return rows


def run(quick: bool) -> list[Row]:
    count, rounds = (2048, 3) if quick else (16384, 9)
    try:
        _touch.bare_fault(np.zeros(1, np.int64), 1)
        with cluster({"a": {"arena": {"size": 2 * count * PAGE}}}) as nodes:
            nodes.start()
            b = Bench(nodes["a"], ramster.connect(nodes["a"].region_socket), count, rounds)
            rows = bench_random(b)
            with b.handlers_on(HERE):
                rows += bench_zero(b)
            with b.handlers_on(THERE):
                rows += bench_sequential(b) + bench_evict(b)
            with b.handlers_on(None):
                rows += bench_memmap(b)
            b.close()
            return rows
    except (PermissionMissing, KernelUnsupported) as error:
        return [Row("faults of a region", None, "us", "", None, note=f"skipped: {error}")]
