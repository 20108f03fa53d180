"""`ramster swap` attaches the kernel of the guest in which its node runs, with a lender on this machine."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.guest.scenarios import INSIDE_MIB, LIMIT_MIB, WITHIN_MIB, Run

from ramster.errors import Refused

pytestmark = pytest.mark.long


def exports(run: Run, turn: int) -> list[dict[str, Any]]:
    """What `ramster export ls --json` said."""
    step = [step for step in run.guest.steps if " export ls " in step.words][turn]
    said: list[dict[str, Any]] = json.loads("\n".join(step.text))["exports"]
    return said


def test_swap_on_refuses_pages_without_a_second_copy_and_says_why(commanded: Run) -> None:
    refused = next(step for step in commanded.guest.steps if " swap on " in step.words)
    assert refused.code == Refused.exit_code
    assert "no second copy" in refused.text[0] and "--accept-loss" in refused.text[0]


def test_the_guard_of_a_node_whose_user_may_everything_is_refused_nothing(commanded: Run) -> None:
    (status,) = [json.loads("\n".join(step.text)) for step in commanded.guest.steps if " status --json " in step.words]
    states = {name: check["state"] for name, check in status["guard"].items()}
    assert states.keys() >= {"locked_memory", "io_flusher", "oom_score", "reserve", "arena"}
    assert set(states.values()) == {"ok"}, states


def test_every_other_step_succeeds(commanded: Run) -> None:
    assert [words for words, _ in commanded.failed if "swap on" not in words] == [], commanded.guest.story()
    assert len(commanded.failed) == 1


def test_the_kernel_swapped_and_every_page_is_right(commanded: Run) -> None:
    work = next(step for step in commanded.guest.steps if "workload" in step.words).numbers()
    assert work["pages"] == INSIDE_MIB << 8
    assert work["right"] == work["verified"]
    assert min(commanded.swapped["pswpout"], commanded.swapped["pswpin"]) > 2000
    assert commanded.swapped["oom_kill"] == 0


def test_a_command_within_a_limit_is_counted_by_its_cgroup(commanded: Run) -> None:
    step = next(step for step in commanded.guest.steps if f" run --memory {LIMIT_MIB}MiB " in step.words)
    assert step.numbers()["right"] == step.numbers()["verified"]
    said = json.loads("\n".join(line for line in step.text if not line.startswith("pages=")))
    assert said["exit_code"] == 0 and said["oom_kills"] == 0
    assert said["peak_bytes"] <= LIMIT_MIB << 20 < said["swap_peak_bytes"] + (LIMIT_MIB << 20)
    assert min(said["pages_out"], said["pages_in"]) > (WITHIN_MIB - LIMIT_MIB) << 8


def test_pages_went_to_the_lender(commanded: Run) -> None:
    assert commanded.far["counters"]["segments_received"] > 10
    (export,) = exports(commanded, 0)
    assert export["pages_lost"] == export["errors"] == 0


def test_swap_off_leaves_no_swap_no_device_and_no_export(commanded: Run) -> None:
    first, last = (commanded.guest.step("show /proc/swaps", turn).text for turn in (0, -1))
    assert re.match(r"\S*/dev/nbd0\s", first[1])
    assert len(last) == 1  # the heading
    assert exports(commanded, -1) == []


def test_the_guest_has_nothing_to_complain_about(commanded: Run) -> None:
    assert commanded.guest.complaints() == []
