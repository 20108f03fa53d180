"""What travels: remote gets, remote faults and shipped segments over TLS on loopback, beside TLS alone.

Borrower and application share one core and the lender has another, as two machines would; what they share is memory
bandwidth and the kernel. No wire is in these figures: a real network adds its round trip to both columns.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from bench.data import PAGE
from bench.latency import HERE, THERE, Nanoseconds, compare_latencies, cpu_ns, on_core, place, same, same_pages, threads
from bench.nodes import cluster
from bench.rows import Row, compare
from numpy.typing import NDArray

import ramster
from ramster.cli.cluster_files import Sections
from ramster.cluster import identity
from ramster.engine.links import BULK, GET, Connection, Links, TlsContext
from ramster.engine.store import Store
from ramster.errors import KernelUnsupported, PermissionMissing
from ramster.testing import _floors, _touch
from ramster.testing.cluster import Cluster
from ramster.testing.proxy import wait_until

MIB = 1 << 20
BORROWER, LENDER = 1, 2
HANDSHAKE_S = 10.0
SHIP_S = 30.0
OPEN_PAGES = 512  # the pages written last may lie in segments that are still open, here


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


class Tls:
    """Throw-away certificates, and a bare connection whose far end runs on the lender's core."""

    def __init__(self, directory: Path) -> None:
        self.files = identity.create_cluster(directory, "bench", ["a", "b"])
        near, far = connected()
        ca, cert, key = self.files[0].ca, self.files[0].cert, self.files[0].key
        self.pair = _touch.TlsPair(near.detach(), far.detach(), str(ca), str(cert), str(key))
        self.pair.far_core = THERE

    def stream(self, total: int) -> float:
        """MB/s of a one-way stream."""
        return self.pair.stream(total) / 1e6


class Engines:
    """Two stores and their links in this process, no region: the borrower `a` with `pages` in a dense pool, and `b`."""

    def __init__(self, tls: Tls, size: int) -> None:
        self.stores = [Store(2 * size), Store(4 * MIB)]
        self.links = [
            Links(store, number + 1, lend_bytes=2 * size * number) for number, store in enumerate(self.stores)
        ]
        contexts = [TlsContext(str(f.ca), str(f.cert), str(f.key)) for f in tls.files]
        lent = self.links[1].counters()["lent_frames"]
        for kind in (GET, BULK):
            ends = [
                Connection(context, end.detach(), server)
                for context, end, server in zip(contexts, connected(), (False, True), strict=True)
            ]
            greeting = threading.Thread(target=ends[1].handshake, args=(HANDSHAKE_S,))
            greeting.start()
            ends[0].handshake(HANDSHAKE_S)
            greeting.join()
            self.links[0].attach(ends[0], LENDER, kind, 1, lent)
            self.links[1].attach(ends[1], BORROWER, kind, 2, 0)
        self._place()

    def _place(self) -> None:
        """All threads have the same names on both sides; those of the lender were started last."""
        for name in ("ramster-get", "ramster-bulk", "ramster-ship", "ramster-send", "ramster-work"):
            found = sorted(thread for thread, its_name, _ in threads(os.getpid()) if its_name == name)
            for thread, core in zip(found, (HERE, THERE), strict=True):
                os.sched_setaffinity(thread, {core})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for links in self.links:
            links.stop()
        for store in self.stores:
            store.close()

    def fill(self, pages: bytes) -> tuple[int, list[tuple[int, int]]]:
        """A pool with these pages, and the sealed segments that they fill."""
        pool = self.stores[0].create_pool(pages=len(pages) // PAGE)
        _floors.store_put_pages(self.stores[0], pool, pages)
        self.stores[0].seal_open()
        return pool, [(segment, generation) for segment, generation, *_ in self.stores[0].coldest(4096)]

    def ship(self, segments: list[tuple[int, int]]) -> float:
        """MB/s of sealed bytes, until the lender has said that it has the last one."""
        borrower = self.links[0]
        before = borrower.counters()["bytes_shipped"]
        begin = time.perf_counter()
        for segment, generation in segments:
            while not borrower.ship(segment, generation, LENDER):
                time.sleep(0.001)
        deadline = begin + SHIP_S
        while self.stores[0].statistics().segments_local:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"not every segment left within {SHIP_S:.0f} s")
            time.sleep(0.0005)
        took = time.perf_counter() - begin
        return float(borrower.counters()["bytes_shipped"] - before) / took / 1e6

    def forget(self, pool: int) -> None:
        """Destroy the pool, and wait until the lender has its memory back."""
        self.stores[0].destroy_pool(pool)
        lender = self.links[1]
        wait_until(lambda: lender.counters()["lent_free"] == lender.counters()["lent_frames"], "the lender is empty")


