"""`ramster run`: the command's exit code, signals and files are its own; no cgroup stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ramster.cli import main
from ramster.errors import RamsterError
from ramster.frontswap import cgroups
from ramster.frontswap.run import PREFIX, Summary, explain
from ramster.testing.proxy import wait_until

RUN = [sys.executable, "-P", "-m", "ramster.cli", "run", "--memory", "64MiB", "--any-swap"]


def cannot() -> str:
    try:
        cgroups.Group(f"{PREFIX}-0").remove()
    except (RamsterError, OSError) as error:
        return str(error)
    return ""


WHY = cannot()
real = pytest.mark.skipif(bool(WHY), reason=WHY)


def ran(*command: str, options: tuple[str, ...] = (), given: str = "") -> subprocess.CompletedProcess[str]:
    """To its end, after which it has no group any more; others on this machine may have theirs."""
    words = [*RUN, *options, "--", *command]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, errors = process.communicate(given, timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in errors
    assert not list(cgroups.named(cgroups.name_for(PREFIX, process.pid)))
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


# --- pure ---------------------------------------------------------------------------------------------------------

V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"


def test_version_1_with_version_2_beside_it_is_found() -> None:
    found = cgroups.hierarchies(V1, "4:memory:/user\n3:cpuset:/\n0::/\n")
    assert found.memory == (1, Path("/sys/fs/cgroup/memory"), "/user")
    assert found.unified == (Path("/sys/fs/cgroup/unified"), "/")


def test_version_2_is_found_by_its_memory_controller(tmp_path: Path) -> None:
    mounts = f"cgroup2 {tmp_path} cgroup2 rw 0 0\n"
    assert cgroups.hierarchies(mounts, "0::/a.slice\n").memory is None
    (tmp_path / "cgroup.controllers").write_text("cpu io memory\n")
    assert cgroups.hierarchies(mounts, "0::/a.slice\n").memory == (2, tmp_path, "/a.slice")


def test_a_group_of_version_2_is_made_where_the_controller_is_given_on(tmp_path: Path) -> None:
    """Own group: has processes. Its slice: gives memory on, and is ours to write to."""
    own = tmp_path / "user.slice/app.slice/shell.scope"
    own.mkdir(parents=True)
    for path, control in ((tmp_path, "memory"), (own.parents[1], "memory"), (own.parent, "memory"), (own, "")):
        (path / "cgroup.subtree_control").write_text(control)
        (path / "cgroup.procs").touch()
    # A file system of ours makes no files in a new directory; the kernel's does.
    with pytest.raises(RamsterError, match="systemd-run --user --scope"):
        cgroups.Group("x", cgroups.Hierarchies((2, tmp_path, "/user.slice/app.slice/shell.scope"), None))
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize(("anon", "found"), [(40, True), (20, False)])
def test_a_group_without_room_for_what_it_has_in_swap_is_found(tmp_path: Path, anon: int, found: bool) -> None:
    for path, swapped in ((tmp_path / "a", 30), (tmp_path / "a/b", 30), (tmp_path / "c", 0)):
        path.mkdir()
        (path / "memory.stat").write_text(f"anon {anon}\nshmem 0\nfile 100\n")
        (path / "memory.swap.current").write_text(f"{swapped}\n")
        (path / "memory.max").write_text("64\n")
    where = cgroups.Hierarchies((2, tmp_path, "/"), None)
    assert list(cgroups.tight(where)) == ([(tmp_path / "a", 30, 64)] if found else [])


def test_without_a_memory_controller_it_says_what_to_mount() -> None:
    with pytest.raises(RamsterError, match="mount -t cgroup2"):
        cgroups.Group("x", cgroups.Hierarchies(None, None))


def test_tables_and_pressure_are_read() -> None:
    assert cgroups.table("pswpin 12\npswpout 34\noom_kill 1\nodd line here\n") == {
        "pswpin": 12,
        "pswpout": 34,
        "oom_kill": 1,
    }
    text = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=700\n"
    assert cgroups.stalled_us(text) == (1500, 700)
    assert cgroups.stalled_us("") is None


def test_the_summary_says_what_it_does_not_know() -> None:
    lines = "\n".join(explain(Summary(137, 1.5, 64 << 20, 64 << 20, None, False, 256, 128, True, None, None, 1, 2, 1)))
    assert "exit code 137" in lines and "peak 64.0 MiB of 64.0 MiB" in lines
    assert "256 out (1.0 MiB), 128 in (of the whole machine" in lines
    assert lines.count("not available on this kernel") == 2
    assert "1 kill" in lines and "2 processes" in lines


def test_where_the_swap_broke_more_memory_is_not_the_advice() -> None:
    summary = Summary(137, 1.5, 64 << 20, 64 << 20, None, False, 256, 128, True, None, None, 1, 0, 1, "swap0 is broken")
    text = "\n".join(explain(summary))
    assert "swap0 is broken" in text and "raise --memory" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("run --memory 1GiB", 2, "COMMAND"),
        ("run -- true", 2, "--memory"),
        ("run --memory 12XB -- true", 2, "--memory is '12XB'"),
        ("run --memory 4KiB -- true", 2, "1MiB or more"),
        ("run --memory 1GiB --socket /nonexistent/control.sock -- true", 5, "ramster swap on"),
    ],
)
def test_mistakes_get_one_message(arguments: str, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("ramster: ") and says in printed.err and printed.err.count("\n") == 1


def test_another_pid_namespaces_groups_are_not_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = cgroups.name_for(PREFIX, 1 << 30)  # above what a kernel numbers
    for name in (here, f"{PREFIX}-1-{1 << 30}"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(cgroups, "hierarchies", lambda: cgroups.Hierarchies((2, tmp_path, "/"), None))
    assert list(cgroups.stale(PREFIX)) == [tmp_path / here]


# --- real ---------------------------------------------------------------------------------------------------------


@real
def test_exit_code_and_files_are_the_commands_own() -> None:
    done = ran("sh", "-c", "cat; echo err >&2; exit 7", given="in and out", options=("--quiet",))
    assert (done.returncode, done.stdout) == (7, "in and out")
    assert done.stderr.endswith("err\n")


@real
def test_options_after_the_command_are_the_commands() -> None:
    done = subprocess.run([*RUN, "--quiet", "echo", "--json", "-n"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "--json -n\n"


@real
def test_a_signal_that_ends_it_is_passed_on_as_shells_do() -> None:
    assert ran("sh", "-c", "kill -9 $$").returncode == 137


@real
@pytest.mark.parametrize(("command", "code"), [("/nonexistent/program", 127), ("/etc/passwd", 126)])
def test_what_cannot_be_started_is_said(command: str, code: int) -> None:
    done = ran(command)
    assert done.returncode == code and f"cannot run {command!r}" in done.stderr


@real
def test_the_summary_is_json_too(tmp_path: Path) -> None:
    done = ran("true", options=("--json", str(tmp_path / "report"), "--quiet"))
    report = json.loads((tmp_path / "report").read_text())
    assert done.returncode == report["exit_code"] == 0
    assert 0 < report["peak_bytes"] <= report["limit_bytes"] == 64 << 20


@real
def test_it_is_in_its_group_before_its_first_instruction() -> None:
    done = ran("cat", "/proc/self/cgroup")
    assert f"/{PREFIX}-" in done.stdout


@real
def test_what_it_leaves_running_is_ended() -> None:
    done = ran("sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!")
    assert "1 process that the command had left running" in done.stderr
    wait_until(lambda: not Path(f"/proc/{done.stdout.strip()}").exists(), "it is gone", 10.0)


def start(*command: str) -> tuple[subprocess.Popen[str], list[Path]]:
    """A run whose command has written its first line, and its groups."""
    process = subprocess.Popen([*RUN, "--", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process, list(cgroups.named(cgroups.name_for(PREFIX, process.pid)))


@real
def test_signals_are_forwarded() -> None:
    process, _ = start("sh", "-c", "trap 'echo usr1; exit 3' USR1; echo ready; while :; do sleep 0.05; done")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("usr1\n", 3)


@real
def test_sigterm_ends_the_command_and_the_group() -> None:
    process, made = start("sh", "-c", "echo ready; exec sleep 300")
    assert made
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not any(path.exists() for path in made)


@real
def test_kill_9_leaves_no_group_and_no_process() -> None:
    process, made = start("sh", "-c", "echo ready; exec sleep 300")
    (child,) = {pid for path in made for pid in cgroups.processes(path)}
    process.kill()
    process.wait()
    wait_until(lambda: not any(path.exists() for path in made), "the guardian has removed the group", 15.0)
    wait_until(lambda: not Path(f"/proc/{child}").exists(), "the command is gone", 15.0)
    process.communicate()


@real
def test_ctrl_c_on_a_terminal_reaches_the_command_once() -> None:
    main_fd, terminal = os.openpty()
    script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.05; done"
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.close(main_fd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what it starts with &
            import fcntl
            import termios

            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            for number in (0, 1, 2):
                os.dup2(terminal, number)
            os.execv(sys.executable, [*RUN, "--quiet", "--", "sh", "-c", script])
        finally:
            os._exit(99)
    os.close(terminal)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while text not in seen and time.monotonic() < end:
            seen += os.read(main_fd, 4096).decode()
        assert text in seen

    try:
        until("ready")
        os.write(main_fd, b"\x03")
        until("caught")
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 143
        assert seen.count("caught") == 1
    finally:
        os.close(main_fd)
