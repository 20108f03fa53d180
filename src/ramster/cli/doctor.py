"""What this kernel and this user can do for RAMster, each thing tried or looked up, nothing changed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import re
import shutil
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ramster.constants import MIB, PAGE_BYTES
from ramster.errors import KernelUnsupported, PermissionMissing, RamsterError, ToolMissing
from ramster.frontswap.cgroups import hierarchies
from ramster.frontswap.devices import RESERVE_WANTED, TOOLS, meminfo, reserve_bytes, swaps

State = Literal["ok", "missing", "refused", "note"]

TRY_S: Final = 20.0
ROUNDS: Final = 400
CAPABILITIES: Final = {
    "CAP_SYS_ADMIN": (21, "swapon, mounts and block devices"),
    "CAP_IPC_LOCK": (14, "an arena locked in RAM without a limit"),
    "CAP_SYS_RESOURCE": (24, "PR_SET_IO_FLUSHER and oom_score_adj -1000: a node that reclaim never waits for"),
    "CAP_SYS_NICE": (23, "real-time priority: a node that the kernel's memory reserve is open to"),
}
_UFFD_USER_MODE_ONLY: Final = 1
_UFFDIO_API: Final = 0xC018AA3F
_USERFAULTFD_IOC_NEW: Final = 0xAA00
# bit -> (name, the Linux version that has it)
_UFFD_FEATURES: Final = {
    10: ("minor faults on shared memory", "5.14"),
    12: ("write-protection of shared memory", "5.19"),
    14: ("poison", "6.6"),
}
_SYSCALLS: Final = {
    "x86_64": {"userfaultfd": 323, "io_uring_setup": 425},
    "aarch64": {"userfaultfd": 282, "io_uring_setup": 425},
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line. needed: a kernel cannot swap on a node here while it is not ok. code: the exit code it then gives."""

    name: str
    state: State
    detail: str
    advice: str = ""
    needed: bool = False
    code: int = 0


def checks() -> list[Check]:
    """Everything, in reading order."""
    return [
        *_kernel(),
        *_user(),
        *_guard(),
        *_swap_ways(),
        *_tools(),
        *_cgroups(),
        *_userfaultfd(),
        *_others(),
        *_in_front(),
        *_memory(),
    ]


def exit_code(found: list[Check]) -> int:
    """0 when a kernel can swap on a node here; else that of the first thing to see to: kernel, program, permission."""
    codes = {check.code for check in found if check.needed and check.state != "ok"}
    order = (KernelUnsupported.exit_code, ToolMissing.exit_code, PermissionMissing.exit_code)
    return next((code for code in order if code in codes), 0)


def way(found: list[Check]) -> str | None:
    """How `ramster swap on` would attach: nbd, bridge, or None."""
    there = {check.name for check in found if check.state == "ok"}
    if {"nbd", "nbd-client"} <= there:
        return "nbd"
    return "bridge" if {"fuse", "loop", "nbdfuse", "losetup"} <= there else None


def _kernel() -> Iterator[Check]:
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    page = os.sysconf("SC_PAGESIZE")
    if page != PAGE_BYTES:
        yield Check(
            "kernel",
            "refused",
            f"Linux {release} with pages of {page} bytes",
            "boot a kernel with pages of 4 KiB",
            True,
            KernelUnsupported.exit_code,
        )
    elif version < (5, 19):
        yield Check("kernel", "note", f"Linux {release}: swap works, arrays need 5.19", "a newer kernel, for arrays")
    else:
        yield Check("kernel", "ok", f"Linux {release}")


def _user() -> Iterator[Check]:
    root = os.geteuid() == 0
    yield Check(
        "root",
        "ok" if root else "refused",
        "this user is root" if root else "swap on, swap off and cgroups v1 need root; a node and arrays do not",
        "" if root else "run it with sudo",
        True,
        PermissionMissing.exit_code,
    )
    text = Path("/proc/self/status").read_text()
    effective = int(text.partition("CapEff:")[2].split()[0], 16)
    for name, (bit, what) in CAPABILITIES.items():
        has = bool(effective >> bit & 1)
        advice = "" if has else f"AmbientCapabilities={name} in the node's unit"
        yield Check(
            name,
            "ok" if has else "refused",
            what,
            advice,
            name == "CAP_SYS_ADMIN" and root,
            PermissionMissing.exit_code,
        )


