"""A verifying soak: every front end at full tilt on real nodes, every page compared at each visit.

`python -m ramster.testing.soak [--seconds N] [--seed N] [--json] [--sabotage memory|arena|pools]`

Three nodes, each borrower and lender of both others, with arenas much smaller than what their applications hold, so
that cleaning, remotify, fetching and eviction never rest. Applications (`soak_application`) walk regions with 1 to 16
threads; NBD clients (`soak_nbd`) use an export of each node; engines without a shell (`soak_pools`) have dense, sparse
and ephemeral pools hammered. Meanwhile applications and clients are killed with SIGKILL and replaced, and links are
cut, held and throttled.

Exit status 1, with the reasons: a wrong page, a process that ended as it should not, an error in a node's log, pages
or frames, threads or descriptors that are left when all applications are gone, a process that outlives the run.
`--sabotage` spoils bytes behind the product's back (an application's memory, a node's arena, an engine's arena); such
a run has to fail.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ramster.cli.cluster_files import Sections
from ramster.cli.demo.nodes import PYTHON, spawn
from ramster.constants import NBD_SOCKET, PAGE_BYTES
from ramster.errors import NodeUnreachable
from ramster.testing.cluster import Cluster, Node
from ramster.testing.proxy import wait_until

NAMES: Final = ("a", "b", "c")
APPLICATIONS: Final = 2  # of each node
REGIONS: Final = 2
PAGES: Final = 1100
RESIDENT: Final = 160
THREADS: Final = (1, 2, 4, 16)
EXPORT: Final = "soak"
EXPORT_BYTES: Final = 1000 * PAGE_BYTES
CONNECTIONS: Final = (1, 2, 4)
# Four applications' pages, half of which compresses, are 9 MiB of a node: its arena holds a third of them. Lenders have
# room for several times of what is live, since a segment stays until its last page is gone.
NODE: Final[Sections] = {
    "arena": {"size": "4MiB", "full_wait": "10s"},
    "lend": {"size": "64MiB"},
    "links": {"give_up": "30s", "request_deadline": "500ms", "idle_timeout": "10s"},
    "region": {"full_wait": "20s", "node_wait": "5s"},
}
PROGRESS_S: Final = 5.0
STOP_S: Final = 90.0
COUNTED: Final = ("puts", "local_gets", "remote_gets", "segments_shipped", "frees_sent", "ships_failed", "late_replies")
FAULTS: Final = ("faults", "faults_remote", "faults_wp", "evictions", "evictions_clean", "refused", "lost_pages")


class Child:
    """A process that reports by lines of JSON and ends when its stdin is closed."""

    def __init__(self, name: str, module: str, *arguments: object) -> None:
        self.name = name
        self.totals: Counter[str] = Counter()
        self.failed = ""
        self.ended = False
        self.killed = False
        self.process = spawn(
            [*PYTHON, f"ramster.testing.{module}", *map(str, arguments)],
            outlive=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._errors = b""
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # the last line of one that was killed
                continue
            self.failed = self.failed or message.get("failed", "")
            self.ended = self.ended or bool(message.get("ended"))
            self.totals.update({key: value for key, value in message.items() if type(value) is int})

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors = self.process.stderr.read()

    def kill(self) -> None:
        self.killed = True
        self.process.kill()

    def finish(self, deadline_s: float = STOP_S) -> str:
        """Let it end (at once, if it was killed) and say what was wrong with that, or nothing."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            status = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
            return f"{self.name} did not end within {deadline_s:g} s"
        finally:
            for reader in self._readers:
                reader.join()
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()
        if self.failed:
            return f"{self.name}: {self.failed}"
        if self.killed and status == -signal.SIGKILL:
            return ""
        if status < 0:
            return f"{self.name} was ended by {signal.Signals(-status).name}: a page of it was lost"
        if status or not self.ended:
            return f"{self.name} ended with status {status}: {self._errors.decode(errors='replace')[-500:]}"
        return ""


