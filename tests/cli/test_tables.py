"""What is printed for people: each word whole, at any width of a terminal and through a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.cli import main
from ramster.cli.commands.options import say
from ramster.cli.doctor import Check
from ramster.cli.render import export_table, losses, status_tables
from ramster.cli.tables import Part, Table, lines, show
from ramster.config.units import counted

WIDTHS = (40, 80, 200, None)
ADDRESS = "[fd00:1234:5678:9abc:def0:1234:5678:9abc]:7777"
REASON = "the certificate /etc/ramster/lab [old]/alpha.crt expired on 2026-01-02 :warning: " + "x" * 120
STATUS: dict[str, Any] = {
    "name": "alpha",
    "guard": {
        "io_flusher": {"state": "refused", "detail": "PR_SET_IO_FLUSHER needs CAP_SYS_RESOURCE" + " or more" * 9}
    },
    "peers": [
        {"name": "beta", "state": "down", "reason": REASON, "address": ADDRESS},
        {"name": "gamma", "state": "up", "address": "192.0.2.3:7777"},
    ],
    "regions": [{"name": "r" * 63, "pid": 4194304, "thrashing": True, "enough_pages": 4096}],
    "exports": [{"name": "e" * 63, "read_only": True, "size_bytes": 1 << 40}],
    "lend": {"bytes": 1 << 30, "frames_total": 1024, "owners": {"beta": 3}},
}

# What can be printed; nothing else is left as it is.
printable = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
cells = st.text(printable, max_size=60)


def plain(part: Part, width: int | None) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines(part, width)]


def table_of(rows: list[list[str]], title: str = "") -> Table:
    table = Table(title, [f"column {number}" for number in range(len(rows[0]))])
    for row in rows:
        table.add(*row)
    return table


def test_whose_bytes_failed_their_check_stands_beside_how_many_reads_met_them() -> None:
    def said(**more: Any) -> list[str]:
        status = {"counters": {"pages_damaged": 7}, **more}
        printed = [line for part in status_tables(status) for line in plain(part, None)]
        return [" ".join(line.split()) for line in printed if "damaged" in line]

    assert said() == ["reads of damaged pages 7"]
    peers = [{"name": "beta", "damaged": 5}, {"name": "gamma", "damaged": 0}, {"name": "delta", "damaged": 1}]
    assert said(peers=peers) == ["reads of damaged pages 7 (5 from beta, 1 from delta)"]


@given(
    title=cells,
    heads=st.booleans(),
    left=st.integers(0, 2),
    rows=st.lists(st.tuples(cells, cells), max_size=5),
    width=st.sampled_from(WIDTHS),
)
def test_each_value_stands_whole_on_one_line(
    title: str, heads: bool, left: int, rows: list[tuple[str, str]], width: int | None
) -> None:
    table = Table(title, ("name", "value"), left=left, heads=heads)
    for row in rows:
        table.add(*row)
    printed = plain(table, width)
    for text in (title, *(text for row in rows for text in row)):
        assert any(text in line for line in printed), text
    assert printed[-1] == ""


@given(rows=st.lists(st.tuples(*[st.text("ab 1", max_size=12)] * 4), min_size=1, max_size=5), width=st.integers(1, 60))
def test_a_terminal_gets_a_table_exactly_where_it_fits(rows: list[tuple[str, ...]], width: int) -> None:
    table = table_of([list(row) for row in rows])
    widths = [max(len("column 0"), *(len(row[number]) for row in rows)) for number in range(4)]
    fits = sum(widths) + 3 * 2 <= width
    printed = plain(table, width)
    assert (printed == plain(table, None)) == fits
    if fits:
        assert len(printed) == len(rows) + 2 and all(len(line) <= width for line in printed)


def test_a_table_and_its_paragraphs() -> None:
    table = Table("Peers", ("name", "link", "credit"), left=2)
    table.add("beta", ("down", "red"), "1")
    table.add("gamma", "", "23")
    assert plain(table, 20) == ["Peers", "name   link  credit", "beta   down       1", "gamma            23", ""]
    assert plain(table, 19) == plain(table, None) == plain(table, 20)
    assert plain(table, 18) == [
        *("Peers", "name: beta", "  link: down", "  credit: 1"),
        *("", "name: gamma", "  credit: 23", ""),
    ]
    pairs = Table("Memory", ("", ""), heads=False)
    pairs.add("arena", "1 MiB")
    pairs.add("puts", "7")
    assert plain(pairs, 12) == ["Memory", "arena  1 MiB", "puts       7", ""]
    assert plain(pairs, 11) == ["Memory", "arena: 1 MiB", "puts: 7", ""]


def test_no_cell_moves_the_cursor_or_begins_a_line() -> None:
    table = table_of([["a\nb", "\x1b[2Jc\u202ed"]])
    for width in (10, None):
        assert [line for line in plain(table, width) if not line.isprintable()] == []
    assert "\\x1b[2Jc\\u202ed" in plain(table, None)[1]


HOSTILE = "[red]x[/red] :smile: \x1b[2J\x9b\u202e"
SHOWN = "[red]x[/red] :smile: \\x1b[2J\\x9b\\u202e"


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(Table(HOSTILE, ("name",), rows=[("a",)]), id="title"),
        pytest.param(Table("", ("name", "why"), rows=[("a", (HOSTILE, "red"))]), id="cell"),
        pytest.param((HOSTILE, "yellow"), id="line"),
    ],
)
def test_what_others_named_is_shown_as_it_is_and_does_nothing(part: Part, capsys: pytest.CaptureFixture[str]) -> None:
    show(part)
    assert SHOWN in capsys.readouterr().out


def test_nothing_that_others_say_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    losses_said = losses({"regions": [{"name": HOSTILE, "pid": 1, "pages": 1}], "foreign": {HOSTILE: 1}})
    say(f"node alpha was not stopped:\n{losses_said[0]}\n{losses_said[1]}")
    assert main(["status", "--wait", "0", "--socket", f"/nonexistent/{HOSTILE}"]) == 4
    printed = capsys.readouterr().err
    assert printed.count(SHOWN) >= 3 and printed.isascii() and "\x1b" not in printed
    assert main(["status", "--wait", "0", "--socket", "/nonexistent/\udcff"]) == 4  # bytes that are no text
    assert "\\udcff" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "said"), [(0, "0 pages"), (1, "1 page"), (2, "2 pages"), (1000, "1,000 pages")])
def test_one_is_not_many(count: int, said: str) -> None:
    assert counted(count, "page", ",") == said


def test_a_status_of_single_things(capsys: pytest.CaptureFixture[str]) -> None:
    spill = {"bytes_total": 1 << 20, "mirror": True, "mirrored": 1, "pages": 1, "unmirrored": 1, "pages_unmirrored": 1}
    show(*status_tables({**STATUS, "spill": spill}))
    out = capsys.readouterr().out
    assert "1 segment mirrored, 1 page here alone" in out and "1 segment, 1 page: lost" in out
    assert losses({"exports": [{"name": "vm", "pages": 1, "connections": 1}]}) == [
        "4 KiB stored in export vm, which 1 connection uses"
    ]


def test_a_swap_that_nobody_serves_is_said_below_the_exports(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "swap0", "swap": True, "deserted_s": 75.2},
        {"name": "swap1", "swap": True, "deserted_s": 0.0},
        {"name": "vm", "swap": False, "deserted_s": 9.0},
    ]
    show(*export_table(rows))
    out = capsys.readouterr().out
    assert "swaps on export swap0 and has not been connected to it for 1 min" in out
    assert out.count("swaps on export") == 1


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("", ("a", "b")).add("x")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_status_is_whole_at_any_width(width: int | None) -> None:
    printed = [line for part in status_tables(STATUS) for line in plain(part, width)]
    detail = STATUS["guard"]["io_flusher"]["detail"]
    for text in (ADDRESS, f"down ({REASON})", detail, "r" * 63, "e" * 63 + " (read-only)", "4194304", "is thrashing"):
        assert any(text in line for line in printed), text


def on_a_terminal(code: str, columns: int) -> str:
    """What a program writes to a terminal of so many columns, without its colours."""
    ours, its = pty.openpty()
    try:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        command = [sys.executable, "-P", "-c", code]
        started = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env={**environment, "TERM": "xterm"})
    finally:
        os.close(its)
    written = b""
    deadline = time.monotonic() + 60
    try:
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                some = os.read(ours, 65536)
            except OSError:  # the other end is closed
                some = b""
            if not some:
                break
            written += some
        assert started.wait(max(0.1, deadline - time.monotonic())) == 0, written
    finally:
        os.close(ours)
        if started.poll() is None:
            started.kill()
            started.wait()
    return re.sub(r"\x1b\[[0-9;]*m", "", written.decode()).replace("\r\n", "\n")


PROGRAM = f"""
from ramster.cli.tables import show
from ramster.cli.render import status_tables
show(*status_tables({STATUS!r}))
"""


@pytest.mark.parametrize("columns", [40, 80, 200, 0])
def test_a_terminal_is_asked_for_its_width(columns: int) -> None:
    expected = [line for part in status_tables(STATUS) for line in plain(part, columns or None)]
    assert on_a_terminal(PROGRAM, columns).splitlines() == expected


@pytest.mark.parametrize("columns", ["", "40"])
def test_a_pipe_has_no_width(columns: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": columns},
    )
    assert done.stdout.splitlines() == [line for part in status_tables(STATUS) for line in plain(part, None)]


def test_a_pipe_that_is_closed_ends_it_quietly() -> None:
    many = "from ramster.cli import app, tables; app._command = lambda: lambda **_: tables.show(*['x' * 99] * 9999)"
    code = f"import sys; {many}; sys.exit(app.main())"
    command = f'"{sys.executable}" -P -c "$1" | true; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", command, "_", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("141\n", "")


def test_exports_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    show(*export_table(STATUS["exports"]))
    assert capsys.readouterr().out.count("e" * 63 + " (read-only)") == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_doctor_advises_is_one_line(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ramster.cli import doctor, main, tables

    advice = "run it as root, or with `AmbientCapabilities=CAP_SYS_RESOURCE` in the unit, " * 3 + "then look again"
    found = [Check("io_flusher", "refused", "CAP_SYS_RESOURCE is missing", advice), Check("kernel", "ok", "6.12")]
    monkeypatch.setattr(doctor, "checks", lambda: found)
    monkeypatch.setattr(tables, "_width", lambda: width)
    assert main(["doctor"]) == 0
    assert any(line.endswith(advice) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_a_swap_is_whole(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ramster.cli import tables
    from ramster.cli.commands.swap import _tables

    each: dict[str, Any] = {
        "name": "s" * 63,
        "state": "half-done",
        "device": "/dev/loop1234567",
        "way": "bridge",
        "direct_io": False,
    }
    each |= {"size_bytes": 1 << 40, "used_bytes": 1 << 30, "priority": 32767, "export": None, "why": REASON}
    other: dict[str, Any] = {
        "device": "/var/lib/a very long path/to the/swapfile-of-this-machine",
        "kind": "file",
        "priority": -2,
    }
    other |= {"size_bytes": 1 << 30, "used_bytes": 0}
    monkeypatch.setattr(tables, "_width", lambda: width)
    _tables({"node": True, "swaps": [each], "others": [other], "zswap": False})
    printed = capsys.readouterr()
    for text in ("s" * 63, each["device"], other["device"], "bridge (through the page cache)", "1048576 MiB", "32767"):
        assert any(text in line for line in printed.out.splitlines()), text
    assert REASON in printed.err


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ({}, ""),
        ({"full": 0, "refused": 0}, ""),
        (
            {"full": 1},
            "region solver is full: neither arena, lenders nor spill file take a page of it, and what it writes",
        ),
        (
            {"full": True, "refused": 1},
            "waits; 1 fault found no room in time and gave SIGBUS so far; enlarge [arena] size",
        ),
        ({"full": 0, "refused": 2}, "region solver was full: 2 faults found no room in time and gave SIGBUS so far"),
    ],
)
def test_a_full_region_is_said(region: dict[str, Any], said: str) -> None:
    parts = status_tables({"regions": [{"name": "solver", "pages": 100, **region}]})
    text = "\n".join(line for part in parts for line in plain(part, None))
    assert said in text and (said or "full" not in text), text


def test_read_errors_of_the_spill_file_are_said() -> None:
    def text(spill: dict[str, Any]) -> str:
        return "\n".join(line for part in status_tables({"spill": spill}) for line in plain(part, None))

    assert "read errors" not in text({"read_errors": 0, "last_error": "x"})
    assert re.search(r"spill read errors +3: .*\(EIO\)", text({"read_errors": 3, "last_error": "EIO"}))
