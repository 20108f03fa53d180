"""Who watches the demo: live bars on a terminal, JSON lines, or nobody. All on stderr; stdout is the report's."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ramster.config.units import counted, show_size
from ramster.constants import PAGE_BYTES

_TITLES = {"source": "", "plain": "numpy in RAM", "region": "RAMster", "memmap": "numpy.memmap"}


class Lines:
    """One JSON object per event on stderr."""

    def event(self, event: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(event, separators=(",", ":")) + "\n")
        sys.stderr.flush()

    def status(self, statistics: dict[str, Any]) -> None:
        self.event({"event": "status", **statistics})


class Quiet:
    """Nobody."""

    def event(self, event: dict[str, Any]) -> None:
        pass

    def status(self, statistics: dict[str, Any]) -> None:
        pass


class Screen:
    """Progress bars and the region's figures. A context manager: the terminal is restored at its end."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._figures = Text("")
        self._task: TaskID | None = None
        self._live = Live(Group(self._progress, self._figures), console=self._console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._figures.plain = ""
        self._live.stop()

    def event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "phase-start":
            self._finish()
            title = " ".join(filter(None, (_TITLES[event["kind"]], event["phase"])))
            # The sort has no steps that anybody outside could count: a moving bar.
            total = None if event["phase"] == "sort" else event["pages"]
            self._task = self._progress.add_task(f"{title:32}", total=total)
        elif kind == "progress" and self._task is not None:
            self._progress.update(self._task, completed=event["done"])
        elif kind in ("phase", "source", "worker-end"):
            self._finish()
        elif kind == "node":
            self._say(f"{event['name']} ({event['role']}) runs as process {event['pid']}")
        if kind == "source" and event["repeats"]:
            self._say(f"the input was too short and is repeated {counted(event['repeats'], 'time')}")
        if kind == "directory" and event["kept"]:
            self._say(f"files stay in {shlex.quote(event['path'])}")
        if kind == "kept":
            for config in event["configs"]:
                self._say(f"still runs: ramster status --config {shlex.quote(config)}")
            self._say("end them with: ramster stop --force --config FILE, the lenders last")

    def status(self, statistics: dict[str, Any]) -> None:
        pages = {place: int(statistics.get(f"{place}_pages", 0)) for place in ("resident", "local", "remote")}
        sizes = "  ".join(f"{place} {show_size(count * PAGE_BYTES)}" for place, count in pages.items())
        local, remote = (int(statistics.get(key, 0)) for key in ("faults_local", "faults_remote"))
        self._figures.plain = f"{sizes}  faults {local:,} local, {remote:,} remote"

    def _say(self, text: str) -> None:
        # Its paths are copied: rich neither breaks the line, nor cuts it, nor takes brackets for its own.
        self._console.print(Text(text), soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
            self._progress.stop_task(self._task)
            self._task = None