@dataclasses.dataclass(slots=True)
class Summary:
    """What a run has done and what was wrong."""

    seed: int
    seconds: float = 0.0
    totals: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": not self.wrong, **dataclasses.asdict(self), "totals": dict(sorted(self.totals.items()))}


class Soak:
    """One run; `run` returns its summary. Nothing is left behind, whatever happens."""

    def __init__(self, seconds: float, seed: int, sabotage: str = "", *, quiet: bool = False) -> None:
        self._dice = random.Random(seed)
        self._seconds = seconds
        self._sabotage = sabotage
        self._quiet = quiet
        self._summary = Summary(seed)
        self._applications: dict[str, list[Child]] = {name: [] for name in NAMES}
        self._clients: dict[str, Child] = {}
        self._started = 0
        self._last: dict[str, dict[str, Any]] = {}

    def run(self) -> Summary:
        begin = time.monotonic()
        with Cluster(dict.fromkeys(NAMES, NODE), proxied=True, identity="soak") as cluster:
            self._cluster = cluster.start()
            try:
                self._soak()
            except Exception as error:
                self._fault(f"{type(error).__name__}: {error}")
            finally:
                for child in self._users():
                    child.kill()
                    self._end(child)
        self._leftovers()
        self._summary.seconds = round(time.monotonic() - begin, 1)
        return self._summary

    def _soak(self) -> None:
        nodes = self._cluster.nodes
        for node in nodes.values():
            node.control.create_export(EXPORT, EXPORT_BYTES)
        before = {name: _resources(node) for name, node in nodes.items()}
        self._pools = Child("pools", "soak_pools", self._dice.getrandbits(31), int(self._sabotage == "pools"))
        try:
            for name in NAMES:
                for _ in range(APPLICATIONS):
                    self._start_application(name)
                self._start_client(name)
            self._drive(time.monotonic() + self._seconds)
        finally:
            self._progress()
            for proxy in self._cluster.proxies.values():
                proxy.release()
                proxy.up.throttle(None)
                proxy.down.throttle(None)
            # All at once: each verifies every page before it goes.
            everybody = [self._pools, *self._users()]
            for child in everybody:
                assert child.process.stdin is not None
                with contextlib.suppress(OSError):
                    child.process.stdin.close()
            for child in everybody:
                self._end(child)
            self._applications = {name: [] for name in NAMES}
            self._clients = {}
        if not self._summary.wrong:
            for node in nodes.values():
                node.wait(lambda status: not status["exports"][0]["connections"], "no connection without a client")
                node.control.remove_export(EXPORT)
        self._settled(before)

    def _users(self) -> list[Child]:
        """Of the nodes: applications and NBD clients."""
        return [*(child for each in self._applications.values() for child in each), *self._clients.values()]

    def _start_application(self, name: str) -> None:
        self._started += 1
        child = Child(
            f"application {self._started} of {name}",
            "soak_application",
            self._cluster[name].region_socket,
            self._summary.seed * 1000 + self._started,
            REGIONS,
            PAGES,
            RESIDENT,
            self._dice.choice(THREADS),
        )
        self._applications[name].append(child)

    def _start_client(self, name: str) -> None:
        self._started += 1
        self._clients[name] = Child(
            f"NBD client {self._started} of {name}",
            "soak_nbd",
            self._cluster[name].run_dir / NBD_SOCKET,
            EXPORT,
            self._summary.seed * 1000 + self._started,
            self._dice.choice(CONNECTIONS),
        )

    def _end(self, child: Child) -> None:
        if problem := child.finish():
            self._fault(problem)
        self._summary.totals.update(child.totals)

    def _fault(self, problem: str) -> None:
        if problem not in self._summary.wrong:
            self._summary.wrong.append(problem)

    def _drive(self, until: float) -> None:
        """Chaos until the time is up, or something is wrong."""
        said = time.monotonic()
        spoil_at = until - self._seconds * 0.6
        while time.monotonic() < until and not self._summary.wrong:
            time.sleep(0.05 + 0.3 * self._dice.random())  # paces the chaos; nothing waits for it
            self._disturb()
            if self._sabotage and time.monotonic() > spoil_at:
                self._spoil()
            self._look()
            if time.monotonic() - said > PROGRESS_S:
                self._progress()
                said = time.monotonic()

    def _look(self) -> None:
        for node in self._cluster.nodes.values():
            if not node.running():
                self._fault(f"node {node.name} ended: {node.log[-500:]}")
        for child in [self._pools, *self._users()]:
            if child.failed or child.process.poll() is not None:
                self._end(child)
                if not self._summary.wrong:
                    self._fault(f"{child.name} ended by itself")
                return

    def _disturb(self) -> None:
        dice, totals = self._dice, self._summary.totals
        proxy = dice.choice(list(self._cluster.proxies.values()))
        what = dice.random()
        if what < 0.25:
            name = dice.choice(NAMES)
            victim = self._applications[name].pop(dice.randrange(APPLICATIONS))
            victim.kill()
            self._end(victim)
            self._start_application(name)
            totals["applications_killed"] += 1
        elif what < 0.3:
            name = dice.choice(NAMES)
            victim = self._clients.pop(name)
            victim.kill()
            self._end(victim)
            # What was in flight is done or dropped first, or it would land on what the next one has written.
            self._cluster[name].wait(
                lambda status: not status["exports"][0]["connections"], "the killed client's connections end"
            )
            self._start_client(name)
            totals["clients_killed"] += 1
        elif what < 0.45:
            proxy.cut()
            totals["links_cut"] += 1
        elif what < 0.55:
            with (proxy.up if dice.random() < 0.5 else proxy.down).held():
                time.sleep(0.2 * dice.random())
            totals["links_held"] += 1
        elif what < 0.65:
            proxy.down.throttle(dice.choice([None, None, 20e6]))

    def _statuses(self) -> dict[str, dict[str, Any]]:
        for name, node in self._cluster.nodes.items():
            with contextlib.suppress(NodeUnreachable):
                self._last[name] = node.status()
        return self._last

    def _progress(self) -> None:
        totals = Counter[str]()
        for status in self._statuses().values():
            totals.update({key: status["counters"].get(key, 0) for key in COUNTED})
            totals["cleaned_segments"] += status["arena"]["cleaned_segments"]
            totals["puts_plugged"] += status["arena"]["puts_plugged"]
            totals["remote_pages"] += status["arena"]["pages_remote"]
            totals["lent_frames"] += status["lend"]["frames_used"]
            for region in status["regions"]:
                totals.update({f"now_{key}": region.get(key, 0) for key in FAULTS})
        children = [self._pools, *self._users()]
        visits = self._summary.totals["visits"] + sum(child.totals["visits"] for child in children)
        pools = self._pools.totals["puts"] + self._pools.totals["gets"]
        requests = self._summary.totals["requests"] + sum(child.totals["requests"] for child in children)
        if not self._quiet:
            shown = " ".join(f"{key}={value}" for key, value in totals.items())
            sys.stderr.write(f"soak: visits={visits} requests={requests} pool_operations={pools} {shown}\n")
            sys.stderr.flush()
        self._summary.totals.update(
            {f"nodes_{key}": totals[key] - self._summary.totals[f"nodes_{key}"] for key in totals}
        )

    def _settled(self, before: dict[str, dict[str, int]]) -> None:
        """Everybody is gone: what is left at the nodes then is a leak."""
        if self._summary.wrong:
            return
        for node in self._cluster.nodes.values():
            node.wait(
                lambda status: not status["regions"] and not status["arena"]["pages_stored"], "no page without an owner"
            )
        for name, node in self._cluster.nodes.items():
            node.wait(lambda status: not status["lend"]["frames_used"], "no frame without an owner")
            node.wait(lambda status: all(peer["state"] == "up" for peer in status["peers"]), "linked again")
            with contextlib.suppress(AssertionError):
                wait_until(lambda node=node, name=name: _leaked(node, before[name]) == {}, "nothing leaked", 10.0)  # type: ignore[misc]
            if leaked := _leaked(node, before[name]):
                self._fault(f"node {name} leaks: {leaked}")
            for word in ("Traceback", "invariant", "Assertion"):
                if word in node.log:
                    self._fault(f"node {name} logged: {node.log[node.log.index(word) - 200 :][:800]}")

    def _leftovers(self) -> None:
        if children := list(_children(os.getpid())):
            self._fault(f"processes left: {children}")
        threads = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
        if threads and threading.current_thread() is threading.main_thread():
            with contextlib.suppress(AssertionError):
                wait_until(lambda: threading.active_count() == 1, "threads end", 5.0)
            if threading.active_count() > 1:
                self._fault(f"threads left: {threads}")

    def _spoil(self) -> None:
        """Flip bytes behind everybody's back, where a page is: again at each turn, as it may be rewritten at once."""
        if self._sabotage == "memory":
            _flip(self._cluster["a"], "ramster-region", 2048)
        elif self._sabotage == "arena":
            _flip(self._cluster["a"], "ramster-arena", 97)
        self._summary.totals["spoilt"] += 1


