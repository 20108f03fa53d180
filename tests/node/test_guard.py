"""What a node does to its own process, what it says of it, and what happens where it may not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramster.constants import MIB
from ramster.node import privileges
from ramster.testing.cluster import Cluster, Node

PYTHON = [sys.executable, "-P"]
EVERY = ["core_dumps", "locked_memory", "io_flusher", "oom_score", "reserve", "open_files", "code", "arena"]


def may(capability: int) -> bool:
    """Whether this process has a capability."""
    (found,) = re.findall(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(int(found, 16) >> capability & 1)


CAN_LOCK = may(14) or resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY
CAN_SPARE = may(24)
CAN_RESERVE = may(23) or resource.getrlimit(resource.RLIMIT_RTPRIO)[1] != 0


def without(capability: str) -> list[str]:
    """A command in front of another, which then lacks this capability."""
    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("needs root and setpriv to give up a capability")
    return ["setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}"]


def python(code: str, before: list[str] | None = None) -> Any:
    """What the code prints, as JSON, in a process of its own."""
    command = [*(before or []), *PYTHON, "-c", "import json\nfrom ramster.node.privileges import *\n" + code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# --- what may be done, asked without a node ------------------------------------------------------------------------


def test_what_would_be_allowed_is_said_without_changing_anything() -> None:
    before = Path("/proc/self/oom_score_adj").read_text(), resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = {check.name: check for check in privileges.checks(arena_bytes=64 * MIB)}
    assert (Path("/proc/self/oom_score_adj").read_text(), resource.getrlimit(resource.RLIMIT_MEMLOCK)) == before
    assert found.keys() >= {"locked_memory", "io_flusher", "oom_score", "reserve", "open_files", "arena"}
    assert (found["locked_memory"].state == "ok") == CAN_LOCK
    assert (found["oom_score"].state == "ok") == CAN_SPARE
    assert (found["reserve"].state == "ok") == CAN_RESERVE
    if not CAN_SPARE:
        assert found["io_flusher"].state == "refused", "unsupported is something else"
    for check in found.values():
        assert check.detail
        assert bool(check.advice) == (check.state in ("refused", "unsupported")), check


def test_a_limit_that_a_node_would_run_into_is_refused_beforehand() -> None:
    """mlockall itself would be allowed there, and every later mmap fail."""
    code = """
import resource, threading
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
check = lock_memory()
threads = [threading.Thread(target=int) for _ in range(4)]
[thread.start() for thread in threads]
print(json.dumps([check.state, check.detail, may_lock(4 << 20), may_lock(16 << 20)]))
"""
    if 0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] < 8 * MIB:
        pytest.skip("the limit is lower here")
    state, detail, less, more = python(code, without("ipc_lock"))
    assert (state, less, more) == ("refused", True, False)
    assert "not more than 8 MiB" in detail


def test_without_a_capability_the_advice_names_it() -> None:
    code = "print(json.dumps([[c.name, c.state, c.advice] for c in checks(1 << 30)]))"
    before = without("ipc_lock")
    found = {name: (state, advice) for name, state, advice in python(code, before)}
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY:
        pytest.skip("locked memory is not limited here")
    for name in ("arena", "locked_memory"):
        assert found[name][0] == "refused" and "CAP_IPC_LOCK" in found[name][1] and "LimitMEMLOCK" in found[name][1]


def test_an_unknown_order_to_the_kernel_is_unsupported() -> None:
    """What an older kernel answers: EINVAL."""
    code = """
import ramster.node.privileges as p
p.PR_SET_IO_FLUSHER = 123456
p.MCL_ONFAULT = 64
print(json.dumps([become_flusher().state, lock_memory().state if may_lock(1 << 40) else "unsupported"]))
"""
    assert python(code) == ["unsupported", "unsupported"]


@pytest.mark.skipif(not CAN_LOCK, reason="memory may not be locked here")
def test_what_is_locked_is_what_is_touched() -> None:
    """Neither a file in memory that is mapped later nor a thread's stack is brought in whole."""
    code = """
import mmap, os, threading
from pathlib import Path
from ramster.node.privileges import _libc
assert lock_memory().state == "ok"
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
fd = os.memfd_create("region"); os.ftruncate(fd, 256 << 20)
before = resident()
m = mmap.mmap(fd, 256 << 20)
stop = threading.Event()
threads = [threading.Thread(target=stop.wait) for _ in range(8)]
[thread.start() for thread in threads]
after = resident()
stop.set()
print(json.dumps([after - before, os.fstat(fd).st_blocks]))
"""
    grown, blocks = python(code)
    assert grown < 8 * MIB
    assert blocks == 0, "a hole that is touched is a page of zeros"


