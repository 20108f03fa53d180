"""`ramster doctor`: names, states, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ramster.cli.doctor import Check, exit_code, way


def test_it_says_what_this_machine_can() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ramster.cli", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] and done.returncode in (0, 7, 8, 14), done.stderr
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert len(states) == len(found["checks"])
    assert set(states.values()) <= {"ok", "missing", "refused", "note"}
    assert {"kernel", "nbd", "nbd-client", "ublk", "userfaultfd", "cgroup", "psi", "zswap", "round_trip"} <= set(states)
    assert all(check["detail"] for check in found["checks"])
    if done.returncode == 0:
        assert found["way"] in ("nbd", "bridge")


@pytest.mark.parametrize(
    ("failed", "code"), [([], 0), ([8], 8), ([8, 14], 14), ([14, 7, 8], 7)], ids=["none", "root", "tool", "kernel"]
)
def test_the_first_thing_to_see_to_decides_the_exit_code(failed: list[int], code: int) -> None:
    found = [Check(f"c{number}", "missing", "", "", True, number) for number in failed]
    assert exit_code([*found, Check("other", "missing", ""), Check("fine", "ok", "", "", True, 7)]) == code


def test_the_kernels_nbd_comes_first() -> None:
    bridge = [Check(name, "ok", "") for name in ("fuse", "loop", "nbdfuse", "losetup")]
    nbd = [Check(name, "ok", "") for name in ("nbd", "nbd-client")]
    assert way([*bridge, *nbd]) == "nbd"
    assert way([*bridge, nbd[0]]) == "bridge"
    assert way(nbd[:1]) is None
