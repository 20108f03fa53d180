"""Which process of a peer is believed: the table of what decides it."""

from __future__ import annotations

import pytest

from ramster.node.lives import Life, Verdict, judge

OLD: Life = (1, 500)
HEARD: Life = (1, 501)
NEW: Life = (2, 600)
THIRD: Life = (3, 600)


@pytest.mark.parametrize(
    ("asked", "now", "waited_s", "verdict"),
    [
        (None, None, 0.0, Verdict.BELIEVED),  # nobody is there
        (OLD, None, 0.0, Verdict.BELIEVED),  # closed or reset meanwhile
        (NEW, NEW, 0.0, Verdict.BELIEVED),  # its own
        (OLD, NEW, 0.0, Verdict.BELIEVED),  # its other connection was first
        (OLD, OLD, 0.0, Verdict.WAITS),
        (OLD, OLD, 1.9, Verdict.WAITS),
        (OLD, OLD, 2.0, Verdict.BELIEVED),  # silent for long enough
        (OLD, HEARD, 0.1, Verdict.REFUSED),
        (OLD, HEARD, 9.0, Verdict.REFUSED),  # an answer that comes late is one
        (None, OLD, 0.1, Verdict.REFUSED),  # it came back while the newcomer was greeted
        (OLD, THIRD, 0.1, Verdict.REFUSED),
    ],
)
def test_a_newcomer_of_generation_2(asked: Life | None, now: Life | None, waited_s: float, verdict: Verdict) -> None:
    assert judge(2, asked, now, waited_s, 2.0) is verdict
