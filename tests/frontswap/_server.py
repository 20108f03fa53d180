"""A node with only the region front end, in a process of its own: the product's service over a plain Python region.

`ReferenceRegion` answers faults with fcntl ioctls under one lock, slowly and simply: an oracle for the engine's region
and a server whose misbehaviour a test can choose. Run as `python _server.py RUN_DIR [options]`; prints "ready" once it
listens, "stalled PAGE" when it has read a fault that it will not answer, "gone NAME" when a region was closed.
"""

import argparse
import asyncio
import ctypes
import fcntl
import os
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from ramster.engine.links import Links
from ramster.engine.region import Region
from ramster.engine.store import Store
from ramster.errors import Refused, RegionFull, RegionLost
from ramster.frontswap import messages
from ramster.frontswap.region_service import RegionService

PAGE = 4096
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_WRITEPROTECT = 0xC018AA06
UFFDIO_CONTINUE = 0xC020AA07
UFFDIO_POISON = 0xC020AA08
FEATURE_POISON = 1 << 14
FLAG_WP = 2
COPY_MODE_WP = 2
FALLOC_FL_KEEP_SIZE_PUNCH_HOLE = 0x1 | 0x2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def pattern(page: int) -> bytes:
    """Bytes of a page that no other page has, and that are not zeros."""
    return struct.pack("<Q", ((page + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)) * (PAGE // 8)


class ReferenceRegion:
    """What RegionService needs of a region, as plain as can be. `lost`, `stalled`: pages that go wrong on purpose."""

    def __init__(
        self,
        pages: int,
        resident_pages: int,
        name: str,
        *,
        initial: Callable[[int], bytes] | None = None,
        lost: range = range(0),
        stalled: range = range(0),
        notes: list[str] | None = None,
    ) -> None:
        self.pages, self.resident_pages, self.name = pages, resident_pages, name
        self.memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, pages * PAGE)
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._initial = initial
        self._lost, self._stalled, self._notes = set(lost), stalled, notes or []
        self._guard, self._guard_away = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._guard.settimeout(10)
        self._lock = threading.Lock()
        self._stored: dict[int, bytes] = {}
        self._pins: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._uffd = -1
        self._joined = False

    def join(self) -> tuple[int, int]:
        if self._joined:
            raise Refused("the reference serves one process")
        self._joined = True
        return 0, os.dup(self._guard_away.fileno())

    def detach(self, number: int) -> None:
        raise AssertionError("only one process, and the last one closes")

    def attach(self, number: int, uffd: int, base: int, features: int) -> None:
        self._uffd, self._base, self._poison = uffd, base, bool(features & FEATURE_POISON)
        # The application's copy is the only one left: its end of file is the application's business, ours is ours.
        self._guard_away.close()
        for note in self._notes:
            self._guard.send(messages.GUARD.pack(messages.GUARD_NOTE, 0, 0, 0, note.encode()))
            self._guard.recv(messages.GUARD.size)  # it is written
        self._thread = threading.Thread(target=self._serve, name="faults")
        self._thread.start()

    # -- faults

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                return
            try:
                message = os.read(self._uffd, 32)
            except BlockingIOError:
                continue
            event, flags, address = struct.unpack_from("<B7xQQ", message)
            assert event == 0x12
            with self._lock:
                self._fault((address - self._base) // PAGE, flags)

    def _fault(self, page: int, flags: int) -> None:
        if flags & FLAG_WP:
            self._counts["faults_wp"] += 1
            self._request(UFFDIO_WRITEPROTECT, page, 1, 0)
            self._wake(page, 1)
        elif page in self._stalled:
            print("stalled", page, flush=True)
        elif not self._present(page) and page in self._lost and page in self._stored:
            self._mark_lost(page)
        else:
            self._counts["faults"] += 1
            self._fill(page)

    def _present(self, page: int) -> bool:
        try:
            return os.lseek(self.memfd, page * PAGE, os.SEEK_DATA) == page * PAGE
        except OSError:
            return False

    def _fill(self, page: int) -> None:
        if self._present(page):
            try:
                self._request(UFFDIO_CONTINUE, page, 1, 0, 0)
            except FileExistsError:
                self._wake(page, 1)
            return
        data = self._stored.get(page)
        if data is None:
            data = self._initial(page) if self._initial else bytes(PAGE)
        source = ctypes.create_string_buffer(data, PAGE)
        copy = bytearray(
            struct.pack("<QQQQq", self._base + page * PAGE, ctypes.addressof(source), PAGE, COPY_MODE_WP, 0)
        )
        try:
            fcntl.ioctl(self._uffd, UFFDIO_COPY, copy)
        except FileExistsError:
            self._wake(page, 1)

    def _request(self, number: int, page: int, pages: int, *rest: int) -> None:
        fcntl.ioctl(
            self._uffd,
            number,
            bytearray(struct.pack(f"<{2 + len(rest)}Q", self._base + page * PAGE, pages * PAGE, *rest)),
        )

    def _wake(self, page: int, pages: int) -> None:
        self._request(UFFDIO_WAKE, page, pages)

    def _mark_lost(self, page: int) -> None:
        if self._poison:
            self._request(UFFDIO_POISON, page, 1, 0, 0)
            return
        record = messages.GUARD.pack(messages.GUARD_LOST, 0, page, 1, b"")
        self._guard.send(record)
        assert self._guard.recv(256) == record

    # -- requests

    def _lost_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        return [(page, 1) for page in range(first, first + count) if page in self._lost and page in self._stored]

    def pin(self, number: int, first: int, count: int) -> None:
        with self._lock:
            if runs := self._lost_runs(first, count):
                raise RegionLost("lost", runs)
            asked = set(range(first, first + count))
            if len(asked | {page for page, times in self._pins.items() if times}) > self.resident_pages:
                raise RegionFull("more than the budget would be pinned")
            for page in asked:
                self._pins[page] += 1
                self._fill(page)

    def unpin(self, number: int, first: int, count: int) -> None:
        with self._lock:
            if any(self._pins[page] < 1 for page in range(first, first + count)):
                raise ValueError("not pinned")
            self._pins.subtract(range(first, first + count))

    def prefetch(self, number: int, first: int, count: int) -> int:
        with self._lock:
            if runs := self._lost_runs(first, count):
                raise RegionLost("lost", runs)
            for page in range(first, first + count):
                self._fill(page)
            return count

    def evict(self, first: int, count: int) -> int:
        evicted = 0
        with self._lock:
            for page in range(first, first + count):
                if self._pins[page] or not self._present(page):
                    continue
                self._request(UFFDIO_WRITEPROTECT, page, 1, 1)
                self._stored[page] = os.pread(self.memfd, PAGE, page * PAGE)
                if _libc.fallocate(self.memfd, FALLOC_FL_KEEP_SIZE_PUNCH_HOLE, page * PAGE, PAGE):
                    raise OSError(ctypes.get_errno(), "fallocate")
                self._request(UFFDIO_WRITEPROTECT, page, 1, 0)
                self._wake(page, 1)
                evicted += 1
        return evicted

    def discard(self, first: int, count: int) -> int:
        with self._lock:
            for page in range(first, first + count):
                self._stored[page] = bytes(PAGE)
                if _libc.fallocate(self.memfd, FALLOC_FL_KEEP_SIZE_PUNCH_HOLE, page * PAGE, PAGE):
                    raise OSError(ctypes.get_errno(), "fallocate")
        return count

    def advise(self, kind: str, first: int, count: int) -> None:
        """Changes nothing that can be seen."""

    def check(self, first: int, count: int) -> list[tuple[int, int]]:
        with self._lock:
            return self._lost_runs(first, count)

    def troubles(self) -> tuple[int, int, int, bool]:
        return 0, 0, 0, False

    def wait_when_full(self, hold_ms: int) -> None:
        """It is never full."""

    def statistics(self) -> dict[str, int]:
        with self._lock:
            return {
                "pages": self.pages,
                "budget_pages": self.resident_pages,
                "pinned_pages": sum(1 for times in self._pins.values() if times),
                "full": 0,
                **self._counts,
            }

    def close(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._uffd)
        os.close(self._stop)
        os.close(self.memfd)
        print("gone", self.name, flush=True)
        self._guard.close()
        self._guard_away.close()


class EngineRegion(Region):
    """The product's, which says when it was closed like the reference does."""

    told = False

    def close(self) -> None:
        super().close()
        if not self.told:
            self.told = True
            print("gone", self.name, flush=True)


def _range(text: str) -> range:
    first, _, count = text.partition(":")
    return range(int(first), int(first) + int(count))


async def _serve(arguments: argparse.Namespace) -> None:
    settings = SimpleNamespace(
        resident_default_bytes=1 << 20,
        resident_max_bytes=arguments.resident_max,
        node_wait_ms=arguments.node_wait_ms,
        poison=arguments.poison,
    )

    store = Store(64 << 20, lock=False)
    links = Links(store, 1)

    def make_engine_region(pages: int, resident_pages: int, name: str) -> Region:
        region = EngineRegion(
            links,
            pages,
            resident_pages,
            name=name,
            poison=arguments.poison,
            fault_threads=arguments.threads,
            busy_poll_us=arguments.busy_poll,
            evictor_threads=arguments.threads,
        )
        for page in range(pages if arguments.pattern else 0):
            store.put(region.pool, page, pattern(page))
        return region

    def make_region(pages: int, resident_pages: int, name: str) -> ReferenceRegion:
        return ReferenceRegion(
            pages,
            resident_pages,
            name,
            initial=pattern if arguments.pattern else None,
            lost=arguments.lost,
            stalled=arguments.stalled,
            notes=arguments.note,
        )

    service = RegionService(arguments.run_dir, make_engine_region if arguments.engine else make_region, settings)
    await service.start()
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(0, done.set)  # the test closes our standard input
    await done.wait()
    await service.close()
    store.verify()
    assert store.statistics().pages_stored == 0, "a closed region left pages behind"
    links.stop()
    print("closed", service.counters, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--engine", action="store_true", help="regions of the engine, without peers")
    parser.add_argument("--threads", type=int, default=1, help="of each kind that an engine's region has")
    parser.add_argument("--busy-poll", type=int, default=0)
    parser.add_argument("--pattern", action="store_true")
    parser.add_argument("--lost", type=_range, default=range(0))
    parser.add_argument("--stalled", type=_range, default=range(0))
    parser.add_argument("--poison", default="auto")
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--node-wait-ms", type=int, default=100)
    parser.add_argument("--resident-max", type=int, default=0)
    asyncio.run(_serve(parser.parse_args()))