def test_the_program_is_brought_into_memory() -> None:
    code = "check = hold_code(); print(json.dumps([check.state, check.detail]))"
    state, detail = python(code)
    if state == "unsupported":
        pytest.skip(detail)
    assert int(detail.split()[0]) >= 4


def test_the_lowest_score_that_is_allowed_is_found() -> None:
    if CAN_SPARE:
        pytest.skip("this user may set any score")
    code = """
import os
from ramster.node import privileges as p
p._set_oom_score(300)
check = avoid_oom()
print(json.dumps([check.state, check.detail]))
"""
    state, detail = python(code)
    lowest = int(Path("/proc/self/oom_score_adj").read_text())
    assert state == "refused"
    assert detail == f"oom_score_adj is {min(lowest, 300)} instead of 300, not -1000"


@pytest.mark.skipif(not CAN_RESERVE, reason="needs CAP_SYS_NICE")
def test_every_thread_may_use_the_reserve_those_started_later_too() -> None:
    code = """
import threading
from ramster.node.privileges import _schedule
stop, before = threading.Event(), os.sched_getscheduler(0)
def parent():
    stop.wait()
    child = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(threading.get_native_id())))
    child.start()
    child.join()
seen, thread = [], threading.Thread(target=parent)
thread.start()
check = take_reserve()
marked = real_time_threads()
stop.set()
thread.join()
_schedule(os.SCHED_OTHER, 0)
print(json.dumps([check.state, marked, seen == [os.SCHED_RR], os.sched_getscheduler(0) == before == os.SCHED_OTHER]))
"""
    assert python(code) == ["ok", [2, 2], True, True]


def test_without_the_right_to_real_time_nothing_changes_and_the_advice_says_what_to_grant() -> None:
    code = """
resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
check = take_reserve()
print(json.dumps([check.state, check.advice, os.sched_getscheduler(0) == os.SCHED_OTHER]))
"""
    state, advice, unchanged = python(code, without("sys_nice"))
    assert (state, unchanged) == ("refused", True)
    assert "LimitRTPRIO=1" in advice and "CAP_SYS_NICE" in advice


# --- where an arena's file lies ------------------------------------------------------------------------------------


def test_a_file_on_a_disk_is_no_arena(tmp_path: Path) -> None:
    found = privileges.keeps_in_ram(tmp_path / "not" / "there" / "arena")
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() == "tmpfs":
        pytest.skip("temporary files are in memory here")
    assert found.state == "refused" and "not on a tmpfs" in found.detail and "noswap" in found.advice


@pytest.mark.parametrize(("options", "state"), [("noswap,size=1m", "ok"), ("size=1m", "refused")])
def test_a_tmpfs_keeps_an_arena_if_it_is_never_swapped_out(tmp_path: Path, options: str, state: str) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount")
    code = (
        "import json\nfrom pathlib import Path\nfrom ramster.node.privileges import keeps_in_ram\n"
        f"print(json.dumps(keeps_in_ram(Path({str(tmp_path / 'arena')!r})).state))"
    )
    # In a mount namespace of its own: nothing is left mounted.
    script = f'mount -t tmpfs -o {options} ramster "$1" || exit 99; shift; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), *PYTHON, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode == 99 or "unshare" in ran.stderr:
        pytest.skip(f"cannot mount that here: {ran.stderr.strip()}")
    assert json.loads(ran.stdout) == state, ran.stderr


# --- a node --------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with Cluster({"alpha": {"node": {"guard": getattr(request, "param", "auto")}, "arena": {"lock": True}}}) as cluster:
        cluster["alpha"].start()
        cluster["alpha"].wait(lambda status: status["state"] == "running", "runs")
        yield cluster["alpha"]


def test_a_node_says_what_came_of_it(node: Node) -> None:
    guard = node.status()["guard"]
    assert sorted(guard) == sorted(EVERY)
    assert (guard["locked_memory"]["state"] == "ok") == CAN_LOCK
    assert guard["oom_score"] == {
        "state": "off",
        "detail": "oom_score_adj is 0 until the node has an export",
        "advice": "",
    }
    assert "guard: open_files ok" in node.log and "io_flusher" in node.log
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    locked = int(re.findall(r"^VmLck:\s*(\d+)", status, re.MULTILINE)[0])
    assert (locked > 100_000) == CAN_LOCK, "more than the arena"