def _guard() -> Iterator[Check]:
    """What a node would be allowed to do to itself."""
    from ramster.node import privileges

    try:
        tried = privileges.checks()
    except RamsterError as error:
        yield Check("guard", "refused", str(error), "see what a node logs when it starts")
        return
    states: dict[str, State] = {"ok": "ok", "refused": "refused", "unsupported": "missing", "off": "note"}
    for each in tried:
        needed = each.name == "locked_memory"
        yield Check(
            each.name, states.get(each.state, "note"), each.detail, each.advice, needed, PermissionMissing.exit_code
        )


def _module(name: str) -> str | None:
    """How the kernel has it: loaded, built in, loadable; None: not at all."""
    release = platform.release()
    if Path("/sys/module", name).exists():
        return "there"
    for folder in ("/lib/modules", "/usr/lib/modules"):
        with contextlib.suppress(OSError):
            if f"/{name}.ko" in Path(folder, release, "modules.builtin").read_text():
                return "built in"
    if shutil.which("modprobe") or Path("/usr/sbin/modprobe").exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            tried = subprocess.run(
                [shutil.which("modprobe") or "/usr/sbin/modprobe", "--dry-run", "--quiet", name],
                capture_output=True,
                timeout=TRY_S,
                stdin=subprocess.DEVNULL,
            )
            if tried.returncode == 0:
                return "a module that can be loaded"
    return None


def _swap_ways() -> Iterator[Check]:
    nbd = _module("nbd")
    fuse = Path("/dev/fuse").exists() or _module("fuse")
    loop = Path("/dev/loop-control").exists() or _module("loop")
    bridge = bool(fuse and loop)
    if nbd:
        yield Check("nbd", "ok", f"{nbd}: swap on takes the fast way")
    else:
        yield Check(
            "nbd",
            "missing",
            "this kernel has none" + (": swap on takes nbdfuse and a loop device, which is slower" if bridge else ""),
            "a kernel with CONFIG_BLK_DEV_NBD (Debian's have it)",
            not bridge,
            KernelUnsupported.exit_code,
        )
    for name, there in (("fuse", fuse), ("loop", loop)):
        yield Check(
            name,
            "ok" if there else "missing",
            "for the way without nbd",
            "" if there else f"modprobe {name}",
        )
    ublk = Path("/dev/ublk-control").exists() or _module("ublk_drv")
    yield Check("ublk", "ok" if ublk else "missing", "not used by this version", "")


def _tools() -> Iterator[Check]:
    nbd = _module("nbd") is not None
    whats = {
        "nbd-client": ("attaches an export to the kernel's nbd", nbd),
        "nbdfuse": ("shows an export as a file, without nbd", not nbd),
        "losetup": ("makes a loop device, without nbd", not nbd),
        "mkswap": ("writes a swap header", True),
        "swapon": ("switches swap on", True),
        "swapoff": ("switches swap off", True),
    }
    for tool, (what, needed) in whats.items():
        there = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
        package = TOOLS[tool].split(" or ")[-1]
        advice = "" if there else f"on Debian: apt-get install {package}"
        yield Check(tool, "ok" if there else "missing", what, advice, needed, ToolMissing.exit_code)


def _cgroups() -> Iterator[Check]:
    where = hierarchies()
    if where.memory is None:
        yield Check("cgroup", "missing", "no memory controller: ramster run cannot limit a command", "mount cgroup2")
    else:
        version, mount, _ = where.memory
        more = "" if version == 2 else "; pages swapped are counted for the machine, not for each command"
        yield Check("cgroup", "ok", f"v{version} at {mount}: ramster run limits a command{more}")
    try:
        Path("/proc/pressure/memory").read_text()
        yield Check("psi", "ok", "the time that tasks wait for memory is counted")
    except OSError:
        yield Check("psi", "missing", "ramster run cannot say how long a command was stalled", "boot with psi=1")


