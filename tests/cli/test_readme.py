"""Blocks of README and of docs/nbd.md do what they say when they are pasted whole, in a folder whose path has a space
and an umlaut.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramster.constants import MIB
from ramster.frontswap import cgroups, devices, swap
from ramster.testing.cluster import free_ports

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240.0


def section(heading: str, document: str = "README.md") -> list[tuple[str, str]]:
    """(language, text) of its blocks."""
    text = (ROOT / document).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class Folder:
    """Where a newcomer pastes: ports are our own, everything else is what README says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ports = dict(zip(("7771", "7772"), map(str, free_ports(2)), strict=True))
        commands = path / ".venv" / "bin"
        commands.mkdir(parents=True)
        for name, module in (("python", ""), ("ramster", "-m ramster.cli ")):
            (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -P {module}"$@"\n')
            (commands / name).chmod(0o755)
        (commands / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')

    def paste(self, text: str) -> str:
        """What it printed. Every command in it must end well; what runs in the background goes on."""
        for theirs, ours in self.ports.items():
            text = text.replace(theirs, ours)
        with (self.path / "printed").open("w+b") as printed:
            done = subprocess.run(
                ["bash", "-e"],
                input=text.encode(),
                stdout=printed,
                stderr=printed,
                cwd=self.path,
                env={"PATH": f"{self.path}/.venv/bin:{os.environ['PATH']}", "HOME": str(self.path)},
                timeout=TIMEOUT_S,
            )
            printed.seek(0)
            output = printed.read().decode(errors="replace")
        assert done.returncode == 0, output
        assert "Traceback" not in output
        return output

    def processes(self) -> Iterator[int]:
        """Nodes that were left running: those in this folder."""
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (each / "cwd").readlink() == self.path and b"\0node\0" in (each / "cmdline").read_bytes():
                    yield int(each.name)


@pytest.fixture
def folder() -> Iterator[Folder]:
    with tempfile.TemporaryDirectory(prefix="ramster ü ") as path:
        made = Folder(Path(path).resolve())
        try:
            yield made
        finally:
            for pid in made.processes():
                os.kill(pid, signal.SIGKILL)


def test_by_hand(folder: Folder) -> None:
    for language, text in section("Try it by hand"):
        if language == "python":
            (folder.path / "example.py").write_text(text)
        else:
            printed = folder.paste(text)
    assert "65536 pages" in printed and "node beta has stopped" in printed
    assert not list(folder.processes())


CLIENTS = ("nbdinfo", "nbdcopy", "qemu-img", "fio", "curl")


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in CLIENTS), reason=f"not all of {', '.join(CLIENTS)}")
def test_block_devices_by_hand(folder: Folder) -> None:
    printed = [folder.paste(text) for _, text in section("Try it", "docs/nbd.md")]
    assert 'export="vm"' in printed[0]
    assert "Images are identical" in printed[1] and "hole,zero" in printed[1]
    assert '"size_bytes":2147483648' in printed[2] and '{"removed":"scratch"}' in printed[2]


def cannot_swap() -> str:
    if os.geteuid() != 0:
        return "swapon needs root"
    with contextlib.suppress(Exception):
        devices.need("mkswap", "swapon", "swapoff", "nbdfuse", "losetup")
        cgroups.Group("ramster-run-0").remove()
        if devices.meminfo()["MemAvailable"] < 2048 * MIB:
            return "less than 2 GiB of RAM is free"
        return "" if Path("/dev/fuse").exists() and Path("/dev/loop-control").exists() else "no FUSE or no loop devices"
    return "a program or a cgroup is missing"


WHY = cannot_swap()


@pytest.mark.skipif(bool(WHY), reason=WHY)
def test_any_program(folder: Folder) -> None:
    by_hand = section("Try it by hand")[0][1]
    folder.paste(by_hand[: by_hand.index("ramster node")])
    ((_, text),) = section("Any program: swap")
    try:
        printed = folder.paste(text)
        assert f"{sum(range(10_000_000))}\n" in printed
        assert "the kernel swaps on" in printed and "removed the export swap0" in printed
        assert list(swap.recorded(folder.path / "lab" / "alpha")) == []
    finally:
        with contextlib.suppress(AssertionError):
            folder.paste("ramster swap off --all --force --config lab/alpha.toml")
