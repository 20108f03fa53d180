"""`ramster export` against a real node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramster.cli import main
from ramster.testing.cluster import Cluster
from ramster.testing.nbd_handshake import Dialled


@pytest.fixture(scope="module")
def socket() -> Iterator[str]:
    with Cluster(["alpha"]) as cluster:
        yield str(cluster.start()["alpha"].control.path)


@pytest.fixture
def export(socket: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["export", *words, "--socket", socket])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_create_prints_a_uri_and_nothing_else(export: Any, socket: str) -> None:
    code, out, err = export("create", "vm", "--size", "1MiB")
    path = socket.replace("control.sock", "nbd.sock")
    assert (code, out, err) == (0, f"nbd+unix:///vm?socket={path}\n", "")
    assert export("rm", "vm")[:2] == (0, "removed the export vm\n")


def test_ls_shows_each(export: Any) -> None:
    for name in ("one", "two"):
        export("create", name, "--size", "1MiB")
    code, out, _ = export("ls")
    assert code == 0 and "one" in out and out.count("nbd+unix:///") == 2
    found = json.loads(export("ls", "--json")[1])["exports"]
    assert [(each["name"], each["size_bytes"]) for each in found] == [("one", 1 << 20), ("two", 1 << 20)]
    for name in ("one", "two"):
        assert json.loads(export("rm", name, "--json")[1]) == {"removed": name}


def test_an_allow_list_is_kept(export: Any) -> None:
    made = json.loads(export("create", "w", "--size", "1MiB", "--allow", "web", "--allow", "backup", "--json")[1])
    assert made["allow"] == ["web", "backup"]
    assert json.loads(export("ls", "--json")[1])["exports"][0]["allow"] == ["web", "backup"]
    export("rm", "w")
    assert export("create", "w", "--size", "1MiB", "--allow", "web")[2].startswith("for: web; ")
    export("rm", "w")
    code, out, err = export("create", "w", "--size", "1MiB", "--allow", "We b")
    assert (code, out) == (2, "") and "'We b' is no name of a certificate" in err


def test_set_changes_who_may_use_it(export: Any) -> None:
    export("create", "w", "--size", "1MiB", "--allow", "web")
    assert json.loads(export("set", "w", "--allow", "backup", "--allow", "web", "--json")[1])["allow"] == [
        "backup",
        "web",
    ]
    assert json.loads(export("set", "w", "--read-only", "--json")[1])["allow"] == ["backup", "web"]
    assert "backup, web" in export("ls")[1]
    assert json.loads(export("set", "w", "--allow-all", "--json")[1])["allow"] == []
    assert "every client" in export("ls")[1]
    code, out, err = export("set", "w", "--allow", "web")
    assert (code, out.count("\n")) == (0, 1)
    assert err == "for: web; over TCP, clients whose certificate has another name are refused\n"
    assert export("set", "w", "--allow-all")[2] == "for: every client\n"
    assert export("set", "w", "--read-write")[2] == ""
    code, out, err = export("set", "w", "--allow", "web", "--allow-all")
    assert (code, out) == (2, "") and "--allow and --allow-all both" in err
    code, out, err = export("set", "w")
    assert (code, out) == (2, "") and "--allow-all" in err
    export("rm", "w")


def test_it_grows_up_to_its_limit(export: Any) -> None:
    made = json.loads(export("create", "g", "--size", "1MiB", "--max-size", "2MiB", "--read-only", "--json")[1])
    assert (made["size_bytes"], made["max_bytes"], made["read_only"]) == (1 << 20, 2 << 20, True)
    found = json.loads(export("set", "g", "--size", "2MiB", "--json")[1])
    assert (found["size_bytes"], found["read_only"]) == (2 << 20, True)
    code, _, err = export("set", "g", "--size", "3MiB", "--read-write")
    assert code == 2 and "may grow to 2 MiB, not to 3 MiB;" in err
    assert json.loads(export("ls", "--json")[1])["exports"][0]["read_only"]
    export("rm", "g")


def test_it_turns_read_only_and_back_while_nobody_uses_it(export: Any, socket: str) -> None:
    made = export("create", "image", "--size", "1MiB")[1]
    for words, read_only in (("--read-only", True), ("--read-only", True), ("--read-write", False)):
        assert export("set", "image", words) == (0, made, "")
        assert json.loads(export("ls", "--json")[1])["exports"][0]["read_only"] is read_only
        assert ("(read-only)" in export("ls")[1]) is read_only
    with Dialled(Path(socket).with_name("nbd.sock")) as dialled:
        dialled.go("image")
        code, out, err = export("set", "image", "--read-only")
        assert (code, out) == (5, "") and "in use by 1 connection (process" in err
        assert export("set", "image", "--read-write")[0] == 0  # as it is
    export("rm", "image", "--force")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("create", "vm"), 2, "--size"),
        (("create", "vm", "--size", "12XB"), 2, "--size is '12XB'"),
        (("create", "vm", "--size", "1MiB", "--max-size", "x"), 2, "--max-size is 'x'"),
        (("create", "vm", "--size", "0"), 2, "size"),
        (("create", "V/M", "--size", "1MiB"), 2, "V/M"),
        (("rm", "nothing"), 2, "nothing"),
        (("set", "nothing", "--read-only"), 2, "there is no export 'nothing'"),
        (("set", "vm", "--size", "12XB"), 2, "--size is '12XB'"),
    ],
)
def test_mistakes_get_one_message(export: Any, words: tuple[str, ...], code: int, says: str) -> None:
    got, out, err = export(*words)
    assert (got, out) == (code, "")
    assert err.startswith("ramster: ") and says in err and err.count("\n") == 1


def test_a_second_one_of_the_same_name_is_refused(export: Any) -> None:
    export("create", "vm", "--size", "1MiB")
    code, _, err = export("create", "vm", "--size", "1MiB")
    assert code == 5 and "vm already" in err
    export("rm", "vm")
