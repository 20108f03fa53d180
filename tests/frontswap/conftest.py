"""A node in a process of its own, and scripts that use it: what these tests do to memory may kill a process."""

import asyncio
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from ramster.config.knobs import Region as RegionSettings
from ramster.engine.links import Links
from ramster.engine.region import Region
from ramster.engine.store import Store
from ramster.frontswap.capacity import of_tiers
from ramster.frontswap.region_service import RegionInfo, RegionService

DEADLINE = 60.0

HEADER = """
import contextlib, ctypes, gc, mmap, os, resource, signal, struct, sys, threading, time
import numpy as np
import ramster
from tests.frontswap._server import pattern
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
PAGE = 4096
first_word = lambda page: struct.unpack("<Q", pattern(page)[:8])[0]
def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "deadline"
        time.sleep(0.001)
"""


class Node:
    """A running `_server.py`."""

    def __init__(self, run_dir: Path, options: tuple[str, ...]) -> None:
        self.socket = run_dir / "region.sock"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("_server.py")), str(run_dir), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._pending = b""

    def line(self) -> str:
        """The next line that the node prints; fails at the deadline or at its end."""
        assert self.process.stdout is not None
        end = time.monotonic() + DEADLINE
        while b"\n" not in self._pending:
            assert select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[0], "deadline"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"the node ended: {self._pending!r}"
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def wait_for(self, start: str) -> str:
        while not (line := self.line()).startswith(start):
            pass
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def stop(self) -> str:
        """End it in order; the line with its counters."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        line = self.wait_for("closed")
        assert self.process.wait(DEADLINE) == 0
        return line


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: socket addresses hold 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ramster-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_node(directory: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Node]]:
    """Starts nodes; parametrized with "engine", their regions are the product's and not the reference's."""
    nodes: list[Node] = []

    def start(*options: str) -> Node:
        engine = getattr(request, "param", "reference") == "engine"
        node = Node(directory / "run", (*options, "--engine") if engine else options)
        nodes.append(node)
        assert node.line() == "ready"
        return node

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.kill()
        for stream in (node.process.stdin, node.process.stdout):
            if stream is not None:
                stream.close()


def start_script(body: str, *arguments: object) -> "subprocess.Popen[str]":
    """A Python process that runs `body` after HEADER; its arguments are in sys.argv[1:]."""
    return subprocess.Popen(
        [sys.executable, "-c", HEADER + textwrap.dedent(body), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def finish(script: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """(exit status, stdout, stderr); a script that hangs is killed and fails the test."""
    try:
        out, err = script.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        script.kill()
        out, err = script.communicate()
        pytest.fail(f"the script hangs\n{out}\n{err}")
    return script.returncode, out, err


def run_script(body: str, *arguments: object) -> str:
    """Its output; fails unless it ends with status 0."""
    status, out, err = finish(start_script(body, *arguments))
    assert status == 0, f"status {status}\n{out}\n{err}"
    return out


AGENT = """
import json
from ramster.testing._touch import read_pages, write_pages
client = ramster.connect(sys.argv[1])
def errno_of(page):
    "What a system call says that reads the page: 0, or why it cannot."
    read, write = os.pipe()
    try: os.write(write, a[page:page + 1])
    except OSError as error: return error.errno
    finally:
        os.close(read); os.close(write)
    return 0
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        code, statements = json.loads(line)
        answer = exec(code, globals()) if statements else eval(code, globals())
    except ramster.RamsterError as error: answer = [error.code, str(error)]
    print(json.dumps(answer, default=str), flush=True)
"""


class Agent:
    """A process that does what it is told, in Python: `client` is its client, `a` its array of pages."""

    def __init__(self, socket: Path, options: str = "") -> None:
        self.process = start_script(options + AGENT, socket)
        self.answer()

    def send(self, code: str, statements: bool = False) -> None:
        """Without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([code, statements]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the oldest line: its value, or [code, message] of the error."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE)[0], "deadline"
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise EOFError(f"the process ended with {self.process.wait()}: {self.process.stderr.read()}")
        return json.loads(line)

    def ask(self, expression: str) -> Any:
        self.send(expression)
        return self.answer()

    def run(self, statements: str) -> None:
        self.send(textwrap.dedent(statements), True)
        assert self.answer() is None

    def create(self, pages: int, resident: int, name: str | None = "shared") -> None:
        self.run(f"region = client.region({pages} * PAGE, resident={resident} * PAGE, name={name!r})")
        self.run("a = region.array((region.nbytes // PAGE, 512), np.uint64)")

    def attach(self, name: str | int = "shared") -> None:
        self.run(f"region = client.attach({name!r})")
        self.run("a = region.array((region.nbytes // PAGE, 512), np.uint64)")

    def protected(self, page: int) -> bool:
        """The page is mapped, and write-protected by userfaultfd, in this process."""
        at = self.ask("region.address") // 4096 + page
        with Path(f"/proc/{self.process.pid}/pagemap").open("rb") as map_:
            map_.seek(at * 8)
            entry = int.from_bytes(map_.read(8), "little")
        return entry >> 63 == 1 and entry >> 57 & 1 == 1

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def end(self) -> None:
        """In order; fails unless its exit status is 0."""
        status, _, err = finish(self.process)
        assert status == 0, err


def fault_threads() -> set[int]:
    """Of the regions in this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text() == "ramster-fault\n":
                found.add(int(task.name))
    return found


class Engines:
    """The product's service and engine in this process, on a loop of its own: tests reach into them."""

    def __init__(self, directory: Path, arena_bytes: int = 64 << 20, **options: Any) -> None:
        self.store = Store(arena_bytes, lock=False, full_wait_ms=options.pop("store_full_wait_ms", 2000))
        self.links = Links(self.store, 1)
        self.options: dict[str, Any] = {"full_wait_ms": 2000, **options}
        self.regions: dict[str, Region] = {}
        self.socket = directory / "run" / "region.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        settings = RegionSettings(
            poison=self.options.get("poison", "auto"), full_hold_ms=self.options.pop("full_hold_ms", 600_000)
        )
        self.service = RegionService(directory / "run", self._make, settings, self._tiers)
        self._run(self.service.start())
        self.agents: list[Agent] = []

    def _make(self, pages: int, resident_pages: int, name: str) -> Region:
        self.regions[name] = Region(self.links, pages, resident_pages, name=name, **self.options)
        return self.regions[name]

    def _tiers(self) -> dict[str, int]:
        granted = [credit for _, up, credit, *_ in self.links.lenders() if up]
        return of_tiers(self.store.counters(), granted, None)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE)

    def describe(self) -> list[RegionInfo]:
        found: list[RegionInfo] = self._run(self.service.describe())
        return found

    def agent(self, options: str = "") -> Agent:
        self.agents.append(Agent(self.socket, options))
        return self.agents[-1]

    def close(self) -> None:
        for agent in self.agents:
            if agent.process.poll() is None:
                agent.process.kill()
            agent.process.communicate()
        self._run(self.service.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.store.verify()
        self.links.stop()


@pytest.fixture
def engines(directory: Path) -> Iterator[Callable[..., Engines]]:
    made: list[Engines] = []

    def make(**options: Any) -> Engines:
        made.append(Engines(directory, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
