"""Swap of this kernel on an export, beside what one would take instead, in verified pages per second.

An export becomes a block device through nbdfuse and a loop device, whether or not the kernel has an nbd module, so that
all machines measure the same; nbdkit's memory plugin takes the same way and is the floor. zram and a file on the disk
stand in the note. The program is that of `hog`: every byte of each page that it visits is compared. Skipped, with the
reason, where swap cannot be set up; whatever happens, swap, devices, mounts and cgroup are taken away again.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench.hog import Hog, interruptible, memory_cgroup, swap, zram
from bench.nbd import OURS, PLAIN, Server, beside, nbdkit, ours
from bench.rows import Row, Unavailable

from ramster.errors import KernelUnsupported, Refused, ToolMissing
from ramster.frontswap.devices import Bridge, Place, detach

MIB: Final = 1 << 20
CONNECTIONS: Final = 4  # as `swap on` has it
DISK: Final = Path("/var/tmp")  # kept when a machine restarts, so it is no tmpfs
# order of the walk, name of the path; every second page is rewritten
WALKS: Final = (
    ("random", "swap on an export, verifying random walk, half rewritten"),
    ("sequential", "swap on an export, verifying sequential pass, half rewritten"),
)
Device = Callable[[], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def bridged(server: Server, folder: Path) -> Iterator[None]:
    """An export is swap, as `ramster swap on --way bridge` makes it."""
    place = Place(server.export, folder.resolve(), server.socket, secrets.token_hex(8))
    try:
        try:
            device = Bridge().attach(place, CONNECTIONS, lambda _: None)
        except (ToolMissing, KernelUnsupported, Refused) as error:
            raise Unavailable(str(error)) from None
        with swap(device, "--discard=pages"):
            yield
    finally:
        detach(place, None)


@contextlib.contextmanager
def disk_file(size: int) -> Iterator[None]:
    """A swap file."""
    with tempfile.NamedTemporaryFile(dir=DISK, prefix="ramster-bench-") as file:
        for _ in range(size // MIB):  # a swap file may have no holes
            file.write(bytes(MIB))
        file.flush()
        with swap(file.name):
            yield


def walked(device: Device, group: Path, size: int, resident: int, seconds: float) -> dict[str, float]:
    """Pages per second of each walk on one device, by the path's name."""
    with device(), Hog("cgroup", group, size, resident) as hog:
        return {name: hog.rate(order, 2, seconds) for order, name in WALKS}


def run(quick: bool) -> list[Row]:
    size, resident, seconds, rounds = (96 * MIB, 48 * MIB, 0.2, 1) if quick else (128 * MIB, 64 * MIB, 2.0, 4)
    room = size * 5 // 4
    missing: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruptible())
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramster-bench-")))
            group = stack.enter_context(memory_cgroup(resident))
            plain = stack.enter_context(nbdkit(PLAIN, folder, room))
            node = stack.enter_context(ours(room, swap=True))
            devices: dict[str, Device] = {
                PLAIN: lambda: bridged(plain, folder),
                OURS: lambda: bridged(node, folder),
                "zram": lambda: zram(room),
                "disk file": lambda: disk_file(room),
            }
            found: list[dict[str, dict[str, float]]] = []
            for _ in range(rounds):
                found.append({})
                for name, device in list(devices.items()):
                    try:
                        found[-1][name] = walked(device, group, size, resident, seconds)
                    except Unavailable as error:
                        if name in (PLAIN, OURS):
                            raise
                        missing.append(f"{name}: {error}")
                        del devices[name]
    except Unavailable as error:
        return [Row("swap on an export", None, "pages/s", "", None, note=f"skipped: {error}")]
    note = "; ".join([f"{size // MIB} MiB in {resident // MIB}, through nbdfuse and a loop device", *missing])
    return [
        beside(
            path,
            "pages/s",
            [{name: rates[path] for name, rates in each.items()} for each in found],
            note,
            more_is_better=True,
        )
        for _, path in WALKS
    ]
