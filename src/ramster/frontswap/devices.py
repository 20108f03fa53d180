"""From an export to a block device and back: the kernel's nbd where there is one, else nbdfuse and a loop device.

Nothing here remembers anything: what is attached is read from /proc and /sys each time, so that detaching copes with
whatever state a crash has left. What is ours is known by a token that was drawn for it: it is the name of the file that
nbdfuse shows, so it stands in nbdfuse's command line and as the loop device's file, and it ends the name of the cgroup.
A path would not do: a node in another container may have the same one, and another node a swap of the same name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

from ramster.constants import PAGE_BYTES
from ramster.errors import KernelUnsupported, RamsterError, Refused, ToolMissing
from ramster.frontswap.cgroups import Group, hierarchies, named, remove

#: tool -> Debian's package
TOOLS: Final = {
    "nbd-client": "nbd-client",
    "nbdfuse": "nbdfuse or libnbd-bin",
    "losetup": "mount",
    "mkswap": "util-linux",
    "swapon": "mount",
    "swapoff": "mount",
    "modprobe": "kmod",
    "umount": "mount",
}
# How long the kernel waits for one request before it gives up. Far above [arena] full_wait and all deadlines of links,
# so that the node's own answer comes first.
TIMEOUT_S: Final = 60
STEP_S: Final = 30.0  # a tool that makes a few system calls, on a busy machine
CONNECTIONS_MAX: Final = 16
_POLL_S: Final = 0.02  # the kernel tells nobody when a device or a mount has come or gone
_PR_SET_IO_FLUSHER: Final = 57
_OOM_NEVER: Final = b"-1000"
FILE: Final = "swap"  # below the mount, with the token
_BLOCK: Final = Path("/sys/block")
# Half of it is for the node; what a network card receives comes from it, too. Kernels keep less below 4 GiB of RAM.
RESERVE_WANTED: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """What one swap is made of: its name, its export and where its files lie. Paths below `directory` are ours.

    token: no other swap has it, of any node at any time. lock: a descriptor that the tools inherit: when this process
    is killed, whoever comes next waits for the tool too.
    """

    name: str
    directory: Path  # RUN_DIR/swap, without symlinks: so the kernel shows mounts
    nbd_socket: Path
    token: str
    lock: int | None = None

    @property
    def record(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def mount(self) -> Path:
        return self.directory / self.name

    @property
    def file(self) -> Path:
        return self.mount / f"{FILE}-{self.token}"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def group(self) -> str:
        return f"ramster-swap-{self.name}-{self.token}"

    @property
    def label(self) -> str:
        return f"ramster-{self.name}"[:15]  # what a swap header has room for


# --- what each tool is told ---------------------------------------------------------------------------------------


def nbd_client(place: Place, device: str, connections: int) -> list[str]:
    """-swap and -persist are for the process that stays where the kernel has no netlink interface to nbd."""
    return [
        "nbd-client",
        "-unix",
        str(place.nbd_socket),
        device,
        "-name",
        place.name,
        "-block-size",
        str(PAGE_BYTES),
        "-timeout",
        str(TIMEOUT_S),
        "-connections",
        str(connections),
        "-swap",
        "-persist",
    ]


def nbd_disconnect(device: str) -> list[str]:
    return ["nbd-client", "-d", device]


def nbdfuse(place: Place, connections: int) -> list[str]:
    uri = f"nbd+unix:///{place.name}?socket={quote(os.fsencode(place.nbd_socket))}"
    return ["nbdfuse", "-C", str(connections), str(place.file), uri]


def losetup(place: Place, direct: bool) -> list[str]:
    """Direct: no second copy of each page in the page cache. Sectors of a page: nothing is read to be written."""
    return [
        "losetup",
        "--find",
        "--show",
        "--sector-size",
        str(PAGE_BYTES),
        f"--direct-io={'on' if direct else 'off'}",
        str(place.file),
    ]


def mkswap(place: Place, device: str) -> list[str]:
    return ["mkswap", "--label", place.label, "--pagesize", str(PAGE_BYTES), device]


def swapon(device: str, priority: int) -> list[str]:
    """discard=pages: what the kernel frees is freed here and away. Not discard=once: a new export is empty."""
    return ["swapon", "--priority", str(priority), "--discard=pages", device]


def swapoff(device: str) -> list[str]:
    return ["swapoff", device]


def step(command: Sequence[str], what: str, lock: int | None = None) -> str:
    """Runs a tool to its end; what it printed. ToolMissing, Refused with the tool's own words."""
    need(command[0])
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=STEP_S,
            stdin=subprocess.DEVNULL,
            errors="replace",
            pass_fds=() if lock is None else (lock,),
        )
    except subprocess.TimeoutExpired:
        raise Refused(
            f"{what}: `{' '.join(command)}` did not end within {STEP_S:g} s; does the node answer (ramster status)?"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split("\n"))
        raise Refused(f"{what}: `{' '.join(command)}` failed: {said}")
    return done.stdout


