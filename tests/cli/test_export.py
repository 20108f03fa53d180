"""`ramster export` against a real node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ramster.cli import main
from ramster.testing.cluster import Cluster


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


def test_it_grows_up_to_its_limit(export: Any) -> None:
    made = json.loads(export("create", "g", "--size", "1MiB", "--max-size", "2MiB", "--read-only", "--json")[1])
    assert (made["size_bytes"], made["max_bytes"], made["read_only"]) == (1 << 20, 2 << 20, True)
    assert json.loads(export("resize", "g", "--size", "2MiB", "--json")[1])["size_bytes"] == 2 << 20
    code, _, err = export("resize", "g", "--size", "3MiB")
    assert code == 2 and "2097152" in err
    export("rm", "g")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("create", "vm"), 2, "--size"),
        (("create", "vm", "--size", "12XB"), 2, "--size is '12XB'"),
        (("create", "vm", "--size", "1MiB", "--max-size", "x"), 2, "--max-size is 'x'"),
        (("create", "vm", "--size", "0"), 2, "size"),
        (("create", "V/M", "--size", "1MiB"), 2, "V/M"),
        (("rm", "nothing"), 2, "nothing"),
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
