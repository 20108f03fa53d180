"""The spill file's documented face: makes, reserves and locks the file, and says how it does.

The mechanism and its rules are in `_spill.pyx`, the bytes in docs/spill.md. When something goes there is decided by
`ramster.remotify`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ramster.config.units import format_bytes
from ramster.constants import MIB
from ramster.engine import _spill
from ramster.engine.layout import SPILL_FIRST_IMAGE, SPILL_HEADER, SPILL_MAGIC, SPILL_VERSION
from ramster.engine.links import Links
from ramster.engine.own_file import Kind, open_own, words
from ramster.errors import StoreFull, UsageError

#: file systems that lie in RAM themselves
IN_MEMORY = ("tmpfs", "ramfs")

KIND = Kind("spill file", "[spill] path", SPILL_MAGIC)


@dataclass(frozen=True, slots=True)
class SpillStatistics:
    """One look. Bytes are of whole rooms; errors are counted since the start.

    waiting: segments that are to be written; refused: images that found no room; merged: sparse images that went into
    fuller ones; compacted: images written anew without what was dead. Of copies of what lenders have: given_up for
    want of room, copied after the lender had it. reads counts requests of the disk, of
    one page or several of a segment; the times are from the request to its answer. cuts: how often somebody else had
    cut the file short; pages_cut: pages that this has cost, counted when it was found.
    """

    bytes_total: int
    bytes_used: int
    waiting: int
    reads: int
    pages_read: int
    read_p50_us: int
    read_p99_us: int
    writes: int
    bytes_written: int
    read_errors: int
    write_errors: int
    refused: int
    merged: int
    compacted: int
    given_up: int
    copied: int
    cuts: int
    pages_cut: int
    last_error: str
    direct: bool
    metadata_bytes: int


class Spill(_spill.Spill):
    """A file on a disk as the last tier of a store: what was ordered to SPILL_PEER, and copies of what lenders have.

    Args:
        links: whose store's segments it takes; once per links, before anything is shipped.
        path: the file; made (mode 0600) when missing. What it held is discarded. It must be an ordinary file that is
            empty or was a spill file before.
        size_bytes: reserved on the disk at once where the file system can (`reserved`).
        mirror: every persistent segment that goes to a lender is written here first, where there is room, else later
            (`tend`). Segments of a lender that is lost, or does not answer, are read from here then.
        threads: that wait for the disk; all but one of them only read. With a mirror one more asks lenders for what
            is to be copied.

    What is written is sealed: the keys are in this process's RAM alone, so nothing of it can be read by anybody else
    or survives this process. It ends with the links; `close` empties the file.

    Raises PermissionMissing, StoreFull (the disk has less room than size_bytes) or UsageError; then no file was left.
    """

    def __new__(cls, links: Links, path: Path, size_bytes: int, *, mirror: bool = False, threads: int = 2) -> Self:
        image_bytes = int(links.store.counters()["segment_bytes"])
        images = (size_bytes - SPILL_FIRST_IMAGE) // image_bytes
        if images < 1:
            least = format_bytes(image_bytes + SPILL_FIRST_IMAGE)
            raise UsageError(f"a spill file of {format_bytes(size_bytes)}: it must be at least {least}, one segment")
        fd, made = open_own(path, KIND)
        try:
            os.ftruncate(fd, 0)
            reserved = _reserve(fd, path, SPILL_FIRST_IMAGE + images * image_bytes)
            header = struct.pack(
                SPILL_HEADER.format, SPILL_MAGIC, SPILL_VERSION, image_bytes, images, links.number, os.getpid()
            )
            _write_header(fd, path, header)
            direct = _set_direct(fd)
            self = super().__new__(cls, links, fd, images, header, direct, mirror, threads)
        except BaseException:
            os.close(fd)
            if made:
                path.unlink(missing_ok=True)
            raise
        self._fd = fd
        self.path = path
        self.mirror = mirror
        self.reserved = reserved
        self.linked = True
        self._cuts = 0
        self.file_system = _file_system(path)
        return self

    _fd: int
    path: Path
    mirror: bool
    reserved: bool
    linked: bool
    file_system: str
    _cuts: int

    @property
    def in_memory(self) -> bool:
        """Whether the file lies in RAM: then it is no tier of its own."""
        return self.file_system in IN_MEMORY

    def look(self) -> None:
        """Cheap, for every tick: has somebody cut the file short (`cuts`), or removed its name (`linked`)?

        What was cut off is marked as lost, and the file made as long as it was, with its room reserved again where the
        disk has it. A file without a name is used all the same, until this node ends.
        """
        if self._fd < 0:
            return
        self.linked = os.fstat(self._fd).st_nlink > 0
        self.look_at_length()
        counters = self.counters()
        if counters["cuts"] != self._cuts:
            self._cuts = counters["cuts"]
            if self.reserved:
                try:
                    _spill.reserve(self._fd, os.fstat(self._fd).st_size)
                except OSError:
                    self.reserved = False

    def statistics(self) -> SpillStatistics:
        return SpillStatistics(**self.counters())

    def close(self) -> None:
        """After the links have stopped: empty the file, so that the disk has its room again. Again: does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)


def _reserve(fd: int, path: Path, size: int) -> bool:
    """Take the room on the disk now; False where the file system cannot promise it."""
    room = os.fstatvfs(fd)
    free = room.f_bavail * room.f_frsize
    short = (
        f"the disk of the spill file {path} has {format_bytes(free - free % MIB)} free "
        f"of the {format_bytes(size - size % MIB)} wanted; set a smaller [spill] size or another path"
    )
    if free < size:
        raise StoreFull(short)
    try:
        _spill.reserve(fd, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            os.ftruncate(fd, size)
            return False
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(short) from error
        raise StoreFull(
            f"cannot reserve {format_bytes(size)} for the spill file {path}: {words(error)}; set less [spill] size"
        ) from error
    return True


def _write_header(fd: int, path: Path, header: bytes) -> None:
    try:
        os.pwrite(fd, header.ljust(SPILL_FIRST_IMAGE, b"\0"), 0)
    except OSError as error:
        raise StoreFull(f"cannot write the spill file {path}: {words(error)}; set another [spill] path") from error


def _set_direct(fd: int) -> bool:
    """Past the page cache, where the file system can."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        return False
    return True


def _file_system(path: Path) -> str:
    """Its type, such as ext4; "" when it cannot be told."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return ""
