"""The demo's pure parts: plan, digests, source, the walks on plain arrays with and without damage, the report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramster.cli.demo import digest, preflight, workload
from ramster.cli.demo.live import Screen
from ramster.cli.demo.nodes import end, spawn
from ramster.cli.demo.plan import CHECKED_PHASES, PHASES, Options, Work, make_work
from ramster.cli.demo.report import Outcome, Result
from ramster.cli.demo.run import verdict
from ramster.cli.demo.source import Source, system_files, write_source
from ramster.cli.tables import lines
from ramster.config.units import show_size
from ramster.constants import MIB, PAGE_BYTES
from ramster.errors import RamsterError, RegionFull, RegionLost, UsageError

OPTIONS = Options(size=8 * MIB, local=4 * MIB, resident=MIB)


class Target:
    """A plain array; pages in `lost` are reported lost."""

    def __init__(self, pages: int, lost: frozenset[int] = frozenset()) -> None:
        self.array: npt.NDArray[np.uint8] = np.zeros(pages * PAGE_BYTES, dtype=np.uint8)
        self.lost = lost
        self.asked: list[tuple[int, int]] = []

    def lost_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        self.asked.append((first, count))
        return [(page, 1) for page in sorted(self.lost) if first <= page < first + count]

    def fault_counts(self) -> dict[str, int]:
        return {"faults": len(self.asked)}


def prepare(directory: Path, options: Options = OPTIONS) -> Work:
    work = make_work(options, "plain", directory)
    data = np.random.default_rng(options.seed).integers(0, 256, options.size, dtype=np.uint8)
    data.tofile(work.source)
    digest.save(digest.all_digests(data.data), Path(work.digests))
    return work


def run(work: Work, target: Target) -> Outcome:
    outcome = Outcome(work)
    events: list[dict[str, Any]] = []
    workload.run(work, target, events.append)
    for event in [*events, {"event": "done", "statistics": {}}]:
        outcome.take(json.loads(json.dumps(event)))
    return outcome


def result(region: Outcome, plain: Outcome | None = None) -> Result:
    source = Source("numbers", OPTIONS.size, 1, 0)
    return Result(OPTIONS, source, region, plain or region, None, "ext4", [], 1.0)


@settings(deadline=None)  # other processes may have the machine
@given(
    pages=st.integers(1, 5),
    where=st.integers(min_value=0),
    flip=st.integers(1, 255),
)
def test_any_wrong_byte_changes_exactly_its_pages_digest(pages: int, where: int, flip: int) -> None:
    data = np.random.default_rng(pages).integers(0, 256, pages * PAGE_BYTES, dtype=np.uint8)
    before = digest.all_digests(data.data)
    where %= len(data)
    data[where] ^= flip
    changed = np.flatnonzero(digest.all_digests(data.data) != before)
    assert changed.tolist() == [where // PAGE_BYTES]


def test_digests_need_whole_pages_and_a_whole_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        digest.all_digests(memoryview(bytes(PAGE_BYTES + 1)))
    digest.save(digest.all_digests(memoryview(bytes(2 * PAGE_BYTES))), tmp_path / "two")
    with pytest.raises(ValueError, match="expected 3"):
        digest.load(tmp_path / "two", 3)


def test_the_same_page_has_the_same_digest_wherever_it_lies() -> None:
    data = memoryview(bytes(range(256)) * 16 * 3)
    assert len(set(digest.all_digests(data).tolist())) == 1
    assert digest.page_digests(data, [2, 0]).tolist() == digest.all_digests(data)[[2, 0]].tolist()


@pytest.mark.parametrize("phase", sorted(CHECKED_PHASES))
def test_steps_visit_exactly_what_was_planned(phase: str, tmp_path: Path) -> None:
    work = make_work(OPTIONS, "region", tmp_path)
    visited = np.concatenate(list(work.steps(phase)))
    assert len(visited) == work.planned(phase)
    assert visited.min() >= 0 and visited.max() < work.pages
    again = np.concatenate(list(make_work(OPTIONS, "memmap", tmp_path).steps(phase)))
    assert visited.tolist() == again.tolist()


def test_random_steps_are_distinct_and_follow_the_seed(tmp_path: Path) -> None:
    one = np.concatenate(list(make_work(OPTIONS, "region", tmp_path).steps("random")))
    other = np.concatenate(
        list(
            make_work(Options(OPTIONS.size, OPTIONS.local, OPTIONS.resident, seed=2), "region", tmp_path).steps(
                "random"
            )
        )
    )
    assert len(set(one.tolist())) == len(one)
    assert one.tolist() != other.tolist() and one.tolist() != sorted(one.tolist())


def test_the_cyclic_walk_is_larger_than_the_resident_set(tmp_path: Path) -> None:
    work = make_work(Options(), "region", tmp_path)
    assert work.cyclic_pages * PAGE_BYTES > Options().resident and work.cyclic_passes > 1


def test_orders_travel_as_json(tmp_path: Path) -> None:
    work = make_work(OPTIONS, "region", tmp_path, socket="/run/x")
    assert Work(**json.loads(json.dumps(work.to_dict()))) == work


def test_lenders_hold_the_array_even_if_nothing_compresses() -> None:
    for nodes in (2, 3, 9):
        options = Options(nodes=nodes)
        assert options.lend_bytes() * (nodes - 1) >= options.size * 1.2
        assert options.lend_bytes() % MIB == 0


def test_everything_right(tmp_path: Path) -> None:
    work = prepare(tmp_path)
    target = Target(work.pages)
    outcome = run(work, target)
    assert list(outcome.phases) == list(PHASES)
    assert outcome.incomplete() == []
    assert outcome.total("checked") == sum(work.planned(phase) for phase in CHECKED_PHASES)
    assert outcome.total("wrong") == 0
    assert bool(np.all(np.diff(target.array.view(np.int64)) >= 0))
    verdict(result(outcome))


def test_digests_of_the_sorted_copy_match_a_sort_made_here(tmp_path: Path) -> None:
    work = prepare(tmp_path)
    run(work, Target(work.pages))
    expected = digest.all_digests(np.sort(np.fromfile(work.source, dtype=np.int64)).view(np.uint8).data)
    assert digest.load(Path(work.sorted_digests), work.pages).tolist() == expected.tolist()


class Forgetful(Target):
    """Zeros one page when asked about a span that holds it, after the fill: what a store that forgets would do."""

    page = 700

    def lost_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        if first == 0 and len(self.asked) >= 8:
            self.array[self.page * PAGE_BYTES : (self.page + 1) * PAGE_BYTES] = 0
        return super().lost_runs(first, count)


def test_a_page_of_zeros_is_seen_in_every_walk_over_it(tmp_path: Path) -> None:
    work = prepare(tmp_path)
    run(work, Target(work.pages))
    damaged = Work(**{**work.to_dict(), "kind": "region"})
    outcome = run(damaged, Forgetful(work.pages))
    assert outcome.phases["sequential"]["wrong"] == 1 and outcome.phases["sequential"]["wrong_pages"] == [700]
    assert outcome.phases["random"]["wrong"] == 1
    assert outcome.phases["verify-sorted"]["wrong"] > 0
    with pytest.raises(RamsterError, match="wrong") as caught:
        verdict(result(outcome))
    assert caught.value.exit_code == 1


def test_lost_pages_are_counted_skipped_and_reported(tmp_path: Path) -> None:
    work = prepare(tmp_path)
    run(work, Target(work.pages))
    region = Work(**{**work.to_dict(), "kind": "region"})
    outcome = run(region, Target(work.pages, frozenset({3, 4, 1000})))
    assert outcome.phases["fill"]["lost"] == 3
    assert outcome.phases["sequential"]["lost"] == 3
    assert outcome.phases["sequential"]["checked"] == work.pages - 3
    assert outcome.phases["random"]["checked"] + outcome.phases["random"]["lost"] == work.random_pages
    assert "verify-sorted" not in outcome.phases
    assert outcome.total("wrong") == 0 and outcome.pages_lost() == 3
    with pytest.raises(RegionLost, match="3 pages are lost"):
        verdict(result(outcome))


def test_a_phase_that_checks_too_little_is_not_complete(tmp_path: Path) -> None:
    work = prepare(tmp_path)
    outcome = run(work, Target(work.pages))
    outcome.phases["random"]["checked"] -= 1
    assert outcome.incomplete() == ["random"]
    with pytest.raises(RamsterError, match="random"):
        verdict(result(outcome))
    del outcome.phases["cyclic"]
    assert outcome.incomplete() == ["random", "cyclic"]


def test_a_worker_that_died_of_sigbus_is_reported_as_lost(tmp_path: Path) -> None:
    outcome = Outcome(make_work(OPTIONS, "region", tmp_path), signal=signal.SIGBUS, remote_seen=500)
    outcome.take({"event": "progress", "phase": "sequential", "done": 256, "checked": 256, "wrong": 0, "lost": 0})
    report = result(outcome).to_json()
    assert report["worker_signal"] == "SIGBUS"
    assert report["pages_checked"] == 256 and report["pages_wrong"] == 0 and report["pages_lost"] == 500
    assert report["wall_s"] is None and report["incomplete_phases"] == list(PHASES)
    with pytest.raises(RegionLost, match="SIGBUS") as caught:
        verdict(result(outcome))
    assert caught.value.exit_code == 6


def test_a_worker_that_died_because_the_region_was_full_lost_nothing(tmp_path: Path) -> None:
    words = "region full: no room here and no lender has any; SIGBUS"
    outcome = Outcome(make_work(OPTIONS, "region", tmp_path), signal=signal.SIGBUS, words=words)
    assert result(outcome).to_json()["pages_lost"] == 0
    assert Outcome(outcome.work, signal=signal.SIGBUS, full_seen=True).full()
    assert not Outcome(outcome.work, signal=signal.SIGBUS, full_seen=True, remote_seen=5).full()
    with pytest.raises(RegionFull, match="room"):
        verdict(result(outcome))


def test_the_report_has_its_promised_keys(tmp_path: Path) -> None:
    work = prepare(tmp_path)
    report = result(run(work, Target(work.pages))).to_json()
    promised = """pages_total pages_wrong puts local_gets remote_gets remote_segments bytes_sent bytes_compressed wall_s
        plain_wall_s memmap_wall_s fault_local_p50_us fault_local_p99_us fault_remote_p50_us fault_remote_p99_us
        compression_ratio pages_resident pages_local pages_remote phases worker_signal pages_lost"""
    assert set(promised.split()) - set(report) == set()
    assert all({"name", "wall_s", "pages", "faults"} <= set(phase) for phase in report["phases"])
    json.dumps(report)


@pytest.mark.parametrize("width", [40, None])
def test_the_report_is_whole_at_any_width(tmp_path: Path, width: int | None) -> None:
    work = prepare(tmp_path)
    done = result(run(work, Target(work.pages)))
    source = dataclasses.replace(done.source, description="/srv/[data]/a file of a long name/" + "x" * 200)
    parts = list(dataclasses.replace(done, source=source).tables())
    printed = ["".join(text for text, _ in line) for part in parts for line in lines(part, width)]
    for text in (source.description, "without a memory limit, so mostly the kernel's page cache.", "wrong, 0 lost"):
        assert any(text in line for line in printed), text


def test_paths_of_a_demo_that_is_kept_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "/tmp/it's [mine]/" + "x" * 200
    with Screen() as screen:
        screen.event({"event": "directory", "kept": True, "path": folder})
        screen.event({"event": "kept", "configs": [f"{folder}/alpha.toml"]})
    printed = capsys.readouterr().err.splitlines()
    assert f"files stay in {shlex.quote(folder)}" in printed
    assert f"still runs: ramster status --config {shlex.quote(folder + '/alpha.toml')}" in printed


def test_system_files_come_in_an_order_that_the_seed_decides(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"d{number % 3}").mkdir(exist_ok=True)
        (tmp_path / f"d{number % 3}" / f"f{number}").write_bytes(bytes([number]))
    (tmp_path / "link").symlink_to(tmp_path / "d0")
    one, again, other = (system_files((tmp_path, tmp_path / "none"), seed) for seed in (1, 1, 2))
    assert len(one) == 30 and one == again and one != other and sorted(one) == sorted(other)


def test_source_repeats_short_input_and_cuts_long_input(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"abc")
    source = write_source(tmp_path / "a", 8, file=short, seed=1)
    assert (tmp_path / "a").read_bytes() == b"abcabcab" and source.repeats == 2 and source.bytes == 8
    source = write_source(tmp_path / "b", 2, file=short, seed=1)
    assert (tmp_path / "b").read_bytes() == b"ab" and source.repeats == 0


def test_source_without_bytes_is_refused(tmp_path: Path) -> None:
    roots = (tmp_path / "roots",)
    roots[0].mkdir()
    (roots[0] / "empty").touch()
    with pytest.raises(UsageError, match="--file"):
        write_source(tmp_path / "out", 8, file=None, seed=1, roots=roots)


def test_preflight_says_what_to_do(tmp_path: Path) -> None:
    preflight.check_memory(Options(), 1 << 40)
    with pytest.raises(UsageError, match="make --size smaller"):
        preflight.check_memory(Options(), 1 << 29)
    with pytest.raises(UsageError, match="TMPDIR"):
        preflight.check_disk(Options(size=1 << 60), tmp_path)
    assert preflight.available_memory() > 0
    assert preflight.file_system(Path("/proc")) == "proc"


def test_children_are_ended_even_if_they_ignore_sigterm() -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    processes = [spawn([sys.executable, "-c", stubborn], outlive=False, stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    end(processes)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    ("size", "text"),
    [(17, "17 B"), (4096, "4 KiB"), (3 << 19, "1.5 MiB"), (512 * MIB, "512 MiB"), (5 << 29, "2.5 GiB")],
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert show_size(size) == text
