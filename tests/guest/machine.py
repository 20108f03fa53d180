"""A QEMU guest with an unmodified Debian kernel that carries out a plan and reports each step.

The kernel package is downloaded once and unpacked, not installed, in build/guest; the guest's own userland is two
static programs (init.c, workload.c) in an initramfs made here. Neither root nor KVM is needed: without KVM the
processor is emulated, so that what a guest says about speed says nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ramster.cli.demo.nodes import end, spawn

HERE: Final = Path(__file__).parent
PROGRAMS: Final = ("init", "workload")
CACHE: Final = HERE.parents[1] / "build" / "guest"
QEMU: Final = "qemu-system-x86_64"
# The first one that the package lists know. The cloud kernels are a third of the size and lack 9p.
KERNEL_PACKAGES: Final = ("linux-image-6.12-amd64", "linux-image-amd64")
DOWNLOAD_S: Final = 300.0
COMPILE_S: Final = 60.0
FACE: Final = "10.0.2.15"  # the guest's own address in QEMU's user network
HOST: Final = "10.0.2.2"  # and where it finds the loopback of this machine

# What a kernel that is all right does not say, at the level of warnings that the console shows.
COMPLAINTS: Final = re.compile(
    r"I/O error|(?:Read|Write)-error on swap|Kernel panic|BUG:|WARNING:|Oops|blocked for more|stuck request|"
    r"Possible stuck|timed out|Out of memory|oom-kill|oom_reaper|Bad swap|page allocation failure|Unable to handle"
)

# A task that waits this long for its page, and any oops, is a panic, and a panic ends QEMU.
HUNG_S: Final = 30
PARAMETERS: Final = (
    "rootfstype=ramfs",  # the initramfs stays in RAM: what swaps is the workload's memory
    "console=ttyS0",
    "loglevel=5",
    "panic=-1",
    "oops=panic",
    "hung_task_panic=1",
    f"sysctl.kernel.hung_task_timeout_secs={HUNG_S}",
)


class Unavailable(Exception):
    """What this machine lacks to run a guest."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package."""

    image: Path
    modules: Path  # lib/modules/VERSION

    def find(self, name: str) -> Path | None:
        """The file of a module; None when it is built in."""
        pattern = "**/" + re.sub("[-_]", "[-_]", name) + ".ko*"
        return next(iter(self.modules.glob(pattern)), None)

    def closure(self, names: Iterable[str]) -> dict[str, bytes]:
        """These modules and all that they depend on, uncompressed, in the order in which they can be loaded."""
        found: dict[str, bytes] = {}

        def add(name: str) -> None:
            file = self.find(name)
            if file is None or name in found:
                return
            body = file.read_bytes()
            if file.suffix == ".xz":
                body = lzma.decompress(body)
            depends = re.search(rb"(?:^|\0)depends=([^\0]*)\0", body)
            for other in depends[1].decode().split(",") if depends and depends[1] else ():
                add(other.replace("-", "_"))
            found[name] = body

        for name in names:
            add(name)
        return found


