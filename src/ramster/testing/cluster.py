"""Real nodes on loopback for tests: own processes, throw-away certificates, one folder, nothing left at the end."""

from __future__ import annotations

import contextlib
import json
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ramster.cli.cluster_files import Place, Sections, Value, create
from ramster.cli.control_client import ControlClient
from ramster.cli.demo.nodes import PYTHON, end, spawn
from ramster.constants import CONTROL_SOCKET, REGION_SOCKET
from ramster.errors import NodeUnreachable, RamsterError
from ramster.node import holder
from ramster.testing.proxy import Proxy, wait_until

DEADLINE_S: Final = 30.0
STOP_S: Final = 5.0
# Below the ports that kernels give to outgoing connections: a node that is started again finds its own still free.
PORTS: Final = range(20000, 32000)

# Small and impatient, so that a test of a failure takes a second and not a minute.
DEFAULTS: Final[Sections] = {
    "arena": {"size": "8MiB", "segment": "64KiB", "lock": False, "full_wait": "500ms"},
    "links": {
        "request_deadline": "300ms",
        "give_up": "2s",
        "idle_timeout": "2s",
        "keepalive": "300ms",
        "reconnect_min": "20ms",
        "reconnect_max": "100ms",
    },
    "remotify": {"cold_after": "0ms", "tick": "10ms"},
    "region": {"full_wait": "1s", "node_wait": "500ms"},
}


class Node:
    """One node: its files always, its process between `start` and `stop` or `kill`."""

    def __init__(self, place: Place, config: Path) -> None:
        self.name = place.name
        self.place = place
        self.config = config
        self.run_dir = config.parent / place.name
        self.log_file = config.with_suffix(".log")
        self.control = ControlClient(self.run_dir / CONTROL_SOCKET, timeout_s=5.0)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def region_socket(self) -> Path:
        return self.run_dir / REGION_SOCKET

    @property
    def log(self) -> str:
        """Everything that its processes have written so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def start(self) -> None:
        """Start the process; it dies with this one. Does not wait."""
        assert self.process is None or self.process.poll() is not None, f"{self.name} runs already"
        with self.log_file.open("ab") as log:
            self.process = spawn(
                [*PYTHON, "ramster.cli", "node", "--config", str(self.config)],
                outlive=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def status(self) -> dict[str, Any]:
        """Raises NodeUnreachable."""
        return self.control.status()

    def peer(self, name: str) -> dict[str, Any]:
        """What it says of one peer."""
        return next(peer for peer in self.status()["peers"] if peer["name"] == name)

    def wait(
        self, condition: Callable[[dict[str, Any]], object], what: str, deadline_s: float = DEADLINE_S
    ) -> dict[str, Any]:
        """Its status once the condition holds; AssertionError shows the end of its log."""
        until = time.monotonic() + deadline_s
        while True:
            with contextlib.suppress(NodeUnreachable):
                status = self.status()
                if condition(status):
                    return status
            if not self.running() or time.monotonic() > until:
                raise AssertionError(f"{self.name}: not within {deadline_s:g} s: {what}\n{self.log[-3000:]}")
            time.sleep(0.01)

    def wait_exit(self, deadline_s: float = DEADLINE_S) -> int:
        assert self.process is not None
        return self.process.wait(deadline_s)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait_exit()

    @contextlib.contextmanager
    def suspended(self) -> Any:
        """SIGSTOP inside the block, SIGCONT after it."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


