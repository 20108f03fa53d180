"""The demo's cluster: a throw-away CA and real `ramster node` processes on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ramster.cli.cluster_files import Place, Sections, create
from ramster.cli.control_client import ControlClient
from ramster.cli.demo.plan import LENDER_ARENA_BYTES, Options
from ramster.constants import CONTROL_SOCKET, REGION_SOCKET
from ramster.errors import NodeUnreachable, PortTaken, RamsterError
from ramster.signals import unbroken

READY_S = 30.0  # populating and locking a few GiB of arena takes seconds
STOP_S = 5.0
POLL_S = 0.05
_PORT_ATTEMPTS = 3
# -P: a json.py in the directory where the user stands is not ours.
PYTHON = (sys.executable, "-P", "-m")


class DemoNode:
    """One running node process and its files."""

    def __init__(self, name: str, role: str, config: Path, *, outlive: bool) -> None:
        """Starts the process. With `outlive` it stays when this one dies (--keep), else the kernel ends it with us."""
        self.name = name
        self.role = role
        self.config = config
        self.directory = config.parent / name  # its run_dir
        self.directory.mkdir(mode=0o700)
        self.log = self.directory / "node.log"
        self.control = ControlClient(self.directory / CONTROL_SOCKET, timeout_s=5.0)
        command = [*PYTHON, "ramster.cli", "node", "--config", str(config)]
        with self.log.open("wb") as log:
            self.process = spawn(command, outlive=outlive, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def region_socket(self) -> Path:
        return self.directory / REGION_SOCKET

    def alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """The last line of its log, or how it ended."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("ramster: ") if lines else f"exit code {self.process.returncode}"


def spawn(command: list[str], *, outlive: bool, **pipes: Any) -> subprocess.Popen[bytes]:
    """Starts `command` in its own session, so that Ctrl-C reaches us alone and we end it in order."""
    if not outlive:
        command = [*PYTHON, "ramster.cli.demo.child", str(os.getpid()), *command]
    return subprocess.Popen(command, start_new_session=True, **pipes)


@contextlib.contextmanager
def cluster(options: Options, directory: Path, started: Callable[[DemoNode], None]) -> Iterator[list[DemoNode]]:
    """Nodes that are up and linked: the borrower first, then the lenders. Stopped at the end unless `options.keep`.

    `started` hears of each process as soon as it runs. Raises the node's own error if one does not come up.
    """
    for attempt in range(_PORT_ATTEMPTS):
        nodes: list[DemoNode] = []
        try:
            for config in _write_files(options, directory / f"cluster-{attempt + 1}"):
                nodes.append(DemoNode(config.stem, "lender" if nodes else "borrower", config, outlive=options.keep))
                started(nodes[-1])
            _wait_ready(nodes)
        except PortTaken:
            # Somebody took the port between our look and the node's bind.
            end([node.process for node in nodes])
            if attempt + 1 == _PORT_ATTEMPTS:
                raise
            continue
        except BaseException:
            end([node.process for node in nodes])
            raise
        break
    try:
        yield nodes
    except BaseException:
        end([node.process for node in nodes])
        raise
    if not options.keep:
        end([node.process for node in nodes])


def _write_files(options: Options, directory: Path) -> list[Path]:
    ports = _free_ports(options.nodes)
    places = [Place(f"node-{number}", number, "127.0.0.1", port) for number, port in enumerate(ports, 1)]
    extra: dict[str, Sections] = {}
    for place in places:
        borrower = place.number == 1
        extra[place.name] = {
            "node": {"run_dir": place.name},
            "arena": {"size": options.local if borrower else LENDER_ARENA_BYTES},
            "lend": {"size": 0 if borrower else options.lend_bytes()},
        }
    return create(directory, f"demo-{os.getpid()}", places, extra=extra)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _wait_ready(nodes: list[DemoNode]) -> None:
    """Returns once each node answers and has all its links up. Raises what made one fail, with its own words."""
    deadline = time.monotonic() + READY_S
    for node in nodes:
        while True:
            if dead := next((each for each in nodes if not each.alive()), None):
                raise _failure(dead)
            try:
                peers = node.control.status().get("peers") or []
                if len(peers) == len(nodes) - 1 and all(peer.get("state") == "up" for peer in peers):
                    break
            except NodeUnreachable:
                pass
            if time.monotonic() > deadline:
                raise NodeUnreachable(
                    f"{node.name} was not ready and linked within {READY_S:.0f} s ({node.last_words()}); "
                    f"run again with --keep and read {node.log}"
                )
            time.sleep(POLL_S)


def _failure(node: DemoNode) -> RamsterError:
    code = node.process.returncode
    message = f"{node.name} did not start: {node.last_words()}"
    for kind in RamsterError.__subclasses__():
        if kind.exit_code == code:
            return kind(message)
    return NodeUnreachable(message)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends the processes: SIGTERM, and SIGKILL for those that have not ended after STOP_S seconds. None is left."""
    with unbroken():
        _end(processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