def _memfds(node: Node, name: str) -> Iterator[Path]:
    assert node.process is not None
    for fd in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if fd.readlink().name.startswith(f"memfd:{name}"):
                yield fd


def _flip(node: Node, name: str, step: int) -> None:
    """Flip a bit every `step` bytes of what is present of these files in memory."""
    for path in _memfds(node, name):
        with contextlib.suppress(OSError), path.open("r+b", buffering=0) as file:
            fd, size, at = file.fileno(), os.fstat(file.fileno()).st_size, 0
            while at < size:
                at = os.lseek(fd, at, os.SEEK_DATA)
                end = os.lseek(fd, at, os.SEEK_HOLE)
                for place in range(at + 1024, end, max(step, (end - at) // 4096)):
                    os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 4]), place)
                at = end


def _resources(node: Node) -> dict[str, int]:
    assert node.process is not None
    proc = Path(f"/proc/{node.process.pid}")
    names = Counter((task / "comm").read_text().strip() for task in (proc / "task").iterdir())
    kinds = Counter[str]()
    for fd in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            kinds[str(fd.readlink()).partition(":[")[0]] += 1
    return {
        **{f"descriptors of {kind}": count for kind, count in kinds.items()},
        **{f"threads {name}": count for name, count in names.items() if name.startswith("ramster-")},
    }


