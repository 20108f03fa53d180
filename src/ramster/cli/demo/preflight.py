"""What must hold before the demo starts, each with a sentence that says what to do. Reads only."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from pathlib import Path

from ramster.cli.demo.plan import Options
from ramster.config.units import show_size
from ramster.constants import MIB
from ramster.errors import KernelUnsupported, PermissionMissing, UsageError

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}
_UFFD_USER_MODE_ONLY = 1
# Interpreters, libraries and page tables of all processes of the demo.
_PROCESSES_BYTES = 256 * MIB
_DISK_SLACK = 64 * MIB


def check(options: Options, directory: Path) -> None:
    """Raises PermissionMissing, KernelUnsupported or UsageError for what would fail later and less clearly."""
    check_userfaultfd()
    check_memory(options, available_memory())
    check_disk(options, directory)


def check_userfaultfd() -> None:
    """Raises if no way to make a userfaultfd is open to this process; a user-mode-only one is enough."""
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        return  # unknown machine: the region itself will say
    libc = ctypes.CDLL(None, use_errno=True)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    for extra in (0, _UFFD_USER_MODE_ONLY):
        descriptor = libc.syscall(number, flags | extra)
        if descriptor >= 0:
            os.close(descriptor)
            return
    reason = ctypes.get_errno()
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return
    if reason == errno.ENOSYS:
        raise KernelUnsupported("this kernel has no userfaultfd; use one that is built with CONFIG_USERFAULTFD")
    raise PermissionMissing(
        f"this process may not make a userfaultfd ({os.strerror(reason)}); "
        "in a container allow the userfaultfd system call in its seccomp profile, "
        "elsewhere run `sudo sysctl vm.unprivileged_userfaultfd=1`"
    )


def check_memory(options: Options, available: int) -> None:
    """Raises UsageError if the demo would take more than `available` bytes of RAM."""
    # The plain array and the nodes are not alive at the same time.
    needed = max(options.size, options.shared_bytes()) + _PROCESSES_BYTES
    if needed > available:
        raise UsageError(
            f"the demo needs {show_size(needed)} of RAM here, for both sides of the link, "
            f"and {show_size(available)} are available; make --size smaller"
        )


def available_memory() -> int:
    """Bytes that this process could still take: MemAvailable, or what its control groups leave if that is less."""
    available = _meminfo("MemAvailable")
    for directory in _cgroups():
        try:
            limit = (directory / "memory.max").read_text().strip()
            used = int((directory / "memory.current").read_text())
            cache = next(
                (
                    int(line.split()[1])
                    for line in (directory / "memory.stat").read_text().splitlines()
                    if line.startswith("inactive_file ")
                ),
                0,
            )
        except (OSError, ValueError):
            continue
        if limit != "max":
            available = min(available, max(0, int(limit) - used + cache))
    return available


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KernelUnsupported(f"/proc/meminfo has no {name}; mount /proc")


def _cgroups() -> list[Path]:
    """This process's version 2 control group and those above it."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    path = root / own.lstrip("/")
    return [path, *(parent for parent in path.parents if parent.is_relative_to(root))]


def scratch_parent() -> Path:
    """Where the demo's directory goes: TMPDIR, else the first of /tmp and /var/tmp on a disk, as memmap should be."""
    if os.environ.get("TMPDIR"):
        return Path(tempfile.gettempdir())
    for name in ("/tmp", "/var/tmp"):
        if Path(name).is_dir() and os.access(name, os.W_OK) and file_system(Path(name)) != "tmpfs":
            return Path(name)
    return Path(tempfile.gettempdir())


def file_system(path: Path) -> str:
    """The type of the file system that `path` lies on, "unknown" if /proc does not say."""
    best, kind = -1, "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return kind
    resolved = path.resolve()
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = Path(left.split()[4].replace("\\040", " "))
        # The last of equal mount points is the one on top.
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), right.split()[0]
    return kind


def check_disk(options: Options, directory: Path) -> None:
    """Raises UsageError if `directory` has no room for the source and the memmap file."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    needed = 2 * options.size + _DISK_SLACK
    if needed > free:
        raise UsageError(
            f"the demo writes {show_size(needed)} to {directory} and {show_size(free)} are free there; "
            "free some, set TMPDIR to another disk or make --size smaller"
        )
