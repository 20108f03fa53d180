"""What the node remembers of pins, so that they can be taken back together: right, and bounded."""

import pytest

from ramster.frontswap.messages import SPAN_MAX
from ramster.frontswap.pin_groups import RUNS_MAX, RUNS_OF_A_GROUP_MAX, PinGroups


@pytest.mark.parametrize(
    ("pins", "taken", "runs"),
    [
        ([], [], 0),
        ([(0, 4)], [(0, 4)], 1),
        ([(0, 4), (4, 4)], [(0, 8)], 1),
        ([(4, 4), (0, 4)], [(4, 4), (0, 4)], 2),
        ([(0, 4), (0, 4)], [(0, 4), (0, 4)], 2),
        ([(0, 4), (2, 4)], [(0, 4), (2, 4)], 2),
        ([(0, SPAN_MAX), (SPAN_MAX, SPAN_MAX), (2 * SPAN_MAX, 1)],
         [(0, SPAN_MAX), (SPAN_MAX, SPAN_MAX), (2 * SPAN_MAX, 1)], 1),
    ],
)  # fmt: skip
def test_what_a_group_takes_back(pins: list[tuple[int, int]], taken: list[tuple[int, int]], runs: int) -> None:
    groups = PinGroups()
    for first, count in pins:
        assert not groups.refusal(7, first)
        groups.add(7, first, count)
    groups.add(8, 0, 1)
    assert len(groups) == runs + 1
    assert list(groups.take(7)) == taken and list(groups.take(7)) == []
    assert len(groups) == 1 and list(groups.take(8)) == [(0, 1)] and len(groups) == 0


def test_one_group_does_not_grow_without_end() -> None:
    groups = PinGroups()
    for number in range(RUNS_OF_A_GROUP_MAX):
        assert not groups.refusal(1, 0)
        groups.add(1, 0, number + 1)
    assert f"has {RUNS_OF_A_GROUP_MAX} separate ranges" in groups.refusal(1, 0)
    assert not groups.refusal(1, RUNS_OF_A_GROUP_MAX)  # adjoins
    assert not groups.refusal(2, 0)


def test_many_groups_do_not_grow_without_end_and_the_oldest_go_first() -> None:
    groups = PinGroups()
    for group in range(1, 3 * RUNS_MAX):
        groups.add(1, 2 * (group % RUNS_OF_A_GROUP_MAX), 1)
        list(groups.take(1))
        groups.add(group + 1, 0, 1)
        groups.add(group + 1, 5, 1)
        assert len(groups) <= RUNS_MAX
    assert list(groups.take(2)) == []
    assert list(groups.take(3 * RUNS_MAX)) == [(0, 1), (5, 1)]
