"""The systemd unit of a node, as systemd itself judges it."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ramster.cli.commands.stop import WAIT_S
from ramster.constants import NBD_SOCKET
from ramster.node.main import END_S
from ramster.testing.cluster import Cluster
from ramster.testing.nbd_handshake import Dialled

UNIT = Path(__file__).parents[2] / "packaging" / "systemd" / "ramster.service"
EXPOSURE_MAX = 3.0


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_it_exposes_little() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = re.search(r"exposure level for \S+: ([0-9.]+)", ran.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze judges no file: {ran.stderr.strip()[:200]}")
    assert float(found[1]) <= EXPOSURE_MAX


def stop_command() -> list[str]:
    """As systemd runs it, which takes %% and $$ for one of them."""
    (line,) = settings()["ExecStop"]
    assert line.startswith("-"), "what it says is no failure of the unit"
    return [word.replace("$$", "$") for word in shlex.split(line[1:])]


@pytest.mark.parametrize(
    ("main_pid", "codes", "called"),
    [
        ("", [0], []),
        ("17", [0], ["stop --config /etc/ramster/node.toml"]),
        ("17", [5, 0], ["stop --config /etc/ramster/node.toml", "stop --force --config /etc/ramster/node.toml"]),
    ],
    ids=["the node has died: its holder keeps the arena", "nothing is lost", "refused"],
)
def test_a_stop_is_in_order_where_it_can_be(tmp_path: Path, main_pid: str, codes: list[int], called: list[str]) -> None:
    for code in codes:
        (tmp_path / str(codes.index(code))).write_text(str(code))
    fake = tmp_path / "ramster"
    fake.write_text(
        f'#!/bin/sh\ncd {tmp_path}\nn=$(cat calls 2>/dev/null | wc -l)\necho "$@" >>calls\nexit $(cat $n)\n'
    )
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | ({"MAINPID": main_pid} if main_pid else {})
    subprocess.run(stop_command(), env=environment, check=False, timeout=60)
    calls = tmp_path / "calls"
    assert (calls.read_text().splitlines() if calls.exists() else []) == called


def test_what_a_stop_loses_is_said_and_nothing_is_killed(tmp_path: Path) -> None:
    """A real node with pages that exist nowhere else: one SIGTERM is refused, the unit's stop is carried out."""
    with Cluster(["alpha"]).start() as cluster:
        node = cluster["alpha"]
        node.control.create_export("vm", 1 << 20)
        with Dialled(node.run_dir / NBD_SOCKET) as dialled:
            client = dialled.go("vm")
            client.write(0, bytes(range(256)) * 16)
            node.signal(signal.SIGTERM)
            node.wait(lambda _: "not stopping: export vm holds 1 pages" in node.log, "refused")
            assert node.process is not None
            fake = tmp_path / "ramster"
            fake.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m ramster.cli "$@"\n')
            fake.chmod(0o755)
            ran = subprocess.run(
                [*stop_command()[:-1], str(node.config)],
                env={"PATH": f"{tmp_path}:/usr/bin:/bin", "MAINPID": str(node.process.pid)},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        assert ran.returncode == 0 and node.wait_exit() == 0, ran.stderr
        assert "this would be lost:\n  4 KiB stored in export vm" in ran.stderr
        assert "lost: 4 KiB stored in export vm" in ran.stderr
        assert "node alpha has stopped" in node.log


def test_systemd_waits_for_longer_than_a_stop_takes() -> None:
    found = settings()
    assert found["TimeoutStopSec"] == ["90s"] and END_S < WAIT_S < 90
    assert found["KillMode"] == ["process"], "the holder"


def test_systemd_can_read_it() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNIT)], capture_output=True, text=True, timeout=60, check=False
    )
    about = [line for line in ran.stderr.splitlines() if UNIT.name in line]
    assert ran.returncode == 0 and not about, ran.stderr


def test_it_leaves_the_node_what_it_needs() -> None:
    found = settings()
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(found["RestrictAddressFamilies"][0].split())
    assert set(found["AmbientCapabilities"][0].split()) == {"CAP_SYS_RESOURCE", "CAP_IPC_LOCK", "CAP_SYS_NICE"}
    assert "RestrictRealtime" not in found, "the reserve needs SCHED_RR"
    assert "PrivateUsers" not in found, "capabilities of a user namespace lock nothing"
    assert found.get("ProcSubset", ["all"]) == ["all"], "/proc/meminfo"
    assert found["RuntimeDirectory"] == found["StateDirectory"] == ["ramster"]
