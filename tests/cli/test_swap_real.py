"""This machine's kernel swaps on a real node, and programs that nobody here wrote run in less RAM than they need."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramster.constants import MIB
from ramster.errors import RamsterError
from ramster.frontswap import cgroups, devices, swap
from ramster.frontswap.run import PREFIX
from ramster.testing.cluster import Cluster
from ramster.testing.proxy import wait_until

RAMSTER = [sys.executable, "-P", "-m", "ramster.cli"]
TIMEOUT_S = 90.0
DESERTED = r"WARNING .* export \S+: the last connection of this machine's kernel"
# Nobody else's on this machine, so that what is left can be told from what others are at.
NAME = f"t{secrets.token_hex(4)}"


def why_not() -> str:
    if os.geteuid() != 0:
        return "swapon needs root"
    if not Path("/proc/swaps").exists():
        return "this kernel has no swap"
    tools = ("mkswap", "swapon", "swapoff", "nbdfuse", "losetup")
    missing = [
        tool for tool in tools if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists():
        return "no FUSE or no loop devices"
    if devices.meminfo()["MemAvailable"] < 1024 * MIB:
        return "less than 1 GiB of RAM is free: other processes would be swapped out too"
    try:
        cgroups.Group("ramster-run-0").remove()
    except (RamsterError, OSError) as error:
        return str(error)
    return ""


WHY = why_not()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)


class Machine:
    """A node that lends and one that swaps; `ramster` at the second."""

    def __init__(self, cluster: Cluster, name: str = "alpha") -> None:
        self.cluster = cluster
        self.node = cluster[name]
        self.socket = str(self.node.control.path)
        self.killed = 0  # nbdfuses
        self.groups_before = set(self.groups())  # of the other node, whose swap has the same name

    def command(self, *words: str) -> list[str]:
        """The node is named before what belongs to a command of `run`; a new swap gets our name."""
        if words[:2] == ("swap", "on") and "--name" not in words:
            words = (*words, "--name", NAME)
        split = 2 if words[0] == "swap" else 1
        return [*RAMSTER, *words[:split], "--socket", self.socket, *words[split:]]

    def ramster(self, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            **settings,
        )
        assert "Traceback" not in done.stderr
        return done

    def json(self, *words: str) -> Any:
        done = self.ramster(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def leftovers(self) -> list[str]:
        """Swaps, loop devices, mounts, processes, groups, records and exports of this node."""
        run_dir = str(self.node.run_dir)
        found = [row.device for row in devices.swaps() if row.device in self.loops()]
        found += self.loops()
        found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if run_dir in line]
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = process.read_bytes().split(b"\0")
                if Path(os.fsdecode(words[0])).name in ("nbdfuse", "swapoff") and run_dir.encode() in b" ".join(words):
                    found.append(str(process))
        found += map(str, set(self.groups()) - self.groups_before)
        found += [str(path) for path in (self.node.run_dir / "swap").glob("*") if path.name != ".lock"]
        with contextlib.suppress(RamsterError):
            found += [f"export {each['name']}" for each in self.node.control.exports()]
        return found

    def groups(self) -> Iterator[Path]:
        return cgroups.named(f"ramster-swap-{NAME}*")

    def loops(self) -> list[str]:
        run_dir = str(self.node.run_dir)
        found = []
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if path.read_text().startswith(run_dir):
                    found.append(f"/dev/{path.parts[3]}")
        return found


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    nodes = {
        "alpha": {"arena": {"size": "24MiB", "lock": True, "full_wait": "5s"}},
        "beta": {"arena": {"size": "8MiB", "lock": True}, "lend": {"size": "256MiB"}},
    }
    with Cluster(nodes) as cluster:
        machine = Machine(cluster.start())
        if not machine.node.status()["arena"]["locked"]:
            pytest.skip("this user may not lock an arena of 24 MiB")
        yield machine
        # Each test has ended its own; this is for one that failed.
        machine.ramster("swap", "off", "--all", "--force")


@pytest.fixture
def swapping(machine: Machine) -> Iterator[Machine]:
    """The kernel swaps on the node inside the test, and nothing of it is left afterwards."""
    made = machine.ramster("swap", "on", "--way", "bridge", "--size", "256MiB", "--accept-loss")
    assert made.returncode == 0, made.stderr
    try:
        yield machine
    finally:
        ended = machine.ramster("swap", "off", "--force")
    assert ended.returncode == 0, ended.stderr
    assert machine.leftovers() == []


# --- programs that nobody here wrote ------------------------------------------------------------------------------


def limited(machine: Machine, memory: str, tmp_path: Path, *command: str) -> tuple[str, dict[str, Any]]:
    """What the command printed, and its report. It must have swapped."""
    report = tmp_path / "report.json"
    words = machine.command("run", "--memory", memory, "--json", str(report), "--", *command)
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=C_LOCALE
    ) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    found = json.loads(report.read_text())
    assert found["peak_bytes"] <= found["limit_bytes"]
    assert found["pages_out"] > 1000 and found["pages_in"] > 0
    assert not found["oom_kills"]
    assert not list(cgroups.named(cgroups.name_for(PREFIX, process.pid)))
    return out, found


C_LOCALE = {**os.environ, "LC_ALL": "C"}


def unlimited(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=C_LOCALE).stdout


def test_sort_gives_the_same_in_less_ram_than_it_needs(swapping: Machine, tmp_path: Path) -> None:
    rng = random.Random(1)
    words = tmp_path / "words"
    words.write_text("".join(f"{rng.getrandbits(64):x}\n" for _ in range(600_000)))
    for name, run in (("plain", unlimited), ("limited", lambda *c: limited(swapping, "24MiB", tmp_path, *c))):
        run("sort", "-S", "200M", "--parallel=1", str(words), "-o", str(tmp_path / name))
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "limited").read_bytes()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_gcc_gives_the_same_in_less_ram_than_it_needs(swapping: Machine, tmp_path: Path) -> None:
    source = tmp_path / "big.c"
    body = (
        "int s = {0}; for (int j = 0; j < a; j++) {{ s += b[j] * {0}; if (s > {0}) s ^= b[(j * {0}) % a]; }} return s;"
    )
    source.write_text("\n".join(f"int f{n}(int a, int *b) {{ {body.format(n + 1)} }}" for n in range(600)))
    outputs = {}
    for name in ("plain", "limited"):
        output = tmp_path / f"{name}.s"
        command = ["gcc", "-O1", "-S", str(source), "-o", str(output)]
        unlimited(*command) if name == "plain" else limited(swapping, "20MiB", tmp_path, *command)
        outputs[name] = output.read_bytes()
    assert outputs["plain"] == outputs["limited"]


NUMPY = """
import numpy as np, zlib
a = np.random.default_rng(1).integers(0, 1 << 12, 8 << 20).astype("i4")
b = a[::-1].copy()
b += 1
print(int(a.sum()), zlib.crc32(b.data), zlib.crc32(a.data))
"""


def test_numpy_gives_the_same_in_less_ram_than_it_needs(swapping: Machine, tmp_path: Path) -> None:
    command = (sys.executable, "-c", NUMPY)
    out, report = limited(swapping, "40MiB", tmp_path, *command)
    assert out == unlimited(*command)
    row = swapping.json("swap", "status")["swaps"][0]
    assert row["export"]["writes"] > 0 and row["export"]["pages_lost"] == 0 and row["export"]["errors"] == 0
    assert report["swap_peak_bytes"] > 0
    # More was out than the arena holds, so much of it went on to the lender; and what a program leaves is freed there.
    assert swapping.node.status()["arena"]["shipped_segments"] > 0
    wait_until(lambda: swapping.node.control.exports()[0]["pages_stored"] < 2048, "discards free pages", 20.0)


HOLDER = """
import random, sys, zlib
data = [random.Random(n).randbytes(2048) * 512 for n in range(64)]
sums = [zlib.crc32(each) for each in data]
print("ready", flush=True)
sys.stdin.readline()
print(sums == [zlib.crc32(each) for each in data], flush=True)
"""


def test_swapoff_brings_every_page_back(machine: Machine) -> None:
    assert machine.ramster("swap", "on", "--way", "bridge", "--size", "128MiB", "--accept-loss").returncode == 0
    command = machine.command("run", "--memory", "24MiB", "--", sys.executable, "-c", HOLDER)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        row = machine.json("swap", "status")["swaps"][0]
        assert row["used_bytes"] > 16 * MIB and row["state"] == "on"
        # Within its limit there is no room for what is out there: the kernel would kill it.
        refused = machine.ramster("swap", "off")
        assert refused.returncode == 5 and cgroups.name_for(PREFIX, process.pid) in refused.stderr
        for path in cgroups.named(cgroups.name_for(PREFIX, process.pid)):
            for name in ("memory.limit_in_bytes", "memory.max"):
                if (path / name).exists():
                    (path / name).write_text(str(256 * MIB))
        ended = machine.ramster("swap", "off")
        assert ended.returncode == 0, ended.stderr
        assert machine.leftovers() == []
        out, errors = process.communicate("\n", timeout=TIMEOUT_S)
        assert (out, process.returncode) == ("True\n", 0), errors
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        machine.ramster("swap", "off", "--force")


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_without_a_copy_it_is_refused_until_one_insists(machine: Machine) -> None:
    done = machine.ramster("swap", "on", "--size", "64MiB")
    assert done.returncode == 5 and "--accept-loss" in done.stderr
    done = machine.ramster("swap", "on", "--size", "64GiB", "--accept-loss")
    assert done.returncode == 5 and "not enough room" in done.stderr
    assert machine.leftovers() == []


def test_a_name_in_use_is_refused_and_stays(swapping: Machine) -> None:
    done = swapping.ramster("swap", "on", "--size", "16MiB", "--accept-loss")
    assert done.returncode == 5 and f"swap {NAME} already" in done.stderr
    done = swapping.ramster("swap", "on", "--size", "16MiB", "--accept-loss", "--name", f"{NAME}b")
    assert done.returncode == 0, done.stderr
    assert "in turn" in done.stderr
    done = swapping.ramster("swap", "off")
    assert done.returncode == 2 and f"{NAME}, {NAME}b" in done.stderr
    assert swapping.ramster("swap", "off", f"{NAME}b").returncode == 0
    assert [each["name"] for each in swapping.json("swap", "status")["swaps"]] == [NAME]


def test_an_export_of_that_name_is_not_touched(machine: Machine) -> None:
    machine.node.control.create_export("mine", MIB)
    try:
        done = machine.ramster("swap", "on", "--size", "16MiB", "--accept-loss", "--name", "mine")
        assert done.returncode == 5 and "export rm mine" in done.stderr
        assert machine.leftovers() == ["export mine"]
    finally:
        machine.node.control.remove_export("mine")


@pytest.mark.parametrize("tool", ["nbdfuse", "losetup", "mkswap", "swapon"])
def test_a_step_that_fails_undoes_those_before_it(machine: Machine, tmp_path: Path, tool: str) -> None:
    fake = tmp_path / tool
    fake.write_text("#!/bin/sh\necho no such luck >&2\nexit 7\n")
    fake.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = machine.ramster("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss", env=path)
    assert done.returncode == 5 and "no such luck" in done.stderr
    assert machine.leftovers() == []


@pytest.mark.parametrize("tool", ["losetup", "mkswap", "swapon"])
def test_off_ends_what_a_kill_9_has_left(machine: Machine, tmp_path: Path, tool: str) -> None:
    """The tool tells when it is reached, and then waits until it is told to go on with its work."""
    real = shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    reached, go = tmp_path / "reached", tmp_path / "go"
    os.mkfifo(go)
    fake = tmp_path / tool
    fake.write_text(f'#!/bin/sh\n: >{reached}\nread x <{go}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = machine.command("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss")
    process = subprocess.Popen(words, env=path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(reached.exists, f"{tool} is called", 30.0)
    process.kill()
    process.wait()
    off = subprocess.Popen(machine.command("swap", "off"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    go.write_text("\n")  # blocks until the tool reads it, which then makes what `off` has to find
    _, errors = off.communicate(timeout=TIMEOUT_S)
    assert off.returncode == 0, errors
    assert machine.leftovers() == []
    assert machine.ramster("swap", "off").returncode == 0


def test_ctrl_c_in_the_middle_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    fake = tmp_path / "mkswap"
    fake.write_text(f"#!/bin/sh\n: >{reached}\nexec sleep 20\n")
    fake.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = machine.command("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss")
    process = subprocess.Popen(words, env=path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(reached.exists, "mkswap is called", 30.0)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130 and "interrupted" in errors
    assert time.monotonic() - began < 15
    assert machine.leftovers() == []


def test_on_takes_the_reserve_and_says_what_was_refused(machine: Machine) -> None:
    """Of the reserve and the OOM killer's score the node learns when it has the export."""
    made = machine.ramster("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss")
    assert made.returncode == 0, made.stderr
    guard = machine.node.status()["guard"]
    ((where, _),) = swap.recorded(machine.node.run_dir)
    (nbdfuse,) = devices.daemons(where)
    policy = os.sched_getscheduler(nbdfuse)
    assert machine.ramster("swap", "off").returncode == 0
    for name in ("oom_score", "reserve"):
        assert guard[name]["state"] in ("ok", "refused")
        assert (f"the node's guard: {name} refused" in made.stderr) == (guard[name]["state"] == "refused")
    assert (policy == os.SCHED_RR) == (guard["reserve"]["state"] == "ok")
    assert machine.node.status()["guard"]["reserve"]["state"] == "off"