def need(*tools: str) -> None:
    """ToolMissing names the packages."""
    missing = [
        tool for tool in tools if shutil.which(tool) is None and shutil.which(tool, path="/usr/sbin:/sbin") is None
    ]
    if missing:
        packages = " ".join(dict.fromkeys(TOOLS[tool].split(" or ")[-1] for tool in missing))
        raise ToolMissing(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"on Debian: apt-get install {packages}"
        )


# --- what is there ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Swap:
    """A row of /proc/swaps."""

    device: str
    kind: str
    size_bytes: int
    used_bytes: int
    priority: int


def parse_swaps(text: str) -> list[Swap]:
    found = []
    for line in text.splitlines()[1:]:
        device, kind, size, used, priority = line.split()
        found.append(Swap(unescaped(device), kind, int(size) * 1024, int(used) * 1024, int(priority)))
    return found


def swaps() -> list[Swap]:
    return parse_swaps(text_of(Path("/proc/swaps")))


def swap_on(device: str) -> Swap | None:
    """Its row. A device whose node was removed while it was on is shown as deleted."""
    return next((each for each in swaps() if each.device.removesuffix(" (deleted)") == device), None)


def parse_meminfo(text: str) -> dict[str, int]:
    """Bytes by name."""
    found = re.findall(r"^(\w+)(?:\(\w+\))?:\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(amount) * 1024 for name, amount in found}


def reserve_bytes() -> int:
    """vm.min_free_kbytes: what the kernel keeps for itself, the network and processes that may dip into it."""
    return int(Path("/proc/sys/vm/min_free_kbytes").read_text()) * 1024


def meminfo() -> dict[str, int]:
    return parse_meminfo(Path("/proc/meminfo").read_text())


def text_of(path: Path) -> str:
    """A file of /proc or /sys, whose paths may be of any bytes."""
    return os.fsdecode(path.read_bytes())


def unescaped(field: str) -> str:
    """A path as /proc/mounts and /proc/swaps write it."""
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field)


def loops(place: Place) -> list[str]:
    """Loop devices on its file, also when that can no longer be reached.

    Asking the device itself (LOOP_GET_STATUS64, for the file's inode) would ask nbdfuse, which may hang or be gone.
    """
    found = []
    for backing in _BLOCK.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if Path(text_of(backing).removesuffix("\n").removesuffix(" (deleted)")).name == place.file.name:
                found.append(f"/dev/{backing.parent.parent.name}")
    return found


def _gone(place: Place, loop: str) -> bool:
    return loop not in loops(place)


def loop_direct(device: str) -> bool:
    with contextlib.suppress(OSError):
        return (_BLOCK / Path(device).name / "loop/dio").read_text().strip() == "1"
    return False


def mounted(path: Path) -> bool:
    lines = text_of(Path("/proc/self/mounts")).split("\n")
    return any(unescaped(line.split(" ")[1]) == str(path) for line in lines if line)


def daemons(place: Place) -> list[int]:
    """The nbdfuse processes of this place, known by their command lines: a number alone may be somebody else's now."""
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and _serves(each.name, place)]


def _serves(pid: str, place: Place) -> bool:
    with contextlib.suppress(OSError):
        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")  # a zombie has none
        return Path(os.fsdecode(words[0])).name == "nbdfuse" and any(
            word.endswith(b"/" + os.fsencode(place.file.name)) for word in words
        )
    return False


