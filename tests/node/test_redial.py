"""How long a node pauses between attempts to have a peer back, and how long it gives each."""

from __future__ import annotations

import pytest

from ramster.node.redial import HANDSHAKE_S, Redial

DEFAULT = Redial(reconnect_min=0.1, reconnect_max=1.0, give_up=5.0)


@pytest.mark.parametrize(
    ("redial", "tries", "urgent", "pause"),
    [
        (DEFAULT, 1, False, (0.1, 0.1)),
        (DEFAULT, 3, False, (0.1, 0.4)),
        (DEFAULT, 5, False, (0.1, 1.0)),
        (DEFAULT, 5000, False, (0.1, 1.0)),
        # While gets wait: a tenth of give_up at most, whatever the knobs say.
        (DEFAULT, 1, True, (0.1, 0.1)),
        (DEFAULT, 5000, True, (0.1, 0.5)),
        (Redial(0.1, 30.0, 60.0), 5000, True, (0.1, 6.0)),
        (Redial(30.0, 30.0, 60.0), 1, False, (30.0, 30.0)),
        (Redial(30.0, 30.0, 60.0), 1, True, (6.0, 6.0)),
        (Redial(0.02, 0.1, 2.0), 9, True, (0.02, 0.1)),
    ],
)
def test_pauses(redial: Redial, tries: int, urgent: bool, pause: tuple[float, float]) -> None:
    assert redial.pause(tries, urgent) == pytest.approx(pause)


@pytest.mark.parametrize(
    ("redial", "tries", "patience"),
    [
        (DEFAULT, 0, 1.25),
        (DEFAULT, 1, 2.5),
        (DEFAULT, 2, HANDSHAKE_S),
        (DEFAULT, 5000, HANDSHAKE_S),
        (Redial(0.01, 0.01, 0.02), 0, 0.25),
        (Redial(0.1, 1.0, 600.0), 0, HANDSHAKE_S),
    ],
)
def test_patience(redial: Redial, tries: int, patience: float) -> None:
    assert redial.patience(tries) == pytest.approx(patience)


@pytest.mark.parametrize(
    ("give_up", "tried_s", "taken"), [(5.0, 0.5, False), (5.0, 0.51, True), (1.0, 0.1, False), (1.0, 0.11, True)]
)
def test_who_has_tried_for_a_while_takes_the_other_way(give_up: float, tried_s: float, taken: bool) -> None:
    assert Redial(0.01, 1.0, give_up).takes_the_other_way(tried_s) is taken


def test_a_fault_of_three_seconds_leaves_time_to_connect_within_give_up() -> None:
    """Black-holed from 0 on: it is noticed after a quarter of give_up, then every attempt fails in the slowest way and
    every pause is the longest. The first attempt with a packet after the fault is in time.
    """
    at = DEFAULT.give_up / 4
    tries = 0
    while True:
        # The kernel sends the first packet of a connection again after 1 s.
        through = next((sent for sent in (at, at + 1.0) if sent >= 3.0 and sent < at + DEFAULT.patience(tries)), None)
        if through is not None:
            break
        at += DEFAULT.patience(tries)
        tries += 1
        at += DEFAULT.pause(tries, urgent=True)[1]
    assert through < DEFAULT.give_up - 1.0