@pytest.mark.parametrize("node", ["off"], indirect=True)
def test_off_is_off(node: Node) -> None:
    guard = node.status()["guard"]
    assert {guard[name]["state"] for name in EVERY if name not in ("arena", "core_dumps")} == {"off"}


@pytest.mark.parametrize("node", ["on"], indirect=True)
def test_on_spares_a_node_from_the_oom_killer_at_once(node: Node) -> None:
    assert node.process is not None
    score = int(Path(f"/proc/{node.process.pid}/oom_score_adj").read_text())
    said = node.status()["guard"]["oom_score"]
    assert (said["state"], score == -1000) == (("ok", True) if CAN_SPARE else ("refused", False))


@pytest.mark.skipif(not CAN_RESERVE, reason="needs CAP_SYS_NICE")
def test_a_thread_without_it_is_reported_and_does_not_keep_the_others_from_coming_back() -> None:
    code = """
import threading
stop, ordinary = threading.Event(), threading.Event()
def fallen_out():
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    ordinary.set()
    stop.wait()
guard = Guard("auto")
guard.serve(1, 1)
thread = threading.Thread(target=fallen_out)
thread.start()
ordinary.wait()
said = guard.report()["reserve"]
guard.serve(0, 0)
marked = real_time_threads()
stop.set()
print(json.dumps([said["state"], said["detail"], marked]))
"""
    assert python(code) == ["refused", "holds for 1 of 2 threads", [0, 2]]


@pytest.mark.skipif(not CAN_RESERVE, reason="needs CAP_SYS_NICE")
def test_a_node_may_use_the_reserve_as_long_as_this_machine_swaps_on_it(node: Node) -> None:
    def state() -> str:
        return str(node.status()["guard"]["reserve"]["state"])

    def policies() -> set[int]:
        assert node.process is not None
        return {os.sched_getscheduler(int(each.name)) for each in Path(f"/proc/{node.process.pid}/task").iterdir()}

    assert (state(), policies()) == ("off", {os.SCHED_OTHER})
    node.control.create_export("image", 64 * MIB)
    assert (state(), policies()) == ("off", {os.SCHED_OTHER})
    node.control.create_export("swap", 64 * MIB, swap=True)
    assert (state(), policies()) == ("ok", {os.SCHED_RR})
    node.control.remove_export("swap")
    assert (state(), policies()) == ("off", {os.SCHED_OTHER})


@pytest.mark.skipif(not CAN_SPARE, reason="needs CAP_SYS_RESOURCE")
@pytest.mark.parametrize("node", ["on"], indirect=True)
def test_every_thread_of_a_node_is_a_flusher(node: Node) -> None:
    assert node.status()["guard"]["io_flusher"]["state"] == "ok"


@pytest.mark.parametrize(("exports", "swapped_on"), [(1, 0), (2, 1), (1, 1)])
def test_a_node_with_an_export_is_spared_and_one_without_is_not(exports: int, swapped_on: int) -> None:
    guard = privileges.Guard("auto")
    before = Path("/proc/self/oom_score_adj").read_text(), os.sched_getscheduler(0)
    guard.serve(exports, swapped_on)
    states = {name: check["state"] for name, check in guard.report().items()}
    assert states["oom_score"] == ("ok" if CAN_SPARE else "refused")
    assert states["reserve"] == ("off" if not swapped_on else "ok" if CAN_RESERVE else "refused")
    guard.serve(exports, 0)
    assert guard.report()["reserve"]["state"] == "off"
    guard.serve(0, 0)
    assert guard.report()["oom_score"]["state"] == "off"
    assert (Path("/proc/self/oom_score_adj").read_text(), os.sched_getscheduler(0)) == before


def test_what_was_refused_is_said_with_the_first_export_and_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    guard = privileges.Guard("on")  # which changes nothing of this process after `begin`
    refused = privileges.Check("oom_score", "refused", "it is 0", "OOMScoreAdjust=-1000")
    for check, exports, lines in (
        (refused, 0, 0),
        (refused, 1, 1),
        (refused, 2, 0),
        (dataclasses.replace(refused, detail="it is 10"), 2, 1),
        (privileges.Check("oom_score", "ok", "it is -1000"), 2, 0),
        (refused, 2, 1),
        (refused, 0, 0),
        (refused, 1, 0),
    ):
        caplog.clear()
        guard.add(check)
        guard.serve(exports, 0)
        assert len(caplog.records) == lines, (check, exports)


def test_a_guard_that_is_off_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = privileges.Guard("off")
    guard.begin()
    for _ in range(3):
        guard.serve(1, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
