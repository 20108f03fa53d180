"""The real thing: an unmodified Debian kernel swaps on an export, most of which lies on a second node.

The guest has less RAM than its workload, node `near` has an arena for a part of the rest, and node `far` lends what is
missing over TLS. Every byte is verified by the workload, in the guest.
"""

from __future__ import annotations

import re
from typing import Final

import pytest
from tests.guest.machine import HUNG_S
from tests.guest.scenarios import EXPORT, WORK_MIB, Run

PAGE: Final = 4096
SECTOR: Final = 512
# QEMU itself looks at the first sector of a disk, which holds a PC's geometry.
QEMU_READS_MAX: Final = 8 * SECTOR
# Columns of a block device's counters.
READ_SECTORS: Final = 2
WRITTEN_SECTORS: Final = 6
DISCARDS: Final = 11
FAILURES: Final = ("errors", "refused", "pages_lost", "pages_gone")


@pytest.fixture(
    params=[
        pytest.param("swapped", id="QEMU's client"),
        pytest.param("attached", id="the kernel's client"),
        pytest.param("encrypted", id="the kernel's client with TLS 1.2", marks=pytest.mark.long),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Run)
    return found


def work_of(run: Run) -> dict[str, int]:
    return next(step for step in run.guest.steps if "workload" in step.words).numbers()


def test_every_page_is_right(run: Run) -> None:
    said = work_of(run)
    assert said["pages"] == WORK_MIB << 8
    assert said["right"] == said["verified"] > said["pages"]
    assert said["empty"] == said["stale"] == said["foreign"] == said["altered"] == 0


def test_every_step_succeeds_with_swapoff_and_detaching(run: Run) -> None:
    assert run.failed == [], run.guest.story()
    assert len(run.step("show /proc/swaps").text) == 1  # the heading


def test_the_guest_has_nothing_to_complain_about(run: Run) -> None:
    assert run.guest.complaints() == []
    assert run.swapped["oom_kill"] == 0


def test_the_guest_would_have_panicked_over_a_task_that_hangs(swapped: Run) -> None:
    assert swapped.step("show /proc/sys/kernel/hung_task_panic").text == ["1"]
    assert swapped.step("show /proc/sys/kernel/hung_task_timeout_secs").text == [str(HUNG_S)]


def test_more_was_swapped_than_fits(run: Run) -> None:
    assert run.swapped["pswpout"] > (WORK_MIB - 100) << 8
    assert run.swapped["pswpin"] > (WORK_MIB - 100) << 8  # the last pass over all pages brings them in


def test_what_the_guest_says_it_wrote_is_what_the_export_counted(run: Run) -> None:
    """To the byte. Its block layer has counted mkswap's page as well."""
    swapon, end = run.device(WRITTEN_SECTORS)
    assert run.export["bytes_written"] == end * SECTOR
    assert run.swapped["pswpout"] * PAGE == (end - swapon) * SECTOR


def test_what_the_guest_says_it_read_is_what_the_export_counted(run: Run) -> None:
    """To the byte, read-ahead included, but for QEMU's own. Before swapon its block layer looked for partitions."""
    swapon, end = run.device(READ_SECTORS)
    assert 0 <= run.export["bytes_read"] - end * SECTOR <= QEMU_READS_MAX
    assert run.swapped["pswpin"] * PAGE == (end - swapon) * SECTOR


def test_discards_arrive_and_free(run: Run) -> None:
    """A kernel discards whole clusters of 2 MiB, and none while it takes the device down: a few are left."""
    swapon, end = run.device(DISCARDS)
    assert run.export["trims"] == end > swapon > 0
    assert run.export["pages_freed"] > run.peak["pages_stored"] / 2
    assert run.export["pages_stored"] < run.peak["pages_stored"] / 2
    assert run.near["arena"]["pages_stored"] == run.export["pages_stored"]


def test_most_pages_were_on_the_other_node(run: Run) -> None:
    assert run.peak["pages_away"] > run.peak["pages_stored"] / 2 > (WORK_MIB - 100) << 7
    assert run.near["counters"]["segments_shipped"] > 100
    assert run.export["pages_remote"] > 1000
    assert run.far["counters"]["gets_served"] > 0


def test_nothing_was_lost_or_failed(run: Run) -> None:
    assert {key: run.export[key] for key in FAILURES} == dict.fromkeys(FAILURES, 0)
    assert run.near["arena"]["corrupt_pages"] == run.near["counters"]["corrupt_replies"] == 0
    # Before it, `near` may have been up first and found nobody at the other node's address.
    said = run.log.partition(f"export {EXPORT}: made")[2].splitlines()
    troubles = [line for line in said if re.search("WARNING|ERROR", line)]
    assert [line for line in troubles if "guard:" not in line] == []  # that tells what this host refuses


@pytest.mark.long
def test_a_client_that_knows_tls_1_2_alone_is_who_its_certificate_says(encrypted: Run) -> None:
    assert len(re.findall(rf"export {EXPORT}: guest \(.*\) connected", encrypted.log)) == 2  # nbd-client -connections 2


def test_the_workload_notices_one_bit(flipped: Run) -> None:
    """Were it blind, all of the above would say nothing."""
    assert flipped.flipped > 500
    work = flipped.step("run /workload")
    said = work.numbers()
    assert work.code == 1
    assert said["altered"] > 0
    assert said["right"] + said["empty"] + said["stale"] + said["foreign"] + said["altered"] == said["verified"]