def _userfaultfd() -> Iterator[Check]:
    number = _SYSCALLS.get(platform.machine(), {}).get("userfaultfd")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor, how = -1, ""
    with contextlib.suppress(OSError):
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            descriptor, how = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC), "/dev/userfaultfd"
        finally:
            os.close(device)
    for flags, name in ((0, "the system call"), (_UFFD_USER_MODE_ONLY, "the system call, user mode only")):
        if descriptor < 0 and number is not None:
            descriptor, how = libc.syscall(number, os.O_CLOEXEC | flags), name
    if descriptor < 0:
        unknown = ctypes.get_errno() == errno.ENOSYS or number is None
        yield Check(
            "userfaultfd",
            "missing" if unknown else "refused",
            "arrays larger than RAM (ramster.empty) cannot be made",
            "a kernel with CONFIG_USERFAULTFD"
            if unknown
            else "root may allow it: sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd",
        )
        return
    try:
        answer = bytearray(struct.pack("QQQ", 0xAA, 0, 0))
        fcntl.ioctl(descriptor, _UFFDIO_API, answer)
        features = struct.unpack("QQQ", answer)[1]
    finally:
        os.close(descriptor)
    lacks = [f"{name} (Linux {since})" for bit, (name, since) in _UFFD_FEATURES.items() if not features >> bit & 1]
    must = not features >> 12 & 1
    partly = how.endswith("only")
    detail = f"through {how}: arrays larger than RAM" + (f"; without {', '.join(lacks)}" if lacks else "")
    if partly:
        detail += "; a system call on a page that is away fails with EFAULT, touching it works"
    yield Check("userfaultfd", "missing" if must else "ok", detail, "a newer kernel" if must else "")


def _others() -> Iterator[Check]:
    number = _SYSCALLS.get(platform.machine(), {}).get("io_uring_setup")
    if number is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall(number, 0, None)  # no entries: EINVAL or EFAULT where it may be used
        number = ctypes.get_errno()
        state: State = "missing" if number == errno.ENOSYS else "refused" if number == errno.EPERM else "ok"
        yield Check("io_uring", state, "not used by this version")
    yield _noswap()


def _noswap() -> Check:
    name, what = "noswap", "tmpfs that is never swapped out (Linux 6.4): an arena stays in RAM while no node runs"
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or unshare is None:
        return Check(name, "note", f"{what}; only root can try it")
    # In a mount namespace of its own, which ends with the command.
    tried = None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        tried = subprocess.run(
            [unshare, "--mount", "mount", "-t", "tmpfs", "-o", "noswap,size=4k", "ramster", "/tmp"],
            capture_output=True,
            timeout=TRY_S,
            stdin=subprocess.DEVNULL,
        )
    if tried is not None and tried.returncode == 0:
        return Check(name, "ok", what)
    return Check(name, "missing", what, "a newer kernel")


def _in_front() -> Iterator[Check]:
    rows = swaps()
    zrams = [row.device for row in rows if "zram" in row.device]
    if zrams:
        detail = f"{', '.join(zrams)} is swap: the one with the higher priority is filled first"
        yield Check("zram", "note", detail, "ramster swap on --priority decides")
    else:
        yield Check("zram", "ok", "no swap on zram stands in front of or beside a node")
    with contextlib.suppress(OSError):
        if Path("/sys/module/zswap/parameters/enabled").read_text().strip() == "Y":
            yield Check(
                "zswap",
                "note",
                "it stands in front of every swap: pages are compressed twice",
                "echo N > /sys/module/zswap/parameters/enabled",
            )
            return
    yield Check("zswap", "ok", "off: pages are compressed once, by the node")
    shown = ", ".join(f"{row.device} {row.size_bytes // MIB} MiB priority {row.priority}" for row in rows)
    yield Check("swap", "note", shown or "this machine has no swap yet", "" if rows else "ramster swap on --size SIZE")


def _memory() -> Iterator[Check]:
    memory = meminfo()
    yield Check(
        "memory", "note", f"{memory['MemAvailable'] // MIB} MiB of {memory['MemTotal'] // MIB} MiB are available"
    )
    kept = reserve_bytes()
    yield Check(
        "min_free",
        "ok" if kept >= RESERVE_WANTED else "note",
        f"the kernel keeps {kept // 1024} KiB free; a node that it swaps on may use half of it",
        "" if kept >= RESERVE_WANTED else f"sysctl vm.min_free_kbytes={RESERVE_WANTED // 1024}",
    )
    yield Check("round_trip", "note", f"4 KiB to another process and back: {_round_trip_us():.0f} us, the median")


def _round_trip_us() -> float:
    """Over a Unix socket, as an NBD client on this machine has it."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            while data := theirs.recv(PAGE_BYTES, socket.MSG_WAITALL):
                theirs.sendall(data)
        finally:
            os._exit(0)
    theirs.close()
    times = []
    with ours:
        ours.settimeout(TRY_S)
        page = bytes(PAGE_BYTES)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            ours.sendall(page)
            ours.recv(PAGE_BYTES, socket.MSG_WAITALL)
            times.append(time.perf_counter() - began)
    os.waitpid(pid, 0)
    return statistics.median(times) * 1e6
