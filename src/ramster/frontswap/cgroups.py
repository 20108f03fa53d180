"""Memory cgroups of both versions: where a new one may be made, its limit, what it has seen, and its end.

A group here is one directory of the hierarchy that has the memory controller. Where that is version 1 and the kernel
mounts version 2 as well (hybrid), a second directory there adds what version 1 lacks: the time stalled for memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ramster.errors import KernelUnsupported, PermissionMissing

EMPTY_S: Final = 10.0  # for processes that were killed to go; one in the middle of a swap-in takes its time
_POLL_S: Final = 0.02  # a cgroup is busy until the last killed process is gone, and does not tell
# cgroup v1 refuses no limit, but none below a page makes sense; one below this kills every program at once.
LIMIT_BYTES_MIN: Final = 1 << 20
SWAPPINESS_MIN: Final = 60  # the kernel's own default


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where cgroups are on this machine and where this process is in them; None: not mounted.

    memory: (version, mount point, own path below it) of the hierarchy with the memory controller.
    unified: (mount point, own path) of version 2, whatever controllers it has.
    """

    memory: tuple[Literal[1, 2], Path, str] | None
    unified: tuple[Path, str] | None


def hierarchies(mounts: str | None = None, own: str | None = None) -> Hierarchies:
    """Read from the texts of /proc/self/mounts and /proc/self/cgroup."""
    mounts = os.fsdecode(Path("/proc/self/mounts").read_bytes()) if mounts is None else mounts
    own = _text(Path("/proc/self/cgroup")) if own is None else own
    paths = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    first: tuple[Literal[1, 2], Path, str] | None = None
    unified: tuple[Path, str] | None = None
    for line in mounts.splitlines():
        _, where, kind, options, *_ = line.split(" ")
        mount = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), where))
        if kind == "cgroup" and "memory" in options.split(",") and first is None:
            first = (1, mount, paths.get("memory", "/"))
        elif kind == "cgroup2" and unified is None:
            unified = (mount, paths.get("", "/"))
    if first is None and unified is not None and "memory" in _text(unified[0] / "cgroup.controllers").split():
        first = (2, *unified)
    return Hierarchies(first, unified)


def _text(path: Path) -> str:
    """The file's content; "" where it is not there or says nothing to us."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def table(text: str) -> dict[str, int]:
    """Lines of a name and a number, as in memory.stat."""
    fields = (line.split() for line in text.splitlines())
    return {each[0]: int(each[1]) for each in fields if len(each) == 2 and each[1].isdigit()}


def stalled_us(pressure: str) -> tuple[int, int] | None:
    """(some, full) microseconds of a memory.pressure file; None where it has none."""
    found = dict(re.findall(r"^(some|full) .*\btotal=(\d+)", pressure, re.MULTILINE))
    return (int(found["some"]), int(found.get("full", 0))) if "some" in found else None


class Group:
    """A new, empty cgroup; `remove` ends it. Survives this process: whoever makes one sees to its end.

    name: of the directory. Raises PermissionMissing where this user may make none, KernelUnsupported without a memory
    controller.
    """

    def __init__(self, name: str, where: Hierarchies | None = None) -> None:
        where = where or hierarchies()
        if where.memory is None:
            raise KernelUnsupported(
                "no cgroup hierarchy with the memory controller is mounted; "
                "mount one (mount -t cgroup2 none /sys/fs/cgroup), or boot without cgroup_disable=memory"
            )
        self.version, mount, own = where.memory
        self.path = _make(mount, own, name, self.version)
        self.pressure_path: Path | None = self.path if self.version == 2 else None
        if self.version == 1 and where.unified is not None:
            with contextlib.suppress(PermissionMissing, OSError):
                self.pressure_path = _make(*where.unified, name, 1)

    @property
    def paths(self) -> list[Path]:
        return list(dict.fromkeys(path for path in (self.path, self.pressure_path) if path is not None))

    def limit(self, size: int) -> None:
        """At most `size` bytes of RAM from now on, and as much swap as there is."""
        if self.version == 2:
            (self.path / "memory.max").write_text(str(size))
            with contextlib.suppress(FileNotFoundError):  # no swap accounting: swap has no limit anyway
                (self.path / "memory.swap.max").write_text("max")
            with contextlib.suppress(FileNotFoundError):  # killed as one, so that no half of a pipeline stays
                (self.path / "memory.oom.group").write_text("0")
            return
        (self.path / "memory.limit_in_bytes").write_text(str(size))
        if (now := _number(self.path / "memory.swappiness")) is not None and now < SWAPPINESS_MIN:
            (self.path / "memory.swappiness").write_text(str(SWAPPINESS_MIN))

    def never_swap(self) -> bool:
        """What runs in it stays out of swap as far as cgroups can see to it. True: for certain (version 2)."""
        if self.version == 2:
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")
                return True
            return False
        with contextlib.suppress(OSError):
            (self.path / "memory.swappiness").write_text("0")
        return False

    def join(self) -> None:
        """This process enters it. Between fork and exec: opens, writes, closes, nothing else."""
        for path in self.paths:
            descriptor = os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"0")
            finally:
                os.close(descriptor)

    def add(self, pid: int) -> None:
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(pid))

    def processes(self) -> list[int]:
        return processes(self.path)

    # --- what it has seen -----------------------------------------------------------------------------------------

    def memory_now(self) -> int:
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return _number(self.path / name) or 0

    def memory_peak(self) -> int | None:
        """Bytes; None: this kernel keeps no peak (version 2 before Linux 5.19)."""
        return _number(self.path / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"))

    def swap_now(self) -> int | None:
        if self.version == 2:
            return _number(self.path / "memory.swap.current")
        return table(_text(self.path / "memory.stat")).get("total_swap")

    def swap_peak(self) -> int | None:
        return _number(self.path / "memory.swap.peak") if self.version == 2 else None

    def swapped_pages(self) -> tuple[int, int] | None:
        """(in, out) since it was made, where the kernel counts them for each group."""
        stat = table(_text(self.path / "memory.stat"))
        return (stat["pswpin"], stat["pswpout"]) if {"pswpin", "pswpout"} <= stat.keys() else None

    def oom_kills(self) -> int | None:
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return table(_text(self.path / name)).get("oom_kill")

    def stalled_us(self) -> tuple[int, int] | None:
        """(some, full): microseconds in which some task, or every task, of it waited for memory; None: not counted."""
        return None if self.pressure_path is None else stalled_us(_text(self.pressure_path / "memory.pressure"))

    def remove(self, deadline_s: float = EMPTY_S) -> int:
        """Kill what still runs in it, remove it. How many processes were killed. Again: does nothing.

        OSError when something does not go in time.
        """
        return remove(self.paths, deadline_s)


def processes(path: Path) -> list[int]:
    """Of one directory; none where it is gone."""
    return [int(line) for line in _text(path / "cgroup.procs").split()]


def _kill(pid: int, path: Path) -> None:
    """Only while it is in the group: its number may have gone to another process since the list was read."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if pid in processes(path):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def remove(paths: list[Path], deadline_s: float = EMPTY_S) -> int:
    """As `Group.remove`, for directories that somebody else left."""
    killed: set[int] = set()
    until = time.monotonic() + deadline_s
    for path in paths:
        while path.is_dir():
            running = processes(path)
            for pid in running:
                killed.add(pid)
                _kill(pid, path)
            try:
                for below in sorted(path.rglob("*/"), key=lambda each: -len(each.parts)):
                    if below.is_dir():  # a command that makes groups of its own
                        remove([below], max(0.0, until - time.monotonic()))
                path.rmdir()
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > until:
                    raise
                time.sleep(_POLL_S)
    return len(killed)


