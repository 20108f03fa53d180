"""Limits of the system that a node, or an application, runs into: every error names the limit, and the node answers."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import ramster
from ramster import limits
from ramster.engine.links import Links
from ramster.engine.store import Store
from ramster.errors import LimitReached, StoreFull
from ramster.frontswap.sockets import listen_tcp, listen_unix
from ramster.testing.cluster import Cluster

_APPLICATION = """
import resource, sys
import ramster
from ramster.errors import RamsterError
kind, limit = getattr(resource, sys.argv[2]), int(sys.argv[3])
resource.setrlimit(kind, (limit, limit))
held = []
for _ in range(64):
    try:
        held.append(ramster.connect(sys.argv[1]).region(1 << 24))
    except RamsterError as error:
        print(error.code, error)
print(len(held), "made")
"""


@pytest.mark.parametrize(
    ("number", "knob"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "memory"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.ENOENT, None),
    ],
)
def test_a_limit_is_named_with_its_knob(number: int, knob: str | None) -> None:
    found = limits.reached(OSError(number, os.strerror(number)), "do it", "the node")
    assert (found is None) == (knob is None)
    if knob is not None:
        assert isinstance(found, LimitReached) and knob in str(found) and str(found).startswith("cannot do it: ")


@pytest.mark.parametrize(
    ("kind", "limit", "knob"), [("RLIMIT_NOFILE", 40, "ulimit -n"), ("RLIMIT_AS", 700 << 20, "ulimit -v")]
)
def test_an_application_is_told_which_limit_it_ran_into(kind: str, limit: int, knob: str) -> None:
    with Cluster(["alpha"]) as cluster:
        socket = cluster.start()["alpha"].run_dir / "region.sock"
        command = [sys.executable, "-c", _APPLICATION, str(socket), kind, str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *errors, made = done.stdout.splitlines()
    assert errors and 0 < int(made.split()[0]) < 64
    assert all(each.startswith("limit-reached ") and knob in each for each in errors), errors[:3]


@pytest.mark.parametrize(
    ("kind", "limit", "knob"),
    [(resource.RLIMIT_NOFILE, n, "ulimit -n") for n in (8, 12, 16, 20)]
    + [(resource.RLIMIT_AS, n << 20, "ulimit -v") for n in (150, 200, 250)],
)
def test_a_node_that_a_limit_keeps_from_starting_names_it(kind: int, limit: int, knob: str) -> None:
    with Cluster({"alpha": {"arena": {"size": "64MiB"}, "lend": {"size": "64MiB"}}, "beta": {}}) as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "ramster.cli", "node", "--config", str(cluster["alpha"].config)],
            preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert "bug" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert done.returncode == LimitReached.exit_code, done.stderr
    assert knob in done.stderr.splitlines()[-1]


def test_listening_without_descriptors_names_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_more(*arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("ramster.frontswap.sockets.socket.socket", no_more)
    with pytest.raises(LimitReached, match=r"127.0.0.1:7777 \(\[links\] listen\).*ulimit -n"):
        listen_tcp("127.0.0.1", 7777, "[links] listen")
    with pytest.raises(LimitReached, match=r"nbd.sock.*ulimit -n"):
        listen_unix(tmp_path / "nbd.sock")


def test_links_that_could_not_be_made_go_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Links):
        @property
        def stop(self) -> Any:
            raise AttributeError("its class is half gone")

    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    store = Store(1 << 20, segment_bytes=65536, lock=False, cleaner=False)
    with pytest.raises(StoreFull, match="cannot lend"):
        Half(store, 1, lend_bytes=1 << 60, lock=False)
    store.close()
    assert said == []


def test_a_node_without_descriptors_says_so_and_goes_on_answering() -> None:
    with Cluster(["alpha"]) as cluster:
        alpha = cluster.start()["alpha"]
        pid = alpha.control.status()["pid"]
        few = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) + 16
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, before[1]))
        held = []
        told = set()
        for _ in range(40):
            try:
                held.append(ramster.connect(alpha.run_dir / "region.sock").region(1 << 20))
            except LimitReached as error:
                told.add("the node" in str(error) and "ulimit -n" in str(error))
                assert alpha.control.status()["name"] == "alpha"
        assert held and told == {True}
        for each in held:
            each.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        ramster.connect(alpha.run_dir / "region.sock").region(1 << 20).close()
        assert alpha.log.count("as many descriptors open as it may") <= 3


# The user of this process alone, and one thread more each time, until there are enough.
_THREADS = """
import os, resource, sys
from pathlib import Path
from ramster import limits
from ramster.engine.links import Links
from ramster.engine.nbd import NbdServer
from ramster.engine.spill import Spill
from ramster.engine.store import Store
from ramster.testing.proxy import wait_until
what, directory = sys.argv[1], Path(sys.argv[2])
running = lambda: len(os.listdir("/proc/self/task"))
store = Store(64 << 20, lock=False)
links = None if what == "links" else Links(store, 1)
def make():
    if what == "store":
        return Store(64 << 20, lock=False)
    if what == "links":
        return Links(store, 1)
    if what == "spill":
        return Spill(links, directory / "spill", 64 << 20, mirror=True)
    return NbdServer(links, slow_threads=3)
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
before, refused, made = running(), 0, None
while made is None:
    assert refused < 64
    resource.setrlimit(resource.RLIMIT_NPROC, (before + refused, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
    try:
        with limits.named("start", "the node"):
            made = make()
    except limits.LimitReached as error:
        assert "ulimit -u" in str(error), error
        wait_until(lambda: running() == before, "those that were started have ended")
        refused += 1
print(refused, running() - before)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user, whom the limit binds")
@pytest.mark.parametrize("what", ["store", "links", "spill", "nbd"])
def test_a_thread_that_is_not_to_be_had_is_named_and_those_before_it_end(what: str) -> None:
    user = 1 << 24 | os.getpid()  # nobody else's: the limit counts all threads of a user
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, user, user)
        command = [sys.executable, "-c", _THREADS, what, directory, str(user)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    refused, started = map(int, done.stdout.split())
    assert refused == started > 0, "each thread was refused once"