def bench_remotify(tls: Tls, pages: bytes, rounds: int) -> Row:
    with Engines(tls, len(pages)) as engines:

        def ours() -> float:
            pool, segments = engines.fill(pages)
            speed = engines.ship(segments)
            engines.forget(pool)
            return speed

        return compare(
            "remotify, sealed bytes",
            "MB/s",
            ours,
            "TLS stream, writes of 256 KiB",
            lambda: tls.stream(len(pages) // 2),
            rounds=rounds,
            more_is_better=True,
        )


def bench_get(tls: Tls, pages: bytes, rounds: int) -> list[Row]:
    count = len(pages) // PAGE
    words = np.frombuffer(pages, np.uint64)[:: PAGE // 8]
    random = np.random.default_rng(1)
    gets = min(count // 4, 4096)
    with Engines(tls, len(pages)) as engines, on_core(HERE):
        pool, segments = engines.fill(pages)
        engines.ship(segments)

        def ours() -> Nanoseconds:
            order = random.permutation(count)[:gets]
            return same(_touch.get_pages(engines.links[0], pool, order), words[order], "remote get")

        return compare_latencies(
            "remote get, one at a time",
            ours,
            "TLS ping-pong, 4 KiB",
            lambda: tls.pair.ping_pong(PAGE, gets),
            rounds=rounds,
        ) + bench_redis(pages, ours, rounds)


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[socket.socket]:
    """A Redis that keeps everything in memory, on a Unix socket and on the lender's core."""
    path = directory / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"],
        cwd=directory,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: path.exists() or server.poll() is not None, "redis-server listens")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            place(server.pid, THERE)
            yield client
    finally:
        server.terminate()
        server.wait()


def command(*parts: bytes) -> bytes:
    """A request in Redis's protocol."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def bench_redis(pages: bytes, ours: Callable[[], Nanoseconds], rounds: int) -> list[Row]:
    """Uncompressed pages, no TLS, a Unix socket: the fastest way to ask it, with the overhead of a Python client."""
    if shutil.which("redis-server") is None:
        return [Row("remote get beside Redis", None, "us", "", None, note="skipped: redis-server is not installed")]
    count = min(len(pages) // PAGE, 4096)
    with tempfile.TemporaryDirectory(prefix="ramster-") as directory, redis(Path(directory)) as client:
        stream = client.makefile("rb")
        for page in range(count):
            client.sendall(command(b"SET", b"page:%d" % page, pages[page * PAGE : (page + 1) * PAGE]))
            if stream.readline() != b"+OK\r\n":
                raise ConnectionError("Redis did not take a page")

        def floor() -> Nanoseconds:
            took = np.empty(count, np.uint64)
            for page in range(count):
                request = command(b"GET", b"page:%d" % page)
                begin = time.perf_counter_ns()
                client.sendall(request)
                size = int(stream.readline()[1:])
                stream.read(size + 2)
                took[page] = time.perf_counter_ns() - begin
            return took

        rows = compare_latencies(
            "remote get beside Redis", ours, "Redis GET, no TLS, Python client", floor, rounds=rounds
        )
        stream.close()
        return rows


class RemoteRegion:
    """A region all of whose pages are on another node, a quarter of them resident at a time."""

    def __init__(self, nodes: Cluster, pages: bytes) -> None:
        self.count = len(pages) // PAGE
        self.pids = [node.process.pid for node in nodes.nodes.values() if node.process is not None]
        self.random = np.random.default_rng(1)
        self.source = np.frombuffer(pages, np.uint8)
        self.words = self.source.view(np.uint64)[:: PAGE // 8]
        self.region = ramster.connect(nodes["a"].region_socket).region(
            len(pages), resident=len(pages) // 4, name="bench"
        )
        self.memory = self.region.array((len(pages),), np.uint8)
        self.memory[:] = self.source
        self.region.evict()
        wait_until(lambda: self.region.statistics().remote_pages > self.count - OPEN_PAGES, "the pages are remote")
        for pid, core in zip(self.pids, (HERE, THERE), strict=True):
            place(pid, core)

    def close(self) -> None:
        """At the end of a run that went well; after a failure the region goes with the process."""
        del self.memory
        self.region.close()

    def some(self) -> NDArray[np.int64]:
        return self.random.permutation(self.count - OPEN_PAGES)[: self.count // 8]

    def touch(self) -> Nanoseconds:
        self.region.evict()
        order = self.some()
        return same(_touch.read_pages(self.memory, order), self.words[order], "region")

    def walk(self) -> float:
        """MB/s of uncompressed pages, read in order."""
        took = same(_touch.read_pages(self.memory, np.arange(self.count)), self.words, "region")
        return self.count * PAGE * 1e3 / float(took.sum())

    def burnt(self) -> str:
        before = [cpu_ns(pid) for pid in self.pids]
        faults = len(self.touch())
        borrower, lender = ((cpu_ns(pid) - b) / faults / 1000 for pid, b in zip(self.pids, before, strict=True))
        return f"CPU per fault: {borrower:.0f} us of the borrower, {lender:.0f} us of the lender"


def bench_region(tls: Tls, pages: bytes, rounds: int) -> list[Row]:
    size = len(pages)
    sections: dict[str, Sections] = {
        "a": {"arena": {"size": 2 * size}, "remotify": {"cold_after": "20ms"}},
        "b": {"lend": {"size": 2 * size}},
    }
    with cluster(sections) as nodes:
        r = RemoteRegion(nodes.start(), pages)
        with on_core(HERE):
            rows = compare_latencies(
                "remote fault, random",
                r.touch,
                "bare handler + TLS ping-pong, 4 KiB",
                lambda: _touch.bare_fault(r.some(), r.count, tls=tls.pair, core=HERE)[0],
                rounds=rounds,
                note=r.burnt,
            )
            rows.append(
                compare(
                    "remote sequential pass, uncompressed bytes",
                    "MB/s",
                    r.walk,
                    "TLS stream, writes of 256 KiB",
                    lambda: tls.stream(size),
                    rounds=rounds,
                    more_is_better=True,
                    note=f"pages compress {size / (r.count * _touch.Blocks(r.source).stored):.2f} : 1",
                )
            )
        r.close()
    return rows


def run(quick: bool) -> list[Row]:
    pages, rounds = same_pages(2048 if quick else 16384), 3 if quick else 9
    with tempfile.TemporaryDirectory(prefix="ramster-") as directory:
        tls = Tls(Path(directory) / "cluster")
        with on_core(HERE):
            rows = [bench_remotify(tls, pages, rounds)]
        rows += bench_get(tls, pages, rounds)
        try:
            _touch.bare_fault(np.zeros(1, np.int64), 1)
            rows += bench_region(tls, pages, rounds)
        except (PermissionMissing, KernelUnsupported) as error:
            rows.append(Row("remote faults of a region", None, "us", "", None, note=f"skipped: {error}"))
        tls.pair.close()
    return rows