class Cluster:
    """Nodes by name, numbered from 1 in this order; a context manager.

    names: a mapping from name to sections of the configuration that differ from DEFAULTS, or just names. proxied:
    between each pair stands a Proxy, `proxy(a, b)`. identity: the cluster id, in the certificates too.

    `start` starts every node and waits until all are linked. Leaving the block ends processes and proxies and removes
    the folder, whatever happened.
    """

    def __init__(
        self, names: Mapping[str, Sections] | Iterable[str], *, proxied: bool = False, identity: str = "test"
    ) -> None:
        wanted = dict(names) if isinstance(names, Mapping) else {name: {} for name in names}
        # Short: the address of a socket holds 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="ramster-"))
        self.proxies: dict[frozenset[str], Proxy] = {}
        self.nodes: dict[str, Node] = {}
        try:
            ports = free_ports(len(wanted))
            places = [
                Place(name, number, "127.0.0.1", port)
                for number, (name, port) in enumerate(zip(wanted, ports, strict=True), 1)
            ]
            extra = {name: _merge(DEFAULTS, {"node": {"run_dir": name}}, sections) for name, sections in wanted.items()}
            configs = create(self.directory / "files", identity, places, extra=extra)
            self.nodes = {place.name: Node(place, config) for place, config in zip(places, configs, strict=True)}
            if proxied:
                self._put_proxies(places)
        except BaseException:
            self.close()
            raise

    def _put_proxies(self, places: list[Place]) -> None:
        """The higher number connects, and the other one where that fails: each has the proxy's address of the other."""
        for low in places:
            for high in places:
                if low.number < high.number:
                    proxy = Proxy((low.host, low.port), (high.host, high.port))
                    self.proxies[frozenset({low.name, high.name})] = proxy
                    for here, there, address in ((high, low, proxy.address), (low, high, proxy.back_address)):
                        config = self.nodes[here.name].config
                        text = config.read_text()
                        old, new = f'address = "{there.address}"', 'address = "{}:{}"'.format(*address)
                        assert old in text
                        config.write_text(text.replace(old, new))

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def proxy(self, one: str, other: str) -> Proxy:
        return self.proxies[frozenset({one, other})]

    def start(self) -> Self:
        try:
            for node in self.nodes.values():
                node.start()
            self.wait_up()
        except BaseException:  # `with Cluster(...).start()` would never get to its end
            self.close()
            raise
        return self

    def wait_up(self) -> None:
        """Until every running node has its links to all other running ones up."""
        running = [node for node in self.nodes.values() if node.running()]
        for node in running:
            node.wait(partial(_linked, others={other.name for other in running} - {node.name}), "linked")

    def close(self) -> None:
        """End everything. Again: does nothing."""
        running = [node for node in self.nodes.values() if node.running()]
        for node in running:
            node.signal(signal.SIGCONT)
            with contextlib.suppress(RamsterError):
                node.control.stop(force=True)
        until = time.monotonic() + STOP_S
        for node in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait_exit(max(0.0, until - time.monotonic()))
        end([node.process for node in self.nodes.values() if node.process is not None])
        for node in self.nodes.values():
            holder.end(node.run_dir)  # of a node that was killed
        for proxy in self.proxies.values():
            proxy.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _linked(status: dict[str, Any], others: set[str]) -> bool:
    return others <= {peer["name"] for peer in status["peers"] if peer["state"] == "up"}


def _merge(*parts: Sections) -> dict[str, dict[str, Value]]:
    merged: dict[str, dict[str, Value]] = {}
    for part in parts:
        for section, values in part.items():
            merged.setdefault(section, {}).update(values)
    return merged


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Application:
    """A process with one region at the node behind a socket. What a test does to memory may kill it, and nobody else.

    Commands go as (name, arguments) to `ramster.testing.application`, answers come back as JSON.
    """

    def __init__(self, socket: Path, pages: int, resident: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ramster.testing.application", str(socket), str(pages), str(resident)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def send(self, command: str, *arguments: object) -> None:
        """Without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self, deadline_s: float = DEADLINE_S) -> Any:
        """The answer to the oldest command; AssertionError at the deadline, EOFError when the process has died."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], deadline_s)[0]:
            raise AssertionError(f"no answer within {deadline_s:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the application ended with {self.process.wait()}: {self.stderr()}")
        return json.loads(line)

    def ask(self, command: str, *arguments: object) -> Any:
        self.send(command, *arguments)
        return self.answer()

    def stderr(self) -> str:
        """What it wrote there; for a process that has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def died_of(self, deadline_s: float = DEADLINE_S) -> int:
        """The signal that ended it; AssertionError at the deadline or for any other end."""
        wait_until(lambda: self.process.poll() is not None, "the application dies", deadline_s)
        code = self.process.returncode
        assert code < 0, f"exit status {code}: {self.stderr()}"
        return -code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
