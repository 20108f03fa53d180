"""An export beside the NBD servers that one would take instead: one client (fio), one kind of socket, in turns.

The floor is `nbdkit memory`, which keeps pages as they are; its zstd allocator and nbd-server on a file in tmpfs stand
in the note. The jobs are in bench/fio. A row's rate counts only if the same servers give back what was written, which
is verified block by block at the end. Then the RAM that each needs per GiB that is written to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.latency import HERE, THERE, place
from bench.nodes import cluster
from bench.rows import Row, Unavailable, installed, middle_half

from ramster.cli.demo.nodes import end, spawn
from ramster.constants import NBD_SOCKET
from ramster.testing.proxy import wait_until

MIB: Final = 1 << 20
JOBS: Final = Path(__file__).resolve().parent / "fio"
TMPFS: Final = Path("/dev/shm")
DEADLINE_S: Final = 120.0
EXPORT: Final = "bench"
OURS: Final = "ramster"
PLAIN: Final = "nbdkit memory"

# Path, job file, section, unit, each side on a core of its own? In this order: random writes strew the pages over our
# arena, and sequential reads are slower from then on.
PATHS: Final = (
    ("NBD sequential read 128 KiB, as written", "sequential", "read", "MB/s", False),
    ("NBD random read 4 KiB, depth 1", "random", "read-1", "IOPS", True),
    ("NBD random read 4 KiB, depth 16", "random", "read-16", "IOPS", False),
    ("NBD random read 4 KiB, depth 16, 4 connections", "random", "read-16x4", "IOPS", False),
    ("NBD random write 4 KiB, depth 1", "random", "write-1", "IOPS", True),
    ("NBD random write 4 KiB, depth 16", "random", "write-16", "IOPS", False),
    ("NBD random write 4 KiB, depth 16, 4 connections", "random", "write-16x4", "IOPS", False),
    ("NBD sequential read 128 KiB, after random writes", "sequential", "read", "MB/s", False),
    ("NBD sequential write 128 KiB", "sequential", "write", "MB/s", False),
)


@dataclass(frozen=True, slots=True)
class Server:
    """One that is running. memory: RAM that it has taken so far, in bytes."""

    name: str
    socket: Path
    export: str
    pid: int
    memory: Callable[[], int]
    codec: Callable[[], float] | None = None  # pages by what they take, where the server says so

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export}?socket={self.socket}"


def rss(pid: int) -> int:
    """Resident bytes of a process, shared ones included."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


@contextlib.contextmanager
def nbdkit(name: str, folder: Path, size: int, *options: str) -> Iterator[Server]:
    """The memory plugin with these options."""
    program = installed("nbdkit")
    socket = folder / f"{name.replace(' ', '-')}.sock"
    command = [program, "--foreground", "--unix", str(socket), "memory", str(size), *options]
    process = spawn(command, outlive=False, stdin=subprocess.DEVNULL)
    try:
        wait_until(socket.exists, f"{name} listens")
        yield Server(name, socket, EXPORT, process.pid, lambda: rss(process.pid))
    finally:
        end([process])


@contextlib.contextmanager
def nbd_server(folder: Path, size: int) -> Iterator[Server]:
    """nbd-server with a file in tmpfs. It leaves its parent, so that its own pid file says which process it is."""
    program = installed("nbd-server")
    space = os.statvfs(TMPFS) if TMPFS.is_dir() else None
    if space is None or space.f_bavail * space.f_frsize < 2 * size:
        raise Unavailable(f"{TMPFS} has no room for {size >> 20} MiB")
    socket, pid_file, config = folder / "nbd-server.sock", folder / "nbd-server.pid", folder / "nbd-server.conf"
    with tempfile.NamedTemporaryFile(dir=TMPFS, prefix="ramster-bench-") as file:
        file.truncate(size)
        config.write_text(f"[generic]\nunixsock = {socket}\n[{EXPORT}]\nexportname = {file.name}\nflush = true\n")
        subprocess.run([program, "-C", str(config), "-p", str(pid_file)], check=True, capture_output=True)
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip(), "nbd-server writes its pid")
        pid = int(pid_file.read_text())
        try:
            wait_until(socket.exists, "nbd-server listens")
            yield Server(
                "nbd-server",
                socket,
                EXPORT,
                pid,
                lambda: rss(pid) + os.fstat(file.fileno()).st_blocks * 512,
            )
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), "nbd-server ends")


