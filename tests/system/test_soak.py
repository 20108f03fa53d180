"""The soak for seconds instead of minutes, and proof that it finds what it is there to find."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ramster.errors import KernelUnsupported, PermissionMissing
from ramster.testing import _touch

DEADLINE_S = 150.0


@pytest.fixture(scope="module", autouse=True)
def userfaultfd() -> None:
    try:
        _touch.bare_fault(np.zeros(1, np.int64), 1)
    except (KernelUnsupported, PermissionMissing) as error:
        pytest.skip(str(error))


def soak(seconds: int, *options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ramster.testing.soak", f"--seconds={seconds}", "--json", *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_every_page_is_right_under_full_load() -> None:
    status, summary = soak(6, "--seed=11")
    assert (status, summary["ok"], summary["wrong"]) == (0, True, [])
    totals = summary["totals"]
    for name in (
        "visits",
        "writes",
        "applications_killed",
        "links_cut",
        "nodes_segments_shipped",
        "nodes_remote_gets",
        "puts",
        "shipped",
        "remote_gets",
    ):
        assert totals[name] > 0, name
    assert totals["plugged"] + totals["cleaned"] > 0


@pytest.mark.parametrize(
    ("where", "told"),
    [("memory", "WrongPage"), ("arena", "SIGBUS|Errno 5"), ("pools", "PageLost")],  # an application, or an NBD client
)
def test_a_spoilt_byte_is_found(where: str, told: str) -> None:
    status, summary = soak(5, "--seed=12", f"--sabotage={where}")
    assert (status, summary["ok"]) == (1, False)
    assert any(re.search(told, problem) for problem in summary["wrong"]), summary["wrong"]
