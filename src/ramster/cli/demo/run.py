"""The demo from start to end: source, digests, the plain run, the cluster, the region run, the memmap run."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from ramster.cli.demo import digest, preflight
from ramster.cli.demo.nodes import PYTHON, DemoNode, cluster, end, spawn
from ramster.cli.demo.plan import Options, Work, make_work
from ramster.cli.demo.report import Outcome, Result
from ramster.cli.demo.source import Source, user_file, write_source
from ramster.config.units import counted
from ramster.errors import NodeUnreachable, RamsterError, RegionFull, RegionLost, from_code
from ramster.signals import unbroken

STATUS_PERIOD_S = 0.25
# A worker that neither speaks nor uses its CPU for so long is stuck. A fault waits for a lost lender for `give_up`, and
# for a lost node for `node_wait`, seconds both; the sort does not speak, but works.
STUCK_S = 30.0


class Audience(Protocol):
    """Who watches: live progress for people, JSON lines, or nobody."""

    def event(self, event: dict[str, Any]) -> None:
        """Something happened: `event` names it, the other keys describe it."""

    def status(self, statistics: dict[str, Any]) -> None:
        """The region's figures, a few times a second while it is worked on."""


def run(options: Options, audience: Audience) -> Result:
    """Runs the demo. Everything that it started or wrote is gone afterwards, unless options.keep.

    Raises RamsterError for what stops it before the region is at work; what happens later is in the result.
    """
    started = time.monotonic()
    if options.file is not None:
        options = replace(options, file=user_file(options.file.absolute()))
    with _terminable(), _directory(options, audience) as directory:
        preflight.check(options, directory)
        source = _prepare(options, directory, audience)
        plain = _work(make_work(options, "plain", directory), directory, audience, None)
        _require(plain)
        with cluster(options, directory, lambda node: audience.event(_started(node))) as nodes:
            work = make_work(options, "region", directory, socket=str(nodes[0].region_socket))
            region = _work(work, directory, audience, nodes)
            dead = [node.name for node in nodes if not node.alive()]
            if options.keep:
                audience.event({"event": "kept", "configs": [str(node.config) for node in nodes if node.alive()]})
        memmap = None
        if region.finished:
            memmap = _work(make_work(options, "memmap", directory), directory, audience, None)
            _require(memmap)
        kind = preflight.file_system(directory)
        return Result(options, source, region, plain, memmap, kind, dead, time.monotonic() - started)


def verdict(result: Result) -> None:
    """Raises unless every planned page was compared and equal: the demo's exit code is that error's."""
    wrong, lost = result.region.total("wrong"), result.region.pages_lost()
    if wrong:
        raise RamsterError(
            f"{counted(wrong, 'page')} came back wrong; this is a bug, please report it with the output of --json"
        )
    cause = f" after {', '.join(result.dead_nodes)} died" if result.dead_nodes else ""
    gone = f"{counted(lost, 'page')} {'is' if lost == 1 else 'are'}"
    seen = counted(result.region.total("checked"), "page")
    if result.region.full():
        raise RegionFull(
            f"the worker ended by SIGBUS{cause}: neither the arena nor a lender had room for a page; "
            f"{gone} lost, {seen} had been compared and none was wrong"
        )
    if result.region.signal == signal.SIGBUS:
        raise RegionLost(
            f"the worker touched a lost page and ended by SIGBUS{cause}: about {gone} lost, "
            f"{seen} had been compared and none was wrong"
        )
    if lost:
        raise RegionLost(f"{gone} lost{cause}; {seen} had been compared and none was wrong")
    if incomplete := result.region.incomplete():
        raise RamsterError(
            f"not every planned page was compared in: {', '.join(incomplete)}; this is a bug, please report it"
        )


def _prepare(options: Options, directory: Path, audience: Audience) -> Source:
    work = make_work(options, "plain", directory)
    audience.event({"event": "phase-start", "kind": "source", "phase": "read files", "pages": options.size})
    source = write_source(
        Path(work.source),
        options.size,
        file=options.file,
        seed=options.seed,
        progress=lambda done: audience.event(
            {"event": "progress", "kind": "source", "phase": "read files", "done": done}
        ),
    )
    digest.save(digest.all_digests(np.memmap(work.source, dtype=np.uint8, mode="r").data), Path(work.digests))
    audience.event(
        {"event": "source", "description": source.description, "files": source.files, "repeats": source.repeats}
    )
    return source