def _kill(pid: int, place: Place) -> None:
    """Only while it is what `daemons` found: the descriptor stays with one process, the number does not."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if _serves(str(pid), place):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def nbd_devices() -> list[str]:
    """All of this kernel, in order; empty without the module."""
    numbers = [int(path.name[3:]) for path in _BLOCK.glob("nbd*") if path.name[3:].isdigit()]
    return [f"/dev/nbd{number}" for number in sorted(numbers)]


def nbd_attachment(device: str) -> str | None:
    """What tells one attachment of the device from a later one: the process that made it. None: it is free."""
    with contextlib.suppress(OSError):
        return (_BLOCK / Path(device).name / "pid").read_text().strip()
    return None


def has_nbd(load: bool = False) -> bool:
    """Whether this kernel has nbd; load: it may have to be loaded first."""
    if Path("/sys/module/nbd").exists() or nbd_devices():
        return True
    if load and shutil.which("modprobe"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["modprobe", "nbd"], capture_output=True, timeout=STEP_S, stdin=subprocess.DEVNULL)
    return bool(nbd_devices())


# --- attaching ----------------------------------------------------------------------------------------------------


class Way(Protocol):
    """One way from an export to a block device. `attach` raises and leaves what `detach` removes."""

    name: str

    def attach(self, place: Place, connections: int, chosen: Callable[[str], None]) -> str: ...


class KernelNbd:
    """nbd.ko through nbd-client."""

    name = "nbd"

    def attach(self, place: Place, connections: int, chosen: Callable[[str], None]) -> str:
        """The device. chosen: hears of it before it is attached."""
        need("nbd-client")
        device = next((each for each in nbd_devices() if nbd_attachment(each) is None), None)
        if device is None:
            raise Refused(
                f"all {len(nbd_devices())} nbd devices are in use; "
                "disconnect one (nbd-client -d /dev/nbdN), or load the module with more (modprobe nbd nbds_max=64)"
            )
        chosen(device)
        step(nbd_client(place, device, connections), "attaching the export")
        _until(lambda: nbd_attachment(device), f"{device} is connected")
        return device


class Bridge:
    """nbdfuse shows the export as a file, a loop device makes it a block device."""

    name = "bridge"

    def attach(self, place: Place, connections: int, chosen: Callable[[str], None]) -> str:
        need("nbdfuse", "losetup", "umount")
        if not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists():
            raise KernelUnsupported(
                "this kernel has no nbd, and no FUSE or loop devices for the way around it; "
                "load one of them: modprobe nbd, or modprobe fuse loop"
            )
        place.mount.mkdir(mode=0o700, exist_ok=True)
        process = _start_nbdfuse(place, connections)
        _until(lambda: mounted(place.mount) or process.poll() is not None, f"{place.mount} is mounted")
        if not mounted(place.mount):
            said = " ".join(place.log.read_text(errors="replace").split())[-500:]
            raise Refused(f"nbdfuse ended at once: {said or 'it does not say why'}")
        try:
            return step(losetup(place, direct=True), "making a loop device", place.lock).strip()
        except Refused:
            # A file system without direct I/O; the pages then pass through the page cache.
            return step(losetup(place, direct=False), "making a loop device", place.lock).strip()


def _start_nbdfuse(place: Place, connections: int) -> subprocess.Popen[bytes]:
    """It outlives this process, in a session of its own.

    It stands in the way of reclaim: a cgroup keeps it out of swap, a score from the OOM killer, and it may use the
    kernel's reserve, where that is allowed.
    """
    group: Group | None = None
    with contextlib.suppress(RamsterError, OSError):
        group = Group(place.group)
        group.never_swap()
    libc = ctypes.CDLL(None, use_errno=True)

    def shield() -> None:
        """In the child; each step may be refused, and the node's own report says which."""
        with contextlib.suppress(OSError):
            if group is not None:
                group.join()
        libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
        with contextlib.suppress(OSError):
            os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC), _OOM_NEVER)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # for the reserve, as the node: docs/guard.md

    with place.log.open("wb") as log:
        return subprocess.Popen(
            nbdfuse(place, connections),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            preexec_fn=shield,
            start_new_session=True,
        )


def shielded(pid: int) -> Iterator[str]:
    """What stands between this nbdfuse and a memory shortage that it cannot survive, in words; nothing: all is well."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/oom_score_adj").read_text().strip() != "-1000":
            yield "the OOM killer may take nbdfuse (oom_score_adj -1000 needs CAP_SYS_RESOURCE)"
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        if not flags & 0x80000:  # PF_MEMALLOC_NOIO, what PR_SET_IO_FLUSHER sets
            yield "nbdfuse's own allocations may wait for this swap (PR_SET_IO_FLUSHER needs CAP_SYS_RESOURCE)"
        if os.sched_getscheduler(pid) != os.SCHED_RR:
            yield "the kernel's memory reserve is closed to nbdfuse (real-time priority needs CAP_SYS_NICE)"
    where = hierarchies()
    if where.memory is None or where.memory[0] == 1:
        yield "nbdfuse cannot lock its memory, and cgroup v1 only asks the kernel not to swap it (swappiness 0)"


# --- detaching ----------------------------------------------------------------------------------------------------


def detach(place: Place, device: str | None) -> list[str]:
    """Takes down whatever is there of a place; what was done, in words. Refused when something does not go in time.

    The device must not be swapped on any more. Again: does nothing.
    """
    done = []
    for loop in loops(place):
        step(["losetup", "--detach", loop], "detaching the loop device", place.lock)
        _until(partial(_gone, place, loop), f"{loop} is detached")
        done.append(f"detached {loop}")
    if device is not None and device.startswith("/dev/nbd") and nbd_attachment(device):
        step(nbd_disconnect(device), "disconnecting the device", place.lock)
        _until(lambda: not nbd_attachment(device), f"{device} is disconnected")
        done.append(f"disconnected {device}")
    if mounted(place.mount):
        try:
            step(["umount", str(place.mount)], "unmounting", place.lock)
        except Refused:
            step(["umount", "--lazy", str(place.mount)], "unmounting", place.lock)
        done.append(f"unmounted {place.mount}")
    if running := daemons(place):
        # Unmounting ends it; what hangs on a server that is gone has to be told.
        try:
            _until(lambda: not daemons(place), "nbdfuse ends", 5.0)
        except Refused:
            for pid in running:
                _kill(pid, place)
            _until(lambda: not daemons(place), "nbdfuse is gone")
        done.append("ended nbdfuse")
    with contextlib.suppress(OSError):
        remove(list(named(place.group)), 1.0)
    with contextlib.suppress(FileNotFoundError):
        place.mount.rmdir()
    place.log.unlink(missing_ok=True)
    return done


def _until(condition: Callable[[], object], what: str, deadline_s: float = STEP_S) -> None:
    until = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > until:
            raise Refused(f"not within {deadline_s:g} s: {what}; nothing else was undone, run the command again")
        time.sleep(_POLL_S)
