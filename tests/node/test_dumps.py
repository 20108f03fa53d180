"""What a core file would hold: nothing of a node, and nothing of a region that an application maps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ramster.testing.cluster import Application, Cluster


def flags(pid: int, name: str) -> list[set[str]]:
    """The kernel's flags of each mapping of the file in memory of that name."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE)
    return [set(part.partition("VmFlags:")[2].split()) for part in parts if f"/memfd:{name}" in part.partition("\n")[0]]


def smaps_readable(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/smaps").read_text())
    except PermissionError:
        return False


def test_no_page_is_in_a_core_file() -> None:
    with Cluster({"alpha": {}, "beta": {"lend": {"size": "8MiB"}, "node": {"core_dumps": True}}}) as cluster:
        cluster.start()
        node = cluster["beta"]
        assert node.process is not None
        guard = node.status()["guard"]["core_dumps"]
        assert guard["state"] == "off" and "keys" in guard["detail"]
        for name in ("ramster-arena", "ramster-lent"):
            assert [("dd" in each) for each in flags(node.process.pid, name)] == [True], name
        with Application(cluster["alpha"].region_socket, 64, 16) as application:
            assert application.ask("write", 0, 64) == 64
            found = flags(application.process.pid, "ramster-region")
            assert found and all("dd" in each for each in found)


def test_a_node_leaves_no_core_file_and_is_nobodys_to_read() -> None:
    with Cluster({"alpha": {}}) as cluster:
        node = cluster.start()["alpha"]
        assert node.status()["guard"]["core_dumps"]["state"] == "ok"
        assert node.process is not None
        # The kernel gives what such a process has in /proc to root. A process with all capabilities reads it anyway.
        assert Path(f"/proc/{node.process.pid}/mem").stat().st_uid == 0


@pytest.mark.parametrize("allowed", [True, False])
def test_its_own_files_in_proc_stay_writable(allowed: bool) -> None:
    code = f"""
import json
from ramster.node.privileges import *
from ramster.node.privileges import _libc, _lower_oom_score
state = dumps().state if {allowed} else forbid_dumps().state
before = _libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
avoid_oom()
with own_proc():
    within = _libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
print(json.dumps([state, before, within, _libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)]))
"""
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == (["off", 1, 1, 1] if allowed else ["ok", 0, 1, 0])
