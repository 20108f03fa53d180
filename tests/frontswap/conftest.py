"""A node in a process of its own, and scripts that use it: what these tests do to memory may kill a process."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
