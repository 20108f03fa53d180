"""Commands that need a node wait for one that was just started: bounded, and said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ramster.cli import main
from ramster.testing.cluster import Cluster

RAMSTER = [sys.executable, "-P", "-m", "ramster.cli"]


@pytest.mark.parametrize("words", [("status", "--json"), ("export", "ls", "--json")])
def test_a_command_that_came_before_its_node_gets_its_answer(words: tuple[str, ...]) -> None:
    with Cluster(["alpha"]) as cluster:
        command = [*RAMSTER, *words, "--config", str(cluster["alpha"].config), "--wait", "60"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                said = process.stderr.readline()
                assert "waiting for a node on" in said and "60 s" in said
                cluster.start()
                out, errors = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 0, errors
        assert json.loads(out)


def test_status_waits_for_the_links_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(["alpha", "beta"]) as cluster:
        cluster["alpha"].start()
        cluster["alpha"].wait(lambda status: status, "it answers")
        words = ["status", "--links", "--json", "--config", str(cluster["alpha"].config)]
        assert main([*words, "--wait", "1.2"]) == 4
        printed = capsys.readouterr()
        assert json.loads(printed.out)["peers"][0]["state"] == "connecting"
        assert "no link within 1.2 s: beta (" in printed.err
        with subprocess.Popen(
            [*RAMSTER, *words, "--wait", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stderr is not None
                said = process.stderr.readline()
                assert "waiting for the link to beta" in said and "60 s" in said
                cluster["beta"].start()
                out, errors = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 0, errors
        assert json.loads(out)["peers"][0]["state"] == "up"


def test_it_gives_up_when_its_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--wait", "1.2", "--socket", str(tmp_path / "control.sock")]) == 4
    waiting, failed = capsys.readouterr().err.splitlines()
    assert "up to 1.2 s" in waiting and "ramster node --config" in failed


def test_a_mistake_in_the_command_is_said_before_any_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["swap", "on", "--size", "4KiB", "--wait", "3600", "--socket", str(tmp_path / "control.sock")]) == 2
    assert "--size is 4KiB" in capsys.readouterr().err