def test_off_touches_no_other_nodes_swap_of_the_same_name(swapping: Machine) -> None:
    other = Machine(swapping.cluster, "beta")
    made = other.ramster("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss")
    try:
        assert made.returncode == 0, made.stderr
        before = swapping.json("swap", "status")["swaps"][0]
        assert before["state"] == "on" and len(before["processes"]) == 1
        assert other.json("swap", "status")["swaps"][0]["processes"] != before["processes"]
    finally:
        ended = other.ramster("swap", "off", "--force")
    assert ended.returncode == 0, ended.stderr
    assert other.leftovers() == []
    after = swapping.json("swap", "status")["swaps"][0]
    assert (after["state"], after["processes"]) == ("on", before["processes"])


def test_it_does_not_matter_by_which_path_the_node_is_named(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(machine.node.run_dir.parent)
    linked = Machine(machine.cluster)
    linked.socket = str(tmp_path / "link" / "alpha" / ".." / "alpha" / "control.sock")
    made = linked.ramster("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss")
    try:
        assert made.returncode == 0, made.stderr
        for each in (linked, machine):
            (row,) = each.json("swap", "status")["swaps"]
            assert row["state"] == "on" and row["attached"]
        assert linked.ramster("run", "--memory", "64MiB", "--", "true").returncode == 0
    finally:
        ended = linked.ramster("swap", "off", "--force")
    assert ended.returncode == 0, ended.stderr
    assert machine.leftovers() == []


def test_a_dead_nbdfuse_is_noticed_before_and_while_a_command_runs(machine: Machine) -> None:
    assert machine.ramster("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss").returncode == 0
    words = machine.command("run", "--memory", "64MiB", "--", "sh", "-c", "echo ready; read line")
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (nbdfuse,) = machine.json("swap", "status")["swaps"][0]["processes"]
        os.kill(nbdfuse, signal.SIGKILL)
        machine.killed += 1
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "while the command runs" in line and "nbdfuse" in line and f"swap off {NAME}" in line
        _, errors = process.communicate("\n", timeout=TIMEOUT_S)
        assert process.returncode == 0 and "nbdfuse" in errors
        row = machine.json("swap", "status")["swaps"][0]
        assert row["state"] == "broken" and f"swap off {NAME}" in row["why"]
        assert "nobody has been connected to its export for" in row["why"]
        wait_until(lambda: re.search(DESERTED, machine.node.log), "the node says so", TIMEOUT_S)
        refused = machine.ramster("run", "--memory", "64MiB", "--", "true")
        assert refused.returncode == 5 and "broken" in refused.stderr and "nbdfuse" in refused.stderr
        insisted = machine.ramster("run", "--memory", "64MiB", "--any-swap", "--", "true")
        assert insisted.returncode == 0 and "broken" in insisted.stderr
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        ended = machine.ramster("swap", "off", "--force")
    assert ended.returncode == 0, ended.stderr
    assert machine.leftovers() == []


def test_off_works_when_the_node_is_gone(machine: Machine) -> None:
    """The last test: it ends the node."""
    assert machine.ramster("swap", "on", "--way", "bridge", "--size", "16MiB", "--accept-loss").returncode == 0
    # Of all that this file has switched on and off, nbdfuse died once: what is switched off in order is no trouble.
    warned = re.findall(DESERTED, machine.node.log)
    assert len(warned) == machine.killed
    machine.node.kill()
    assert machine.json("swap", "status")["swaps"][0]["state"] == "cut off"
    done = machine.ramster("swap", "off")
    assert done.returncode == 0 and f"the export {NAME} was not removed" in done.stderr
    assert machine.leftovers() == []
