"""Every command as a user meets it: help, mistakes, exit codes, files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ramster.cli import app, main
from ramster.config import load
from ramster.constants import NODE_NUMBER_MAX
from ramster.errors import every_error
from ramster.testing.cluster import Cluster


def commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """(words, whether it is a group) of everything that the parser knows."""
    command = typer.main.get_command(app.app) if command is None else command
    below = getattr(command, "commands", {})
    yield " ".join(words), bool(below)
    for name, each in below.items():
        yield from commands(each, (*words, name))


GROUPS = [words for words, group in commands() if group]
COMMANDS = [words for words, _ in commands()]
DOCS = ("cli", "demo", "swap", "run")
ROOT = Path(__file__).parents[2]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*command.split(), "--help"]) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Usage: {' '.join(['ramster', *command.split()])}" in help_of(command, capsys)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in GROUPS])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"ramster {command}" in help_of(command, capsys).split("Examples:")[1]


def test_the_tree_has_been_walked_to_its_leaves() -> None:
    assert {"", "export", "swap", "cluster", "config"} == set(GROUPS)
    assert {"status", "export set", "swap on", "cluster renew"} < set(COMMANDS)


def test_docs_list_every_exit_code() -> None:
    section = (ROOT / "docs/cli.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    own = {0, app.EXIT_USAGE, app.EXIT_INTERNAL, app.EXIT_OUTPUT, app.EXIT_INTERRUPTED, app.EXIT_PIPE}
    errors = {error.exit_code for error in every_error()}
    assert listed == sorted(own | errors)
    assert f"Codes {min(errors)} to {max(errors)} belong" in section


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_name_each_command_and_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    docs = "".join((ROOT / f"docs/{name}.md").read_text() for name in DOCS)
    assert not command or f"ramster {command}" in docs
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_of(command, capsys)))
    assert {option for option in options if f"`{option}" not in docs} == set()


def test_docs_name_no_option_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    docs = "".join((ROOT / f"docs/{name}.md").read_text() for name in DOCS)
    real = set(re.findall(r"--[a-z][a-z-]+", "".join(help_of(command, capsys) for command in COMMANDS)))
    assert set(re.findall(r"`(--[a-z][a-z-]+)", docs)) - real == set()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("bogus", 2, "bogus"),
        ("demo --bogus", 2, "--bogus"),
        ("demo --size 12XB", 2, "--size is '12XB'"),
        ("demo --size 1MiB", 2, "at least 4 MiB"),
        ("demo --size 64MiB --resident 64MiB", 2, "--resident"),
        ("demo --local 1MiB", 2, "--local"),
        ("demo --nodes 1", 2, "--nodes is 1"),
        ("demo --seed -1", 2, "--seed is -1"),
        ("demo --file /nonexistent", 2, "/nonexistent"),
        ("demo --file /", 2, "not a regular file"),
        ("demo --file /dev/null", 2, "not a regular file"),
        ("node", 2, "--config"),
        ("node --config /nonexistent.toml", 3, "/nonexistent.toml"),
        ("config check /nonexistent.toml", 3, "/nonexistent.toml"),
        ("status --wait 0 --socket /nonexistent/control.sock", 4, "ramster node --config"),
        ("status --socket a --config b", 2, "--socket and --config"),
        ("export create a --size 1MiB --wait 0 --socket /nonexistent/control.sock", 4, "ramster node --config"),
        ("export set a", 2, "give --size, --read-only, --read-write, --allow or --allow-all"),
        ("export set a --read-only --wait 0 --socket /nonexistent/control.sock", 4, "ramster node --config"),
        ("stop --socket /nonexistent/control.sock", 4, "ramster node --config"),
        ("cluster init", 2, "--directory"),
        ("cluster client", 2, "NAME"),
        ("cluster client web", 2, "--directory"),
        ("cluster client web --directory /nonexistent", 11, "/nonexistent/ca.crt"),
        ("cluster renew", 2, "NODE"),
        ("cluster renew alpha", 2, "--directory"),
        ("cluster renew alpha --directory /nonexistent", 11, "/nonexistent/ca.crt"),
    ],
)
def test_mistakes_get_one_message_and_a_stable_code(
    arguments: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ramster: ") and says in printed.err
    assert "Traceback" not in printed.err and printed.err.count("\n") == 1


def test_empty_file_for_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    assert main(["demo", "--file", str(tmp_path / "empty")]) == 2
    assert "is empty" in capsys.readouterr().err


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "Usage: ramster" in printed.out + printed.err


def test_node_refuses_to_run_without_assertions(tmp_path: Path) -> None:
    ended = run_python("-O", "-m", "ramster.cli", "node", "--config", str(tmp_path / "none.toml"))
    assert ended.returncode == 2
    assert "assertions" in ended.stderr and "Traceback" not in ended.stderr


def completed(words: str) -> list[str]:
    """What a shell would offer for the last of the words."""
    ended = run_python(
        "-c",
        "import sys; from ramster.cli import main; sys.exit(main())",
        _RAMSTER_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
    )
    assert ended.stderr == ""
    return ended.stdout.split()


def test_shell_completion_lists_commands() -> None:
    assert completed("ramster st") == ["status", "stop"]


def test_shell_completion_lists_options_of_a_command_in_a_group() -> None:
    assert completed("ramster swap on --acc") == ["--accept-loss"]


def test_shell_completion_lists_exports_of_the_node_that_is_named() -> None:
    with Cluster(["alpha"]) as cluster:
        control = cluster.start()["alpha"].control
        for name in ("vm", "vault", "data"):
            control.create_export(name, 1 << 20)
        for command in ("export rm", "export set"):
            assert completed(f"ramster {command} --socket {control.path} v") == ["vault", "vm"]
        assert completed(f"ramster export create --socket {control.path} v") == []  # a new name is one's own


def test_shell_completion_lists_swaps_and_nodes(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    for name in ("swap/fast.json", "swap/slow.json", "ca.crt", "alpha.crt", "alpha.key"):
        (tmp_path / name).touch()
    assert completed(f"ramster swap off --socket {tmp_path}/control.sock f") == ["fast"]
    assert completed(f"ramster cluster renew --directory {tmp_path} a") == ["alpha"]


@pytest.mark.parametrize(
    "words",
    [
        "export rm --socket /nonexistent/control.sock v",
        "export rm --config /nonexistent.toml v",
        "swap off --socket /nonexistent/control.sock s",
        "cluster renew --directory /nonexistent a",
        "cluster renew a",
    ],
)
def test_shell_completion_offers_nothing_where_there_is_nobody_to_ask(words: str) -> None:
    assert completed(f"ramster {words}") == []


def test_broken_pipe_is_silent() -> None:
    command = f"{sys.executable} -m ramster.cli config list | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    assert ended.stdout.strip() in ("0", "141")  # the pipe's buffer may swallow it all


@pytest.mark.parametrize("words", ["--version", "--help", "config list", "config --help", "cluster init --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line_and_a_code_of_its_own(words: str, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "ramster.cli", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (ended.returncode, ended.stderr) == (
        app.EXIT_OUTPUT,
        "ramster: cannot write the output: No space left on device\n",
    )


def test_nobody_to_write_to_at_all_ends_as_the_command_does() -> None:
    for command, code in (("config list >&-", 0), ("config list > /dev/full 2>&1", app.EXIT_OUTPUT)):
        words = f"{shlex.quote(sys.executable)} -m ramster.cli {command}"
        ended = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def init(directory: Path, nodes: str, cluster: str = "lab") -> int:
    return main(["cluster", "init", "--directory", str(directory), "--cluster", cluster, "--nodes", nodes])


def test_cluster_init_makes_configurations_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "lab", "alpha=192.0.2.1:7777, beta=[2001:db8::2]:7778,gamma=192.0.2.1:7779") == 0
    printed = capsys.readouterr().out
    for name in ("alpha", "beta", "gamma"):
        path = tmp_path / "lab" / f"{name}.toml"
        assert f"ramster node --config {path}" in printed
        assert main(["config", "check", str(path)]) == 0
        assert "fine" in capsys.readouterr().out
    alpha, beta, gamma = (load(tmp_path / "lab" / f"{name}.toml") for name in ("alpha", "beta", "gamma"))
    assert [str(peer.address) for peer in alpha.peers] == ["[2001:db8::2]:7778", "192.0.2.1:7779"]
    assert str(beta.links.listen) == "[2001:db8::2]:7778"
    assert len({alpha.node.number, beta.node.number, gamma.node.number}) == 3
    # alpha and gamma share a machine and must not share sockets.
    assert len({alpha.node.run_dir, gamma.node.run_dir}) == 2
    # Copied elsewhere as a whole, it still loads: nothing in it is absolute.
    assert str(tmp_path) not in (tmp_path / "lab/alpha.toml").read_text()
    assert (tmp_path / "lab/ca.key").stat().st_mode & 0o077 == 0


def test_cluster_init_makes_a_single_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "one", "alpha=127.0.0.1:7777") == 0
    assert capsys.readouterr().out.count("ramster node --config") == 1
    assert main(["config", "check", str(tmp_path / "one/alpha.toml")]) == 0
    assert not load(tmp_path / "one/alpha.toml").peers


def test_paths_are_printed_as_a_shell_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "it's $HOME; a lab"
    assert init(odd, "alpha=192.0.2.1:1,beta=192.0.2.2:1") == 0
    first, *commands = capsys.readouterr().out.splitlines()
    assert shlex.split(first.partition(" in ")[2].rpartition(";")[0]) == [str(odd)]
    assert [shlex.split(line) for line in commands] == [
        ["ramster", "node", "--config", str(odd / f"{name}.toml")] for name in ("alpha", "beta")
    ]
    assert main(["cluster", "client", "web", "--directory", str(odd)]) == 0
    assert f"made {shlex.quote(str(odd / 'clients/web'))} for" in capsys.readouterr().out
    for words, says in (([], "stays"), (["--address", "storage"], "is new")):
        assert main(["cluster", "renew", "beta", "--directory", str(odd), *words]) == 0
        assert capsys.readouterr().out.startswith(f"{shlex.quote(str(odd / 'beta.crt'))} {says}")


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ("alpha", "name=address:port"),
        (",".join(f"n{n}=192.0.2.1:{n}" for n in range(1, NODE_NUMBER_MAX + 2)), f"1 to {NODE_NUMBER_MAX}"),
        ("alpha=192.0.2.1:1,alpha=192.0.2.2:1", "twice"),
        ("alpha=192.0.2.1:1,beta=192.0.2.1:1", "two nodes"),
        ("alpha=192.0.2.1:0,beta=192.0.2.2:1", "192.0.2.1:0"),
        ("alpha=192.0.2.1:65536,beta=192.0.2.2:1", "65535"),
        ("alpha=192.0.2.1,beta=192.0.2.2:1", "192.0.2.1"),
        ("alpha=::1:5,beta=192.0.2.2:1", "[IPv6 address]"),
        ("alpha=[192.0.2.1]:5,beta=192.0.2.2:1", "IPv4"),
        ("Alpha=192.0.2.1:1,beta=192.0.2.2:1", "'Alpha'"),
        ("ca=192.0.2.1:1,beta=192.0.2.2:1", "'ca'"),
    ],
)
def test_cluster_init_refuses(nodes: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "lab", nodes) in (2, 11)
    assert says in capsys.readouterr().err
    assert not (tmp_path / "lab").exists() or not any((tmp_path / "lab").iterdir())


def test_cluster_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = "alpha=192.0.2.1:1,beta=192.0.2.2:1"
    assert init(tmp_path / "lab", nodes) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "lab").iterdir()}
    assert init(tmp_path / "lab", nodes) == 2
    assert "not empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "lab").iterdir()} == before


def test_cluster_client_makes_a_folder_to_be_handed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path, "alpha=127.0.0.1:7001,beta=127.0.0.1:7002") == 0
    capsys.readouterr()
    command = ["cluster", "client", "web", "--directory", str(tmp_path)]
    assert main(command) == 0
    folder = tmp_path / "clients" / "web"
    assert f"made {folder} for client web; valid until 20" in capsys.readouterr().out
    assert (folder / "client-key.pem").stat().st_mode & 0o077 == 0
    assert main(command) == 11
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_cluster_renew_says_what_the_certificate_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path, "alpha=192.0.2.1:1,beta=[2001:db8::2]:1") == 0
    renew = ["cluster", "renew", "beta", "--directory", str(tmp_path)]
    path = tmp_path / "beta.crt"
    for words, says in (
        ([], f"{path} stays as it is: for beta, 2001:db8::2; valid until 20"),
        (["--address", "storage"], f"{path} is new: for beta, storage; valid until 20"),
        (["--address", "storage"], f"{path} stays as it is: for beta, storage; valid until 20"),
    ):
        capsys.readouterr()
        assert main([*renew, *words]) == 0
        out = capsys.readouterr().out
        assert out.startswith(says)
        assert ("no longer for 2001:db8::2\ncopy it" in out) == ("is new" in says)
    assert main([*renew, "--address", "192.0.2.2:10809"]) == 2
    assert "'192.0.2.2:10809' is no address" in capsys.readouterr().err
    assert main(["config", "check", str(tmp_path / "beta.toml")]) == 0


def test_config_check_shows_line_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[node]\nname = "alpha"\nnumber = 1\n\n[arena]\nsise = "64MiB"\n')
    assert main(["config", "check", str(path)]) == 3
    printed = capsys.readouterr().err
    assert f"{path}:6" in printed and "sise" in printed and "size" in printed


def test_config_check_looks_at_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = "alpha=192.0.2.1:1,beta=192.0.2.2:1"
    assert init(tmp_path / "one", nodes) == 0
    assert init(tmp_path / "two", nodes, cluster="other") == 0
    (tmp_path / "one/alpha.crt").write_bytes((tmp_path / "two/alpha.crt").read_bytes())
    assert main(["config", "check", str(tmp_path / "one/alpha.toml")]) == 11
    assert "other" in capsys.readouterr().err


def test_config_list_shows_each_knob(capsys: pytest.CaptureFixture[str]) -> None:
    from ramster.config.knobs import SECTIONS, knobs

    assert main(["config", "list"]) == 0
    printed = capsys.readouterr().out
    for section, kind in SECTIONS.items():
        assert f"[{section}]" in printed
        for key, _, knob in knobs(kind):
            assert f"  {key} = " in printed and knob.help in printed


def test_toml_values_survive_quoting(tmp_path: Path) -> None:
    from ramster.cli.cluster_files import create, parse_nodes

    odd = 'a "quoted"\\ \n value'
    places = parse_nodes("alpha=192.0.2.1:1,beta=192.0.2.2:1")
    path, _ = create(tmp_path / "lab", "lab", places, extra={"alpha": {"arena": {"path": odd, "lock": False}}})
    assert tomllib.loads(path.read_text())["arena"] == {"path": odd, "lock": False}
