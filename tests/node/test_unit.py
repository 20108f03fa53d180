"""The systemd unit of a node, as systemd itself judges it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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


def test_it_leaves_the_node_what_it_needs() -> None:
    found = settings()
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(found["RestrictAddressFamilies"][0].split())
    assert set(found["AmbientCapabilities"][0].split()) == {"CAP_SYS_RESOURCE", "CAP_IPC_LOCK", "CAP_SYS_NICE"}
    assert "RestrictRealtime" not in found, "the reserve needs SCHED_RR"
    assert "PrivateUsers" not in found, "capabilities of a user namespace lock nothing"
    assert found.get("ProcSubset", ["all"]) == ["all"], "/proc/meminfo"
    assert found["RuntimeDirectory"] == found["StateDirectory"] == ["ramster"]