def tight(where: Hierarchies | None = None) -> Iterator[tuple[Path, int, int]]:
    """(group, bytes it has in swap, its limit) of each group whose limit leaves no room for what it has in swap.

    Page cache counts as room. Of a tree of such groups, the topmost alone.
    """
    where = where or hierarchies()
    if where.memory is None:
        return
    version, mount, _ = where.memory
    for name, below, _ in os.walk(mount):
        path = Path(name)
        stat = table(_text(path / "memory.stat"))
        if version == 2:
            swapped, limit = _number(path / "memory.swap.current") or 0, _number(path / "memory.max")
            kept = stat.get("anon", 0) + stat.get("shmem", 0)
        else:
            swapped, limit = stat.get("total_swap", 0), stat.get("hierarchical_memory_limit")
            kept = stat.get("total_rss", 0) + stat.get("total_shmem", 0)
        if limit is not None and swapped and swapped + kept > limit:
            yield path, swapped, limit
            below.clear()


def named(pattern: str, where: Hierarchies | None = None) -> Iterator[Path]:
    """Groups of that name, wherever in both hierarchies they stand. Other nodes and containers have theirs there too:
    whoever acts on what is found puts into the name what nobody else has.
    """
    where = where or hierarchies()
    mounts = {each for each in (where.memory and where.memory[1], where.unified and where.unified[0]) if each}
    for mount in mounts:
        yield from mount.rglob(pattern)


def name_for(prefix: str, pid: int) -> str:
    """A group of one process. Numbers count within a PID namespace: another container's 123 is another process."""
    return f"{prefix}-{Path('/proc/self/ns/pid').stat().st_ino}-{pid}"


def stale(prefix: str) -> Iterator[Path]:
    """Groups of our PID namespace, as `name_for` names them, whose process is gone."""
    for path in named(name_for(prefix, 0).removesuffix("0") + "*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            yield path


def _parents(mount: Path, own: str) -> list[Path]:
    """Our own group and those above it, nearest first. A path from outside of our namespace counts as the root."""
    inside = mount / own.lstrip("/")
    if ".." in inside.parts or not inside.is_dir():
        return [mount]
    return [inside, *(parent for parent in inside.parents if parent == mount or mount in parent.parents)]


def _make(mount: Path, own: str, name: str, version: int) -> Path:
    """The new directory, as near below our own group as is allowed: the limits that hold for us hold for it too."""
    failed: OSError | None = None
    for parent in _parents(mount, own):
        if version == 2:
            # A group with processes of its own gives no controllers to those below it; nor do we change what others
            # have set up, but for the root group, where nobody has.
            if "memory" not in _text(parent / "cgroup.subtree_control").split():
                if parent != mount:
                    continue
                with contextlib.suppress(OSError):
                    (parent / "cgroup.subtree_control").write_text("+memory")
            if not os.access(parent / "cgroup.procs", os.W_OK):
                continue
        try:
            (parent / name).mkdir()
        except FileExistsError:
            raise
        except OSError as error:
            failed = error
            continue
        if version == 2 and not (parent / name / "memory.max").exists():
            (parent / name).rmdir()
            continue
        return parent / name
    raise PermissionMissing(
        f"this user may not make a memory cgroup below {mount} ({failed.strerror if failed else 'none is delegated'}); "
        "run it as root"
        + (
            ", or below a service manager of your own: systemd-run --user --scope ramster run ..."
            if version == 2
            else ", or let root make a group that you own and start from there"
        )
    )
