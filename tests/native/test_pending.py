"""What is decided about a get that is under way, and the clock in which others' silence is measured."""

from __future__ import annotations

from typing import Any

import pytest

from ramster.engine._pending import BEAT_MS, GAP_MS, RanClock, skipped_ms, verdict

NOW = 100_000

# state, what is known of the request, decision
TABLE = [
    ("free", {"started_ms": 0}, "wait"),
    ("completing", {"started_ms": 0, "stopping": True}, "wait"),
    # On its way to a lender.
    ("sent", {"started_ms": NOW - 1, "sent_ms": NOW - 1}, "wait"),
    ("sent", {"started_ms": NOW - 2000, "sent_ms": NOW - 2000}, "wait"),
    ("sent", {"started_ms": NOW - 2001, "sent_ms": NOW - 2001}, "ask"),
    ("sent", {"started_ms": NOW - 4000, "sent_ms": NOW - 1000}, "wait"),
    ("sent", {"started_ms": NOW - 5000, "sent_ms": NOW - 5000}, "ask"),
    ("sent", {"started_ms": NOW - 5001, "sent_ms": NOW - 1}, "give up"),
    ("sent", {"started_ms": NOW, "sent_ms": NOW, "stopping": True}, "give up"),
    # Without a connection it is asked at every look, in case there is one by now.
    ("waits", {"started_ms": NOW - 1, "sent_ms": NOW - 1}, "ask"),
    ("waits", {"started_ms": NOW - 5001, "sent_ms": NOW - 5001}, "give up"),
    # The lender's memory is gone, or the segment came back: no need to wait for anybody.
    ("sent", {"started_ms": NOW, "sent_ms": NOW, "remote": False}, "settle"),
    ("waits", {"started_ms": NOW, "sent_ms": NOW, "remote": False, "mirrored": True}, "settle"),
    ("sent", {"started_ms": NOW - 5001, "sent_ms": NOW, "remote": False}, "give up"),
    # The spill file has it, too.
    ("sent", {"started_ms": NOW - 100, "sent_ms": NOW - 100, "mirrored": True}, "wait"),
    ("sent", {"started_ms": NOW - 101, "sent_ms": NOW - 101, "mirrored": True}, "redirect"),
    ("waits", {"started_ms": NOW, "sent_ms": NOW, "mirrored": True}, "redirect"),
    # In the spill file's hands: a disk is given longer, and nobody else is asked.
    ("spill", {"started_ms": NOW - 5001, "spilled": True, "remote": False}, "wait"),
    ("spill", {"started_ms": NOW - 30_000, "spilled": True, "mirrored": True}, "wait"),
    ("spill", {"started_ms": NOW - 30_001, "spilled": True}, "give up"),
    ("spill", {"started_ms": NOW - 30_001, "spilled": True, "give_up_ms": 60_000}, "wait"),
    ("spill", {"started_ms": NOW, "spilled": True, "stopping": True}, "give up"),
    ("sent", {"started_ms": NOW - 6000, "sent_ms": NOW - 1, "spilled": True}, "wait"),
]


@pytest.mark.parametrize(("state", "known", "decision"), TABLE)
def test_what_is_decided(state: str, known: dict[str, Any], decision: str) -> None:
    assert verdict(state, now_ms=NOW, **known) == decision


@pytest.mark.parametrize(
    ("gap_ms", "skipped"),
    [
        (0, 0),
        (1, 0),
        (BEAT_MS, 0),
        (GAP_MS, 0),
        (GAP_MS + 1, GAP_MS + 1 - BEAT_MS),
        (6000, 6000 - BEAT_MS),
        (86_400_000, 86_400_000 - BEAT_MS),
    ],
)
def test_a_gap_between_two_looks_is_time_in_which_the_node_did_not_run(gap_ms: int, skipped: int) -> None:
    assert skipped_ms(NOW, NOW + gap_ms) == skipped


def test_the_clock_begins_with_no_gap_and_is_never_zero() -> None:
    clock = RanClock()
    readings = [clock.ms() for _ in range(1000)]
    assert readings[0] == BEAT_MS
    assert readings == sorted(readings)
    assert clock.gaps == 0 or readings[-1] > BEAT_MS, "only a machine that stood still for a moment shows a gap"