def _work(work: Work, directory: Path, audience: Audience, nodes: list[DemoNode] | None) -> Outcome:
    """Runs one worker to its end, whatever that is. Raises the worker's own error if it reported one."""
    orders = directory / f"{work.kind}.json"
    orders.write_text(json.dumps(work.to_dict()))
    log = directory / f"{work.kind}.log"
    outcome = Outcome(work)
    with log.open("wb") as errors:
        process = spawn(
            [*PYTHON, "ramster.cli.demo.worker", str(orders)],
            outlive=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin, process.stdout:
            for event in _events(process, lambda: _poll(outcome, audience, nodes)):
                if event["event"] == "error":
                    raise from_code(str(event["code"]), str(event["message"]))
                outcome.take(event)
                audience.event(event)
                if event["event"] == "done":
                    if nodes:
                        outcome.status = nodes[0].control.status()
                    process.stdin.write(b"\n")
                    process.stdin.flush()
        code = process.wait(timeout=STUCK_S)
    finally:
        end([process])
    lines = log.read_text(errors="replace").strip().splitlines()
    if code < 0:
        outcome.signal = -code
        outcome.words = lines[-1].removeprefix("ramster: ") if lines else ""
        outcome.finished = False
    if code == -signal.SIGBUS and nodes:
        # While it still has the region's pages.
        with contextlib.suppress(RamsterError):
            outcome.status = nodes[0].control.status()
            arena = outcome.status.get("arena") or {}
            lost = int(arena.get("pages_lost", 0)) + int(arena.get("pages_unreachable", 0))
            outcome.lost_seen = max(outcome.lost_seen, lost)
    elif code:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise RamsterError(f"the {work.kind} worker ended with {how}: {lines[-1] if lines else 'no message'}")
    audience.event({"event": "worker-end", "kind": work.kind, "code": code})
    return outcome


def _poll(outcome: Outcome, audience: Audience, nodes: list[DemoNode] | None) -> None:
    """Asks the borrower for the region's figures; silent when it cannot answer, since the worker's end will tell."""
    if not nodes:
        return
    try:
        regions = nodes[0].control.regions()
    except RamsterError:
        return
    for region in regions:
        outcome.lost_seen = max(outcome.lost_seen, int(region.get("lost_pages", 0)))
        outcome.remote_seen = int(region.get("remote_pages", outcome.remote_seen))
        outcome.full_seen = bool(region.get("full"))
        audience.status(region)


def _events(process: subprocess.Popen[bytes], idle: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The worker's JSON lines until it ends; calls `idle` about every STATUS_PERIOD_S.

    Raises NodeUnreachable when it does nothing for STUCK_S.
    """
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    ticks = 0
    pending = b""
    heard = polled = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ready = selector.select(STATUS_PERIOD_S)
            now = time.monotonic()
            if now - polled >= STATUS_PERIOD_S:
                polled = now
                idle()
                if (used := _cpu_ticks(process.pid)) != ticks:
                    ticks, heard = used, now
            if not ready:
                if now - heard > STUCK_S:
                    raise NodeUnreachable(
                        f"the worker has been stuck for {STUCK_S:.0f} s; run again with --keep and read the nodes' logs"
                    )
                continue
            heard = now
            data = os.read(descriptor, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                yield json.loads(line)


def _cpu_ticks(pid: int) -> int:
    """CPU time that the process has used, in clock ticks; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _require(outcome: Outcome) -> None:
    """A comparison run that found a wrong page, or did not end, would make every other figure worthless."""
    if outcome.total("wrong") or outcome.incomplete():
        raise RamsterError(
            f"the {outcome.work.kind} run on this machine is wrong or incomplete: {outcome.incomplete()}"
        )


def _started(node: DemoNode) -> dict[str, Any]:
    return {
        "event": "node",
        "name": node.name,
        "role": node.role,
        "pid": node.process.pid,
        "config": str(node.config),
        "log": str(node.log),
    }


@contextlib.contextmanager
def _directory(options: Options, audience: Audience) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ramster-demo-", dir=preflight.scratch_parent()))
    audience.event({"event": "directory", "path": str(path), "kept": options.keep})
    try:
        yield path
    finally:
        if not options.keep:
            with unbroken():
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that the clean-up runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, interrupt)) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
