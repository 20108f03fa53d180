"""`ramster demo` as a user runs it: real nodes, TLS and faults; small, and with a lender killed in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ramster.cli.demo.plan import PHASES

SMALL = ("--size", "32MiB", "--resident", "4MiB", "--local", "4MiB")
DEADLINE_S = 120.0
Event = dict[str, Any]


class Demo:
    """A running demo with its events; killed and waited for at the end, whatever happens."""

    def __init__(self, scratch: Path, *arguments: str) -> None:
        self.scratch = scratch
        self.events: list[Event] = []
        self.noise: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ramster.cli", "demo", "--json", "--events", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        # Nothing may block the test for good, not even a demo that hangs.
        self._alarm = threading.Timer(DEADLINE_S, self.process.kill)
        self._alarm.start()

    def watch(self, react: Callable[[Event], None] = lambda event: None) -> tuple[int, Event | None, str]:
        """Reads events until the demo ends. Returns its exit code, its JSON object and what else it said on stderr."""
        assert self.process.stderr is not None and self.process.stdout is not None
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.append(self.process.stdout.read()))  # type: ignore[union-attr]
        reader.start()
        for line in self.process.stderr:
            if line.startswith("{"):
                self.events.append(json.loads(line))
                react(self.events[-1])
            else:
                self.noise.append(line)
        reader.join(DEADLINE_S)
        code = self.process.wait(DEADLINE_S)
        return code, json.loads(output[0]) if output[0].strip() else None, "".join(self.noise)

    def pids(self) -> list[int]:
        return [event["pid"] for event in self.events if event["event"] in ("node", "region")]

    def close(self) -> None:
        self._alarm.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def make(*arguments: str) -> Demo:
        demos.append(Demo(tmp_path_factory.mktemp("d"), *arguments))
        return demos[-1]

    yield make
    for demo in demos:
        demo.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A zombie that nobody has collected yet runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def assert_clean(demo: Demo) -> None:
    assert demo.pids() and all(gone(pid) for pid in demo.pids())
    assert list(demo.scratch.iterdir()) == []


def test_everything_comes_back_right(start: Callable[..., Demo]) -> None:
    demo = start(*SMALL)
    code, report, said = demo.watch()
    assert code == 0, said
    assert report is not None
    assert report["pages_total"] == 8192 and report["pages_wrong"] == 0 and report["pages_lost"] == 0
    assert report["incomplete_phases"] == [] and report["worker_signal"] is None and report["dead_nodes"] == []
    assert [phase["name"] for phase in report["phases"]] == list(PHASES)
    assert report["pages_checked"] == 8192 + 8192 + 3 * 2048 + 8192
    # The array did not fit: it was stored, moved to the lender over the link, and came back through faults.
    assert report["pages_resident"] <= 1024
    assert report["puts"] > 0 and report["segments_shipped"] > 0 and report["bytes_sent"] > 4 << 20
    assert report["remote_gets"] > 0 and report["faults_remote"] > 0 and report["pages_remote"] > 0
    assert report["fault_remote_p99_us"] >= report["fault_remote_p50_us"] > 0
    assert report["compression_ratio"] > 1
    assert min(report[key] for key in ("wall_s", "plain_wall_s", "memmap_wall_s")) > 0
    assert_clean(demo)


def test_a_users_file_and_three_nodes(start: Callable[..., Demo], tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(os.urandom(3 << 20))  # nothing compresses: the lenders must hold it all
    code, report, said = start(*SMALL, "--nodes", "3", "--file", str(path), "--seed", "7").watch()
    assert code == 0, said
    assert report is not None
    assert report["pages_wrong"] == 0 and report["source"] == str(path) and report["source_repeats"] == 10


def test_a_killed_lender_loses_pages_and_never_falsifies_one(start: Callable[..., Demo]) -> None:
    demo = start(*SMALL)
    lender: list[int] = []

    def react(event: Event) -> None:
        if event["event"] == "node" and event["role"] == "lender":
            lender.append(event["pid"])
        elif event["event"] == "phase" and event["kind"] == "region" and event["phase"] == "fill":
            os.kill(lender[0], signal.SIGKILL)

    code, report, said = demo.watch(react)
    assert code == 6, said
    assert report is not None
    assert report["pages_wrong"] == 0 and report["pages_lost"] > 0
    assert report["dead_nodes"] == ["node-2"]
    assert report["worker_signal"] in (None, "SIGBUS")
    assert "lost" in said and "node-2" in said and "Traceback" not in said
    assert_clean(demo)


def test_ctrl_c_leaves_nothing_behind(start: Callable[..., Demo]) -> None:
    demo = start(*SMALL)

    def react(event: Event) -> None:
        if event["event"] == "region":
            demo.process.send_signal(signal.SIGINT)

    code, report, said = demo.watch(react)
    assert code == 130 and report is None
    assert said == "ramster: interrupted\n"
    assert_clean(demo)


def test_a_killed_demo_takes_its_processes_with_it(start: Callable[..., Demo]) -> None:
    demo = start(*SMALL)
    watched: list[int] = []

    def react(event: Event) -> None:
        if event["event"] == "region":
            # A pidfd becomes readable when its process has ended: no polling.
            watched.extend(os.pidfd_open(pid) for pid in demo.pids())
            demo.process.kill()

    code, _, _ = demo.watch(react)
    assert code == -signal.SIGKILL and len(watched) == 3
    for descriptor in watched:
        assert select.select([descriptor], [], [], 30.0)[0]
        os.close(descriptor)


def test_keep_leaves_running_nodes_that_stop_on_request(start: Callable[..., Demo]) -> None:
    demo = start(*SMALL, "--keep")
    code, _, said = demo.watch()
    nodes = [event for event in demo.events if event["event"] == "node"]
    try:
        assert code == 0, said
        assert [event["event"] for event in demo.events].count("kept") == 1
        for node in nodes:
            for command in ("status", "stop"):
                ended = subprocess.run(
                    [sys.executable, "-m", "ramster.cli", command, "--config", node["config"]],
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE_S,
                )
                assert ended.returncode == 0, ended.stderr
                assert node["name"] in ended.stdout
            assert gone(node["pid"])
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(node["pid"], signal.SIGKILL)