def _run(command: Sequence[str], deadline_s: float, folder: Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False, cwd=folder)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs at once must not fill one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(folder: Path) -> Path:
    """The package file of the newest kernel that apt can reach."""
    private = (folder / "lists", folder / "archives")

    def attempt(options: list[str]) -> Path | None:
        for meta in KERNEL_PACKAGES:
            with contextlib.suppress(Unavailable):
                listed = _run(["apt-cache", *options, "depends", meta], COMPILE_S, folder)
                if package := re.search(r"Depends: (linux-image-\S+)", listed):
                    _run(["apt-get", *options, "download", package[1]], DOWNLOAD_S, folder)
                    return next(iter(folder.glob("linux-image-*.deb")), None)
        return None

    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("no apt-get and dpkg-deb to fetch a Debian kernel with")
    if (file := attempt([])) is not None:
        return file
    # Lists of our own: this machine's may never have been read, and only root could.
    for each in private:
        (each / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::Lists={private[0]}", "-o", f"Dir::Cache={private[1]}"]
    _run(["apt-get", *options, "update"], DOWNLOAD_S, folder)
    file = attempt(options)
    for each in private:
        shutil.rmtree(each, ignore_errors=True)
    if file is None:
        raise Unavailable(f"apt-get cannot download {' or '.join(KERNEL_PACKAGES)}")
    return file


def kernel(cache: Path = CACHE) -> Kernel:
    """The unpacked kernel of the cache, fetched when it is not there. Raises Unavailable."""
    with _locked(cache):
        where = cache / "kernel"
        if not where.is_dir():
            # Renamed when whole: a run that was interrupted leaves nothing that looks like a kernel.
            partial = Path(tempfile.mkdtemp(prefix="kernel-", dir=cache))
            try:
                _run(["dpkg-deb", "-x", str(_download(partial)), str(partial / "unpacked")], DOWNLOAD_S, partial)
                (partial / "unpacked").rename(where)
            finally:
                shutil.rmtree(partial)
    images, modules = sorted(where.glob("boot/vmlinuz-*")), sorted(where.glob("**/lib/modules/*"))
    if not images or not modules:
        raise Unavailable(f"{where} holds no kernel; remove it")
    return Kernel(images[-1], modules[-1])


def program(name: str, cache: Path = CACHE) -> Path:
    """A program of this folder, compiled when its source is newer."""
    source = HERE / f"{name}.c"
    with _locked(cache):
        binary = cache / name
        if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
            fresh = cache / f"{name}.new"
            command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o", str(fresh), str(source)]
            _run(command, COMPILE_S, cache)
            fresh.rename(binary)
    return binary


def require_qemu() -> str:
    if platform.machine() != "x86_64":
        raise Unavailable(f"the guest's kernel is for x86_64, this machine is {platform.machine()}")
    found = shutil.which(QEMU)
    if found is None:
        raise Unavailable(f"{QEMU} is not installed (Debian package qemu-system-x86)")
    return found


def has_kvm() -> bool:
    """The device alone is no proof: without these flags it is refused or slower than emulation."""
    flags = re.search(r"^flags\s*:.*\b(?:vmx|svm)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return flags is not None and os.access("/dev/kvm", os.R_OK | os.W_OK)


def archive(files: dict[str, bytes], programs: Iterable[str]) -> bytes:
    """An initramfs (cpio, "newc") of these files, the named ones executable, with the folders that they need."""
    out = bytearray()

    def entry(number: int, name: str, mode: int, body: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(body), 0, 0, *device, len(path), 0)
        for part in (b"070701" + b"".join(b"%08x" % value for value in fields) + path, body):
            out.extend(part)
            out.extend(bytes(-len(out) % 4))

    folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."} | {"dev", "proc", "sys"}
    numbers = itertools.count(1)
    for folder in sorted(folders):
        entry(next(numbers), folder, 0o040755)
    entry(next(numbers), "dev/console", 0o020600, device=(5, 1))
    executable = set(programs)
    for name, body in files.items():
        entry(next(numbers), name, 0o100755 if name in executable else 0o100644, body)
    entry(0, "TRAILER!!!", 0)
    return bytes(out)


@dataclass(slots=True)
class Step:
    """One line of the plan, as far as the guest has reported on it."""

    words: str
    begin_s: float  # the guest's uptime
    end_s: float | None = None
    code: int | None = None  # None: not at its end
    text: list[str] = field(default_factory=list)

    def numbers(self) -> dict[str, int]:
        """What it said as NAME=NUMBER or, line by line, as NAME NUMBER."""
        return {name: int(value) for name, value in re.findall(r"(\w+)(?:=|:?\s+)(\d+)\b", "\n".join(self.text))}


@dataclass(frozen=True, slots=True)
class Disk:
    """An NBD export that QEMU attaches and shows to the guest as a virtio disk: /dev/vda, vdb ..."""

    socket: Path
    export: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest is made of. The plan's modules are loaded first, then its steps are carried out (see init.c)."""

    plan: Sequence[str]
    memory_mib: int = 128
    modules: Sequence[str] = ()
    disks: Sequence[Disk] = ()
    network: bool = False  # 10.0.2.2 is this machine's loopback; nothing else can be reached
    host_files: bool = False  # `host files` in the plan mounts this machine's root, read-only

    def start(self, folder: Path, kernel: Kernel) -> Guest:
        """Boots it; its files go to this folder."""
        qemu = require_qemu()
        wanted = ["virtio_pci", *self.modules]
        wanted += ["virtio_blk"] * bool(self.disks) + ["virtio_net"] * self.network
        wanted += ["9pnet_virtio", "9p"] * self.host_files
        modules = kernel.closure(wanted)
        plan = [f"insmod {name}" for name in modules]
        plan += ["address lo 127.0.0.1", f"address eth0 {FACE}"] if self.network else []
        files = {
            "init": program("init").read_bytes(),
            "workload": program("workload").read_bytes(),
            "plan": "".join(f"{line}\n" for line in (*plan, *self.plan)).encode(),
        }
        files |= {f"modules/{name}.ko": body for name, body in modules.items()}
        initramfs = folder / "initramfs"
        initramfs.write_bytes(archive(files, ("init", "workload")))
        # la57 off: emulating five levels of page tables costs a fifth. One processor: a second one is slower.
        processor = ["-accel", "kvm", "-cpu", "host"] if has_kvm() else ["-accel", "tcg", "-cpu", "max,la57=off"]
        console, report = folder / "console", folder / "report"
        for file in (console, report):
            file.write_bytes(b"")
        command = [
            *(qemu, *processor, "-machine", "pc", "-m", f"{self.memory_mib}M", "-smp", "1"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{console}", "-serial", f"file:{report}"),
            *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", " ".join(PARAMETERS)),
        ]
        for number, disk in enumerate(self.disks):
            options = (
                f"driver=nbd,node-name=nbd{number},server.type=unix,server.path={disk.socket},export={disk.export}"
            )
            command += ["-blockdev", f"{options},discard=unmap", "-device", f"virtio-blk-pci,drive=nbd{number}"]
        if self.network:
            command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
        if self.host_files:
            options = "local,id=files,path=/,security_model=none,readonly=on,multidevs=remap"
            command += ["-fsdev", options, "-device", "virtio-9p-pci,fsdev=files,mount_tag=files"]
        with (folder / "qemu").open("wb") as log:
            process = spawn(command, outlive=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return Guest(process, folder)


class Guest:
    """A running guest; leaving the block ends it."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder

    @property
    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")

    @property
    def steps(self) -> list[Step]:
        """What has been reported so far."""
        steps: list[Step] = []
        for line in (self.folder / "report").read_text(errors="replace").splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "begin":
                at, _, words = rest.partition(" ")
                steps.append(Step(words, float(at)))
            elif kind == "text" and steps:
                steps[-1].text.append(rest)
            elif kind == "end" and steps and len(rest.split()) == 2:
                at, code = rest.split()
                steps[-1].end_s, steps[-1].code = float(at), int(code)
        return steps

    def step(self, beginning: str, turn: int = 0) -> Step:
        """The step of the plan that begins like this, the turn-th of them; AssertionError shows what there is."""
        found = [step for step in self.steps if step.words.startswith(beginning)]
        assert len(found) > turn or turn < 0 < len(found), f"no step {beginning!r} in the report\n{self.story()}"
        return found[turn]

    def wait(self, condition: Callable[[], object], what: str, deadline_s: float) -> None:
        """Until the condition holds; AssertionError when the guest ends before or the deadline passes."""
        until = time.monotonic() + deadline_s
        while not condition():
            ended, late = self.process.poll() is not None, time.monotonic() > until
            if (ended and not condition()) or late:
                when = f"not within {deadline_s:g} s" if late else "QEMU ended before"
                raise AssertionError(f"{when}: {what}\n{self.story()}")
            time.sleep(0.05)

    def wait_for_step(self, beginning: str, deadline_s: float) -> None:
        """Until the guest has come to the step of the plan that begins like this."""
        self.wait(lambda: any(step.words.startswith(beginning) for step in self.steps), beginning, deadline_s)

    def wait_off(self, deadline_s: float) -> None:
        """Until it has powered off; AssertionError at the deadline."""
        try:
            code = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not off within {deadline_s:g} s\n{self.story()}") from None
        assert code == 0, f"QEMU ended with {code}\n{self.story()}"

    def complaints(self) -> list[str]:
        """Lines of the kernel's log that a kernel without trouble does not write."""
        return [line for line in self.console.splitlines() if COMPLAINTS.search(line)]

    def story(self) -> str:
        """Report, console and QEMU's own words, for a failure's message."""
        parts = [(name, (self.folder / name).read_text(errors="replace")) for name in ("report", "console", "qemu")]
        return "\n".join(f"--- {name}\n{text[-4000:]}" for name, text in parts)

    def close(self) -> None:
        end([self.process])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