def _leaked(node: Node, before: dict[str, int]) -> dict[str, str]:
    try:
        now = _resources(node)
    except FileNotFoundError:  # a thread that ended while we looked
        return {"threads": "in motion"}
    return {
        key: f"{before.get(key, 0)} before, {count} now" for key, count in now.items() if count > before.get(key, 0)
    }


def _children(pid: int) -> Iterator[str]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            text = stat.read_text()
            state, parent = text.rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                yield text.partition(")")[0] + ")"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Verify every page of regions, exports and pools under full load.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20))
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")
    parser.add_argument(
        "--sabotage", choices=["memory", "arena", "pools"], default="", help="spoil bytes: must be found"
    )
    options = parser.parse_args(arguments)
    summary = Soak(options.seconds, options.seed, options.sabotage, quiet=options.json).run()
    if options.json:
        sys.stdout.write(json.dumps(summary.as_dict(), indent=2) + "\n")
    else:
        for key, value in sorted(summary.totals.items()):
            sys.stdout.write(f"{key:32} {value:>14,}\n")
        for problem in summary.wrong:
            sys.stdout.write(f"WRONG: {problem}\n")
        verdict = "FAILED" if summary.wrong else "every page was right"
        sys.stdout.write(f"soak: {verdict}, {summary.seconds:.0f} s, seed {summary.seed}\n")
    return 1 if summary.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
