"""What the guests of these tests do, each with nodes of its own; the tests look at what they had to say."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.guest.machine import HOST, Disk, Guest, Kernel, Machine, Step, Unavailable, program

from ramster.cli.cluster_files import Sections, Value
from ramster.cluster.identity import add_client
from ramster.testing.cluster import Cluster, Node, free_ports

EXPORT: Final = "swap"
SWAP_MIB: Final = 192
WORK_MIB: Final = 128  # 60 MiB more than a guest of 128 MiB has left
WORK_S: Final = 5
# A node takes 100 MiB of locked memory, and 60 are the kernel's: 220 MiB of these 330 fit. Several processes at
# once leave the kernel less free memory than one does.
INSIDE_RAM_MIB: Final = 384
INSIDE_MIB: Final = 330
INSIDE_PROCESSES: Final = 4
WITHIN_MIB: Final = 64  # by `ramster run`, in a cgroup of version 2
LIMIT_MIB: Final = 32
INSIDE_DEADLINE_S: Final = 900.0  # Python is emulated too: each command takes seconds
# For a hang alone. 20 to 30 s are enough on two idle cores; with a load of 13 on them 124 were needed, since each page
# that a guest waits for takes a turn of three processes.
DEADLINE_S: Final = 400.0
SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
DISK: Final = "/var/tmp"  # kept when a machine restarts, so it is no tmpfs
# Generous: emulation takes both cores for seconds at a time, and how long anything takes is not what is tested here.
PATIENT: Final[Sections] = {
    "arena": {"full_wait": "20s"},
    "links": {"request_deadline": "10s", "give_up": "30s", "idle_timeout": "30s", "keepalive": "5s"},
}
NEAR: Final[Sections] = {**PATIENT, "arena": {"size": "8MiB", "full_wait": "20s"}}
FAR: Final[Sections] = {**PATIENT, "lend": {"size": "160MiB"}}

# One bit of every eighth page that is not empty, by a second client of the same export.
FLIP: Final = """
flipped = 0
for offset in range(0, h.get_size(), 8 * 4096):
    page = bytearray(h.pread(4096, offset))
    if offset and any(page):
        page[offset // 4096 % 4096] ^= 0x40
        h.pwrite(page, offset)
        flipped += 1
print(flipped)
"""


@dataclass(slots=True)
class Run:
    """What a guest and its nodes had to say."""

    guest: Guest = field(repr=False)
    export: dict[str, Any]  # at the end
    peak: dict[str, Any]  # when most of its pages were away
    near: dict[str, Any]
    far: dict[str, Any]
    log: str = field(repr=False)  # of `near`
    flipped: int = 0
    at_death: Mapping[str, Any] | None = None  # the export when the lender was killed

    def step(self, beginning: str) -> Step:
        return self.guest.step(beginning)

    @property
    def failed(self) -> list[tuple[str, int | None]]:
        """Steps that did not succeed."""
        return [(step.words, step.code) for step in self.guest.steps if step.code != 0]

    @property
    def swapped(self) -> dict[str, int]:
        """The kernel's counters between swapon and the end: pages in pswpin and pswpout, and oom_kill."""
        first, last = (self.guest.step("show /proc/vmstat", turn).numbers() for turn in (0, -1))
        return {name: last[name] - first[name] for name in last}

    def device(self, column: int) -> tuple[int, int]:
        """A column of the device's `stat` after swapon and at the end (Linux: Documentation/block/stat.rst)."""
        first, last = (int(self.guest.step("show /sys/block/", turn).text[0].split()[column]) for turn in (0, -1))
        return first, last


def export_of(node: Node) -> dict[str, Any]:
    return next(each for each in node.control.exports() if each["name"] == EXPORT)


def disk(node: Node) -> Disk:
    return Disk(node.run_dir / "nbd.sock", EXPORT)


def counted(device: str) -> list[str]:
    """Steps that show what the guest's kernel has counted."""
    return [
        "show /proc/vmstat pswpin pswpout oom_kill",
        f"show /sys/block/{device}/stat",
    ]


def swapping(work_s: int = WORK_S) -> list[str]:
    """A plan: the virtio disk is swap, the workload runs."""
    return [
        "show /proc/sys/kernel/hung_task_panic",
        "show /proc/sys/kernel/hung_task_timeout_secs",
        # A virtio disk calls itself rotational, and for such a one a kernel takes the wish for discards and sends none.
        "write /sys/block/vda/queue/rotational 0",
        "mkswap /dev/vda",
        "swapon /dev/vda",
        *counted("vda"),
        f"run /workload {WORK_MIB} {work_s}",
        "swapoff /dev/vda",
        *counted("vda"),
        "show /proc/swaps",
    ]


def carry_out(
    machine: Machine,
    kernel: Kernel,
    folder: Path,
    nodes: Cluster,
    during: Callable[[dict[str, Any]], None] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Run:
    """Runs the guest to its end. `during` sees the export's counters again and again meanwhile."""
    near, far = nodes["near"], nodes["far"]
    peak = export_of(near)
    with machine.start(folder, kernel) as guest:

        def off() -> bool:
            nonlocal peak
            now = export_of(near)
            peak = max(peak, now, key=lambda export: int(export["pages_away"]))
            if during is not None:
                during(now)
            return guest.process.poll() is not None

        guest.wait(off, "the guest powers off", deadline_s)
        guest.wait_off(1.0)
    return Run(guest, export_of(near), peak, near.status(), far.status() if far.running() else {}, near.log)


def swapped(kernel: Kernel, folder: Path) -> Run:
    """Swap through QEMU's NBD client."""
    with Cluster({"near": NEAR, "far": FAR}) as nodes:
        nodes.start()
        nodes["near"].control.create_export(EXPORT, SWAP_MIB << 20)
        return carry_out(Machine(swapping(), disks=[disk(nodes["near"])]), kernel, folder, nodes)


def flipped(kernel: Kernel, folder: Path) -> Run:
    """The same, and once there is something to alter, somebody does."""
    if shutil.which("nbdsh") is None:
        raise Unavailable("nbdsh is not installed (Debian packages libnbd-bin, python3-libnbd)")
    with Cluster({"near": NEAR, "far": FAR}) as nodes:
        nodes.start()
        uri = nodes["near"].control.create_export(EXPORT, SWAP_MIB << 20)["uris"][0]
        flips: list[int] = []

        def flip(export: Mapping[str, Any]) -> None:
            if not flips and export["pages_stored"] > 8000:
                done = subprocess.run(
                    ["nbdsh", "--uri", uri, "--command", FLIP],
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE_S,
                    check=True,
                    env={"PATH": SYSTEM_PATH},  # its module belongs to the system's Python
                )
                flips.append(int(done.stdout))

        run = carry_out(Machine(swapping(), disks=[disk(nodes["near"])]), kernel, folder, nodes, flip)
        run.flipped = sum(flips)
        return run


def _attached(
    kernel: Kernel,
    folder: Path,
    memory_mib: int,
    nbd: Mapping[str, Value],
    client: Callable[[Cluster], Sequence[str]],
    before: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
) -> Run:
    """Swap through the guest's own nbd module and this machine's nbd-client, run in the guest, over TCP.

    nbd: of the node's [nbd], beside the address. client: more of nbd-client's options. before: steps between it and the
    workload.
    """
    missing = [name for name in ("nbd-client", "mkswap", "swapon") if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not installed")
    (port,) = free_ports(1)
    near: Sections = {**NEAR, "nbd": {"listen": f"127.0.0.1:{port}", **nbd}}
    with Cluster({"near": near, "far": FAR}) as nodes:
        nodes.start()
        nodes["near"].control.create_export(EXPORT, SWAP_MIB << 20)
        options = " ".join(["-swap -timeout 60 -connections 2", *client(nodes)])
        plan = [
            "host files",
            # What arrives from the network needs memory before it can free any, and a guest this small keeps 1 MiB.
            "write /proc/sys/vm/min_free_kbytes 8192",
            f"run nbd-client -N {EXPORT} {HOST} {port} /dev/nbd0 {options}",
            "run mkswap /dev/nbd0",
            "run swapon --discard /dev/nbd0",
            *counted("nbd0"),
            *before,
            f"run {program('workload')} {WORK_MIB} {WORK_S}",
            "run swapoff /dev/nbd0",
            *counted("nbd0"),
            "show /proc/swaps",
            "run nbd-client -d /dev/nbd0",
        ]
        machine = Machine(plan, memory_mib=memory_mib, modules=["nbd"], network=True, host_files=True)
        return carry_out(machine, kernel, folder, nodes, deadline_s=deadline_s)


def attached(kernel: Kernel, folder: Path) -> Run:
    """Without TLS, on a loopback address of this machine."""
    return _attached(kernel, folder, 160, {}, lambda nodes: ())


def encrypted(kernel: Kernel, folder: Path) -> Run:
    """With TLS 1.2, the newest that nbd-client 3.24 knows.

    A process of nbd-client's in the guest encrypts, and it needs memory to do so: where the whole guest has none left,
    it waits for a page that it should send, until the kernel calls that hung. So a cgroup limits the workload.
    """

    def certificate(nodes: Cluster) -> Sequence[str]:
        files = add_client(nodes.directory / "files", "guest")
        return (
            f"-cacertfile {files.ca}",
            f"-certfile {files.cert}",
            f"-keyfile {files.key}",
            f"-tlshostname {nodes['near'].name}",
        )

    limited = [
        "write /sys/fs/cgroup/cgroup.subtree_control +memory",
        "run mkdir /sys/fs/cgroup/work",
        f"write /sys/fs/cgroup/work/memory.max {WORK_MIB // 2}M",
        "write /sys/fs/cgroup/work/cgroup.procs 1",  # and whatever is started from now on
    ]
    nbd = {"tls": "require", "tls_min": "1.2"}
    # Emulated, each page is encrypted in milliseconds.
    return _attached(kernel, folder, 2 * WORK_MIB, nbd, certificate, limited, INSIDE_DEADLINE_S)


def _lender_dies(kernel: Kernel, folder: Path, more: Sections, lenders: Sequence[str]) -> Run:
    """Swap through QEMU's client; once most pages are away, and the walk has begun or will at once, SIGKILL for far."""
    near: Sections = {**NEAR, "links": {**PATIENT["links"], "request_deadline": "2s", "give_up": "5s"}, **more}
    with Cluster({"near": near, **dict.fromkeys(lenders, FAR)}) as nodes:
        nodes.start()
        nodes["near"].control.create_export(EXPORT, SWAP_MIB << 20)
        at_death: list[Mapping[str, Any]] = []

        def kill(export: Mapping[str, Any]) -> None:
            if not at_death and export["pages_away"] > 10_000:
                nodes["far"].kill()
                at_death.append(export)

        machine = Machine(swapping(4 * WORK_S), disks=[disk(nodes["near"])])
        run = carry_out(machine, kernel, folder, nodes, kill, DEADLINE_S)
        run.at_death = at_death[0] if at_death else None
        return run


def lender_dies(kernel: Kernel, folder: Path) -> Run:
    """What is on the lender is in a spill file too."""
    with tempfile.TemporaryDirectory(prefix="ramster-spill-", dir=DISK) as spill:
        mirror: Sections = {"spill": {"path": str(Path(spill, "spill")), "size": "256MiB", "mirror": True}}
        return _lender_dies(kernel, folder, mirror, ["far"])


def lender_dies_alone(kernel: Kernel, folder: Path) -> Run:
    """What is on the lender is nowhere else; another one takes what is written afterwards."""
    return _lender_dies(kernel, folder, {}, ["far", "other"])


def commanded(kernel: Kernel, folder: Path) -> Run:
    """The node in the guest, its lender here, and the guest's kernel attached by `ramster swap`."""
    ramster = Path(sys.executable).with_name("ramster")
    if not ramster.exists():
        raise Unavailable(f"{ramster} does not exist")
    near: Sections = {
        **PATIENT,
        "arena": {"size": "16MiB", "lock": True, "full_wait": "20s"},
        "node": {"run_dir": "/run/ramster"},
    }
    with Cluster({"far": {**FAR, "lend": {"size": "256MiB"}}, "near": near}) as nodes:
        far, config = nodes["far"], nodes["near"].config
        # The higher number dials, and finds this machine elsewhere than on its own loopback.
        config.write_text(config.read_text().replace('address = "127.0.0.1:', f'address = "{HOST}:'))
        far.start()
        far.wait(lambda status: status["state"] == "running", "runs")
        swap, at, work = f"run {ramster} swap", f"--config {config}", program("workload")
        plan = [
            "host files",
            f"start {ramster} node {at}",
            "wait /run/ramster/control.sock 300",
            f"{swap} on --size 320MiB {at}",
            f"{swap} on --size 320MiB --accept-loss {at}",
            *counted("nbd0"),
            "show /proc/swaps",
            f"{swap} status {at}",
            f"run {ramster} status --json {at}",
            f"run {work} {INSIDE_MIB} {WORK_S} {INSIDE_PROCESSES}",
            f"run {ramster} run --memory {LIMIT_MIB}MiB --quiet --json - {at} -- {work} {WITHIN_MIB} {WORK_S}",
            f"run {ramster} export ls --json {at}",
            f"{swap} off {at}",
            *counted("nbd0"),
            "show /proc/swaps",
            f"run {ramster} export ls --json {at}",
            "stop",
        ]
        machine = Machine(plan, memory_mib=INSIDE_RAM_MIB, modules=["nbd"], network=True, host_files=True)
        with machine.start(folder, kernel) as guest:
            guest.wait_off(INSIDE_DEADLINE_S)
        return Run(guest, {}, {}, {}, far.status(), guest.console)


SCENARIOS: Final[Mapping[str, Callable[[Kernel, Path], Run]]] = {
    each.__name__: each for each in (commanded, attached, encrypted, swapped, flipped, lender_dies, lender_dies_alone)
}
