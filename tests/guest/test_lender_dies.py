"""A lender is killed while a guest swaps on it.

With a spill file as the second copy no page is missing or wrong. Without one the program that needs a lost page is
ended by the guest's kernel; it never sees a wrong byte, and the machine goes on.
"""

from __future__ import annotations

import re
import signal

import pytest
from tests.guest.scenarios import EXPORT, WORK_MIB, Run

pytestmark = pytest.mark.long


def test_the_lender_died_with_most_pages_in_the_middle_of_it(lender_dies: Run) -> None:
    then = lender_dies.at_death
    assert then is not None
    assert then["pages_away"] > then["pages_stored"] / 2
    # Both ways it went on: more than a third of everything came after.
    assert lender_dies.export["bytes_written"] > 1.5 * then["bytes_written"]
    assert lender_dies.export["bytes_read"] > 1.5 * then["bytes_read"]
    assert all(peer["state"] != "up" for peer in lender_dies.near["peers"])


def test_every_page_is_right_all_the_same(lender_dies: Run) -> None:
    said = lender_dies.step("run /workload").numbers()
    assert said["pages"] == WORK_MIB << 8
    assert said["right"] == said["verified"]
    assert lender_dies.export["pages_lost"] == lender_dies.export["pages_gone"] == lender_dies.export["errors"] == 0


def test_the_guest_noticed_nothing(lender_dies: Run) -> None:
    assert lender_dies.failed == [], lender_dies.guest.story()
    assert lender_dies.guest.complaints() == []


def test_without_a_second_copy_the_workload_is_told_and_sees_nothing_wrong(lender_dies_alone: Run) -> None:
    work = lender_dies_alone.step("run /workload")
    assert lender_dies_alone.at_death is not None
    assert work.code == 128 + signal.SIGBUS
    assert work.text == []
    assert lender_dies_alone.export["pages_lost"] > 0
    assert lender_dies_alone.export["errors"] > 0


def test_without_a_second_copy_the_machine_goes_on_and_swap_can_be_taken_off(lender_dies_alone: Run) -> None:
    assert [words for words, _ in lender_dies_alone.failed] == [lender_dies_alone.step("run /workload").words]
    assert lender_dies_alone.step("swapoff").code == 0
    complaints = lender_dies_alone.guest.complaints()
    assert complaints
    assert all("error" in line for line in complaints), complaints


def test_without_a_second_copy_the_log_names_pages(lender_dies_alone: Run) -> None:
    assert re.search(rf"ERROR .*export {EXPORT}: page \d+ .*EIO", lender_dies_alone.log)
