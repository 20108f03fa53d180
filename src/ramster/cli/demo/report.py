"""What the demo found out: one flat object for --json, and the same as tables for people. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ramster.cli.demo.plan import CHECKED_PHASES, PHASES, Options, Work
from ramster.cli.demo.source import Source
from ramster.cli.demo.workload import complete
from ramster.cli.tables import Part, Table
from ramster.config.units import counted, show_size
from ramster.constants import PAGE_BYTES

FAULT_KEYS = ("fault_local_p50_us", "fault_local_p99_us", "fault_remote_p50_us", "fault_remote_p99_us")


@dataclass(slots=True)
class Outcome:
    """One worker's run, built from its events."""

    work: Work
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    lost_seen: int = 0  # the most lost pages that the node reported while the region lived
    remote_seen: int = 0  # remote pages in the last answer of the node before the worker ended
    signal: int | None = None
    full_seen: bool = False  # the region reported that it was full in the node's last answer
    words: str = ""  # the last line that the worker wrote on stderr: after a SIGBUS, the guardian's reason
    finished: bool = False

    def take(self, event: Mapping[str, Any]) -> None:
        """Notes an event of the worker."""
        kind = event["event"]
        if kind == "phase":
            self.phases[event["phase"]] = dict(event)
            self.progress = {}
        elif kind in ("progress", "phase-start"):
            self.progress = dict(event)
        elif kind == "done":
            self.statistics = dict(event["statistics"])
            self.finished = True

    def wall_s(self) -> float | None:
        """Seconds of all phases together, None unless all ran."""
        if not self.finished:
            return None
        return round(sum(float(phase["wall_s"]) for phase in self.phases.values()), 3)

    def total(self, key: str) -> int:
        """Sum of `checked` or `wrong` over the phases, a broken-off one included."""
        return sum(int(phase.get(key, 0)) for phase in (*self.phases.values(), self.progress))

    def incomplete(self) -> list[str]:
        """Phases that did not account for each planned page, or did not run."""
        return [name for name in PHASES if name not in self.phases or not complete(self.work, name, self.phases[name])]

    def pages_lost(self) -> int:
        """Distinct pages lost, as far as anybody could count before the region went with its worker.

        The node's own count where there is one; else, after a SIGBUS, the pages that were away when it last said so.
        """
        phases = max((int(phase.get("distinct_lost", phase["lost"])) for phase in self.phases.values()), default=0)
        counted = max(self.lost_seen, phases, int(self.statistics.get("lost_pages", 0)))
        if not counted and self.signal == signal.SIGBUS:
            return max(self.remote_seen, 0 if self.full() else 1)
        return counted

    def full(self) -> bool:
        """True if the worker was ended because nobody had room for a page, not by a lost one."""
        if self.signal != signal.SIGBUS:
            return False
        # The guardian's line may come too late to be written; then nothing away and a full region say the same.
        return "region full" in self.words or (self.full_seen and not self.remote_seen and not self.lost_seen)


