"""The worst of local faults while their node cleans and ships at full tilt, beside a bare handler under the same load.

Another process rewrites a region that is much larger than the node's arena: the cleaner and remotify never rest. The
region that is measured is read again and again, a quarter of it resident, so that its pages stay in the arena. The
bare handler is measured in turns with it while all of that goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from bench.data import PAGE
from bench.hog import MIB, Hog
from bench.latency import HERE, Nanoseconds, compare_latencies, on_core, place, same, same_pages
from bench.nodes import cluster
from bench.rows import Row
from numpy.typing import NDArray

import ramster
from ramster.errors import KernelUnsupported, PermissionMissing
from ramster.testing import _touch
from ramster.testing.cluster import Node


class Load:
    """A process that rewrites its region in random order until the block ends."""

    def __init__(self, socket: Path, size: int, resident: int) -> None:
        self._hog = Hog("region", socket, size, resident)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for seed in itertools.count(1):
                if self._stop.is_set():
                    break
                self._hog.ask(order="random", dirty=1, seed=seed, seconds=0.5)
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._hog.close()
        if self._failure is not None:
            raise self._failure


class Measured:
    """The region whose faults count."""

    def __init__(self, node: Node, count: int) -> None:
        self.count = count
        self.source = np.frombuffer(same_pages(count), np.uint8)
        self.words = self.source.view(np.uint64)[:: PAGE // 8]
        self.blocks = _touch.Blocks(self.source)
        self.region = ramster.connect(node.region_socket).region(count * PAGE, resident=count // 4 * PAGE, name="tail")
        self.memory = self.region.array((count * PAGE,), np.uint8)
        self.memory[:] = self.source
        self.region.evict()
        self._walk = self._pieces(np.random.default_rng(1))

    def _pieces(self, dice: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        """Of one endless walk: a page comes back only after all others."""
        order = dice.permutation(self.count)
        size = self.count // 2
        for at in itertools.count(step=size):
            yield order[at % self.count : at % self.count + size]

    def touch(self) -> Nanoseconds:
        order = next(self._walk)
        return same(_touch.read_pages(self.memory, order), self.words[order], "region")

    def bare(self) -> Nanoseconds:
        order = next(self._walk)
        got = _touch.bare_fault(order, self.count, blocks=self.blocks, core=HERE)
        return same(got, self.words[order], "floor")

    def remote(self) -> int:
        return self.region.statistics().faults_remote

    def close(self) -> None:
        del self.memory
        self.region.close()


def _work(node: Node) -> dict[str, Any]:
    status = node.status()
    arena = status["arena"]
    return {
        "cleaned": arena["cleaned_segments"] + arena["puts_plugged"],
        "shipped": status["counters"]["segments_shipped"],
    }


def run(quick: bool) -> list[Row]:
    # The arena turns over more slowly than ours and floor take turns: what nobody touches for so long leaves.
    count, rounds, load, arena = (512, 2, 48 * MIB, 16 * MIB) if quick else (4096, 9, 1024 * MIB, 256 * MIB)
    sections = {
        # Cleaning starts first, and what it cannot hold leaves: the coldest, which the measured region's pages are not.
        "a": {"arena": {"size": arena, "clean_low": 0.2}, "remotify": {"high": 0.9, "low": 0.88}},
        "b": {"lend": {"size": load}},
    }
    name = "local fault, random, beside cleaning and remotify"
    try:
        with contextlib.ExitStack() as stack:
            nodes = stack.enter_context(cluster(sections)).start()  # type: ignore[arg-type]
            node = nodes["a"]
            assert node.process is not None
            stack.enter_context(Load(node.region_socket, load, load // 8))
            before = _work(node)
            node.wait(
                lambda _: (now := _work(node))["cleaned"] > before["cleaned"] and now["shipped"] > before["shipped"],
                "cleaning and remotify at work",
                60.0,
            )
            # Only now, and measured at once: what nobody touches for a while is the coldest, and leaves.
            m = Measured(node, count)
            place(node.process.pid, HERE, "ramster-fault")
            before, remote, faults = _work(node), m.remote(), m.region.statistics().faults
            with on_core(HERE):
                rows = compare_latencies(
                    name, m.touch, "bare handler + LZ4 decode, same load", m.bare, rounds=rounds, note=""
                )
            node.wait(lambda _: _work(node)["cleaned"] > before["cleaned"], "cleaning went on", 60.0)
            now, all_faults = _work(node), m.region.statistics().faults - faults
            cleaned, shipped = (now[key] - before[key] for key in ("cleaned", "shipped"))
            far = (m.remote() - remote) / all_faults
            note = (
                f"meanwhile {cleaned} segments cleaned or entries put into room of dead ones, {shipped} segments "
                f"shipped; {far:.1%} of the faults were remote"
            )
            m.close()
    except (PermissionMissing, KernelUnsupported) as error:
        return [Row(name, None, "us", "", None, note=f"skipped: {error}")]
    return [replace(row, note=note) for row in rows]