@contextlib.contextmanager
def ours(size: int, *, swap: bool = False) -> Iterator[Server]:
    """A node on its own, as shipped, with one export and an arena that would hold all of it uncompressed.

    swap: as `ramster swap on` makes it.
    """
    with cluster({"a": {"arena": {"size": size * 5 // 4}}}).start() as nodes:
        node = nodes["a"]
        assert node.process is not None
        node.control.create_export(EXPORT, size, swap=swap)
        pid = node.status()["pid"]

        def memory() -> int:
            # The arena is taken when the node starts, and what is not in use is there for other pages: counted are the
            # segments in use. All else that grows with what is stored grows the process.
            arena = node.status()["arena"]
            return rss(pid) + int((arena["frames_total"] - arena["frames_free"]) * arena["segment_bytes"])

        def codec() -> float:
            arena = node.status()["arena"]
            return float(arena["bytes_in"] / arena["bytes_compressed"])

        yield Server(OURS, node.run_dir / NBD_SOCKET, EXPORT, pid, memory, codec)


def fio(server: Server, job: str, section: str, size: int, seconds: float) -> dict[str, float]:
    """Totals of one job: rates of both directions together, and bytes of each."""
    command = [installed("fio"), "--output-format=json", f"--section={section}", str(JOBS / f"{job}.fio")]
    # fio takes integers alone.
    variables = {"URI": server.uri, "RUNTIME": f"{round(seconds * 1000)}ms", "SIZE": str(size)}
    try:
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"fio {section} on {server.name} not within {DEADLINE_S:g} s") from None
    if done.returncode:
        raise AssertionError(f"fio {section} on {server.name}: {done.stdout[-500:]}{done.stderr[-500:]}")
    # It says that it has connected before the object begins.
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    if failed := [each["error"] for each in jobs if each["error"]]:
        raise AssertionError(f"fio {section} on {server.name}: errors {failed}")
    sides = [each[way] for each in jobs for way in ("read", "write")]
    return {
        "IOPS": sum(side["iops"] for side in sides),
        "MB/s": sum(side["bw_bytes"] for side in sides) / 1e6,
        "read bytes": sum(each["read"]["io_bytes"] for each in jobs),
        "written bytes": sum(each["write"]["io_bytes"] for each in jobs),
    }


@contextlib.contextmanager
def apart(servers: list[Server], wanted: bool) -> Iterator[None]:
    """Client and servers on a core each, as two machines would be, so that a hand-over always costs the same."""
    if not wanted:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {HERE})
        for server in servers:
            place(server.pid, THERE)
        yield
    finally:
        os.sched_setaffinity(0, before)
        for server in servers:
            place(server.pid, None)


def beside(path: str, unit: str, rounds: list[dict[str, float]], note: str = "", *, more_is_better: bool) -> Row:
    """One row of the rounds' figures by name; PLAIN is the floor, the others stand in the note with their own ratios.

    As in every row, a ratio above 1 says that we are worse than that one, whatever the unit.
    """

    def against(name: str) -> list[float]:
        pairs = [(each[OURS], each[name]) for each in rounds]
        return [other / own if more_is_better else own / other for own, other in pairs]

    def middle(name: str) -> float:
        return statistics.median(each[name] for each in rounds)

    others = [name for name in rounds[0] if name not in (OURS, PLAIN)]
    said = [f"{name} {middle(name):.0f} {unit} (ratio {statistics.median(against(name)):.2f})" for name in others]
    ratios = against(PLAIN)
    lo, hi = middle_half(ratios) if len(ratios) > 1 else ratios * 2
    text = "; ".join([*filter(None, [note]), *said])
    return Row(path, middle(OURS), unit, PLAIN, middle(PLAIN), statistics.median(ratios), lo, hi, text)


def rates(servers: list[Server], size: int, seconds: float, rounds: int) -> Iterator[Row]:
    """A row for each path; within a round every server takes its turn."""
    for path, job, section, unit, on_own_cores in PATHS:
        with apart(servers, on_own_cores):
            found = [
                {server.name: fio(server, job, section, size, seconds)[unit] for server in servers}
                for _ in range(rounds)
            ]
        yield beside(path, unit, found, "client and server on a core each" * on_own_cores, more_is_better=True)


def filled(servers: list[Server], size: int) -> Row:
    """Writes each page once: what it takes, in MiB of RAM per GiB written. Nothing varies but the data."""
    found = {}
    for server in servers:
        before = server.memory()
        fio(server, "sequential", "fill", size, 0)
        found[server.name] = (server.memory() - before) / size * 1024
    own = next(server for server in servers if server.name == OURS)
    assert own.codec is not None
    factor = own.codec()
    # What is measured is said to compress two to one. That is a property of fio and of a codec, so it is checked.
    if not 1.9 <= factor <= 2.1:
        raise AssertionError(f"fio's pages compress {factor:.2f} : 1 and not 2 : 1")
    note = f"pages compress {factor:.2f} : 1; the arena's segments in use and what the process has grown by"
    return beside("NBD RAM per GiB written", "MiB", [found], note, more_is_better=False)


def verified(servers: list[Server], share: int) -> None:
    """What is written by random blocks on four connections, `share` bytes on each, comes back."""
    for server in servers:
        done = fio(server, "verify", "verify", share, 0)
        if done["read bytes"] != 4 * share or done["written bytes"] != 4 * share:
            raise AssertionError(f"fio verified {done['read bytes']:.0f} bytes on {server.name}, not {4 * share}")


def run(quick: bool) -> list[Row]:
    size, seconds, rounds = (32 * MIB, 0.05, 1) if quick else (512 * MIB, 0.6, 4)
    missing: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramster-bench-")))
        servers: list[Server] = []
        try:
            installed("fio")
            servers.append(stack.enter_context(nbdkit(PLAIN, folder, size)))
        except Unavailable as error:
            return [Row("NBD export beside other servers", None, "IOPS", "", None, note=f"skipped: {error}")]
        for peer in (nbdkit("nbdkit zstd", folder, size, "allocator=zstd"), nbd_server(folder, size)):
            try:
                servers.append(stack.enter_context(peer))
            except Unavailable as error:
                missing.append(str(error))
        servers.append(stack.enter_context(ours(size)))
        memory = filled(servers, size)
        rows = [*rates(servers, size, seconds, rounds), memory]
        verified(servers, size // 16)
    return [replace(rows[0], note="; ".join(filter(None, [rows[0].note, *missing]))), *rows[1:]]