@dataclass(slots=True)
class Result:
    """Everything that the report is made of."""

    options: Options
    source: Source
    region: Outcome
    plain: Outcome
    memmap: Outcome | None
    memmap_on: str  # file system of the memmap file
    dead_nodes: list[str]
    total_s: float

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints. A figure that could not be had is null, never 0."""
        arena = self.region.status.get("arena") or {}
        counters = self.region.status.get("counters") or {}
        statistics = self.region.statistics
        compressed, came_in = arena.get("bytes_compressed"), arena.get("bytes_in")
        return {
            "pages_total": self.options.pages,
            "pages_checked": self.region.total("checked"),
            "pages_wrong": self.region.total("wrong"),
            "pages_lost": self.region.pages_lost(),
            "incomplete_phases": self.region.incomplete(),
            "worker_signal": None if self.region.signal is None else signal.Signals(self.region.signal).name,
            "worker_words": self.region.words or None,
            "dead_nodes": self.dead_nodes,
            "pages_resident": statistics.get("resident_pages"),
            "pages_local": statistics.get("local_pages"),
            "pages_remote": statistics.get("remote_pages"),
            "puts": counters.get("puts"),
            "local_gets": counters.get("local_gets"),
            "remote_gets": counters.get("remote_gets"),
            "remote_segments": arena.get("segments_remote"),
            "segments_shipped": counters.get("segments_shipped"),
            "bytes_sent": counters.get("bytes_sent"),
            "bytes_compressed": counters.get("bytes_compressed", compressed),
            "compression_ratio": round(came_in / compressed, 3) if came_in and compressed else None,
            "faults": statistics.get("faults"),
            "faults_local": statistics.get("faults_local"),
            "faults_remote": statistics.get("faults_remote"),
            **{key: statistics.get(key) for key in FAULT_KEYS},
            "wall_s": self.region.wall_s(),
            "plain_wall_s": self.plain.wall_s(),
            "memmap_wall_s": self.memmap.wall_s() if self.memmap else None,
            "memmap_file_system": self.memmap_on,
            "total_s": round(self.total_s, 3),
            "phases": [self._phase(name) for name in self.region.phases],
            "size_bytes": self.options.size,
            "resident_bytes": self.options.resident,
            "local_bytes": self.options.local,
            "nodes": self.options.nodes,
            "seed": self.options.seed,
            "source": self.source.description,
            "source_files": self.source.files,
            "source_repeats": self.source.repeats,
        }

    def _phase(self, name: str) -> dict[str, Any]:
        phase = self.region.phases[name]
        return {
            "name": name,
            "wall_s": round(phase["wall_s"], 3),
            "plain_wall_s": _wall(self.plain, name),
            "memmap_wall_s": _wall(self.memmap, name),
            "pages": phase["planned"],
            "pages_checked": phase["checked"] if name in CHECKED_PHASES else None,
            "pages_wrong": phase["wrong"] if name in CHECKED_PHASES else None,
            "pages_lost": phase["lost"],
            "faults": phase.get("faults"),
            "faults_local": phase.get("faults_local"),
            "faults_remote": phase.get("faults_remote"),
        }

    def tables(self) -> Iterator[Part]:
        """The report for people, in reading order."""
        data = self.to_json()
        yield self._phase_table(data)
        yield (
            "in RAM: the same work on a plain numpy array. "
            f"memmap: numpy.memmap on {self.memmap_on} without a memory limit, so mostly the kernel's page cache."
        )
        yield ""
        yield self._memory_table(data)
        yield self._verdict(data)

    def _phase_table(self, data: Mapping[str, Any]) -> Table:
        title = (
            f"{show_size(self.options.size)} of {self.source.description}, "
            f"{show_size(self.options.resident)} resident, "
            f"{show_size(self.options.local)} local arena, {self.options.nodes} nodes"
        )
        table = Table(title, ("phase", "pages", "wrong", "faults", "remote", "RAMster", "in RAM", "memmap"))
        for phase in data["phases"]:
            table.add(
                phase["name"],
                _count(phase["pages"]),
                _count(phase["pages_wrong"]),
                _count(phase["faults"]),
                _count(phase["faults_remote"]),
                *(_seconds(phase[key]) for key in ("wall_s", "plain_wall_s", "memmap_wall_s")),
            )
        everything = (
            "all",
            "",
            _count(data["pages_wrong"]),
            _count(data["faults"]),
            _count(data["faults_remote"]),
            *(_seconds(data[key]) for key in ("wall_s", "plain_wall_s", "memmap_wall_s")),
        )
        table.add(*((text, "bold") for text in everything))
        return table

    def _memory_table(self, data: Mapping[str, Any]) -> Table:
        table = Table("", ("", ""), heads=False)
        for label, key in (
            ("pages resident", "pages_resident"),
            ("pages local", "pages_local"),
            ("pages remote", "pages_remote"),
        ):
            pages = data[key]
            table.add(label, "-" if pages is None else f"{pages:,}  ({show_size(pages * PAGE_BYTES)})")
        for label, place in (("local faults, p50 / p99", "local"), ("remote faults, p50 / p99", "remote")):
            p50, p99 = data[f"fault_{place}_p50_us"], data[f"fault_{place}_p99_us"]
            table.add(label, "-" if p50 is None else f"{p50} us / {p99} us")
        ratio = data["compression_ratio"]
        table.add("compression", "-" if ratio is None else f"{ratio:.2f} : 1")
        sent, segments = data["bytes_sent"], counted(data["segments_shipped"] or 0, "segment", ",")
        table.add(
            "bytes sent",
            "-" if sent is None else f"{show_size(sent)} in {segments}",
        )
        table.add(
            "puts, local gets, remote gets",
            ", ".join(_count(data[key]) for key in ("puts", "local_gets", "remote_gets")),
        )
        return table

    def _verdict(self, data: Mapping[str, Any]) -> Part:
        compared = counted(data["pages_checked"], "page", ",")
        text = f"{compared} compared, {data['pages_wrong']:,} wrong, {data['pages_lost']:,} lost"
        good = not data["pages_wrong"] and not data["pages_lost"] and not data["incomplete_phases"]
        return text, "bold green" if good else "bold red"


def _wall(outcome: Outcome | None, name: str) -> float | None:
    if outcome is None or name not in outcome.phases:
        return None
    return round(float(outcome.phases[name]["wall_s"]), 3)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
