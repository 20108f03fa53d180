"""The documents say what is true: links, code, commands, options and byte tables are compared with the product."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ramster.cli.app import app
from ramster.config.knobs import SECTIONS, knobs
from ramster.engine import layout
from ramster.engine.spill import SpillStatistics
from ramster.frontswap import messages
from ramster.wire import frames, hello

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIRE = ROOT / "docs" / "wire-protocol.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"

# Folders of somebody's own machine. What the product itself uses or names (/run, /dev, /tmp) is not among them.
PRIVATE_PLACES = re.compile(r"(?<![\w.~$}-])/(?:home|root|mnt|srv|opt|Users|usr/local|tmp/[a-z]+/)\S*")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> Iterator[str]:
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    """The fragments of a document's headings, as the usual renderers make them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def rows(path: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two head lines."""
    section = re.split(rf"^#+ {re.escape(heading)}$", path.read_text(), flags=re.MULTILINE)[1]
    table = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert table, f"no table below {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def commands(path: Path) -> list[str]:
    """Every shell line that runs ramster, as typed: continued lines joined, redirections and `&` cut off."""
    found = []
    for block in blocks(path, "sh", ""):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"^(?:\w+=\S+ )+", "", line.strip())
            if words.startswith("ramster "):
                found.append(re.split(r"\s(?:&|>|\||2>|#)", words + " ")[0].strip())
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"\w+:", target):
            continue
        file, _, fragment = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{name(path)} links to {target}, which does not exist"
        assert not fragment or fragment in anchors(there), f"{name(path)} links to {target}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_no_document_names_places_of_one_machine(path: Path) -> None:
    text = path.read_text()
    assert str(ROOT) + "/" not in text
    assert not PRIVATE_PLACES.findall(text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_tables_are_rectangular(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = table.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
        assert len(widths) == 1, f"{name(path)}: rows of different length in the table that begins {lines[0]!r}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_in_documents_compiles(path: Path) -> None:
    for body in blocks(path, "python"):
        ast.parse(body)


def test_the_readme_has_python_and_commands() -> None:
    assert list(blocks(README, "python"))
    assert len(commands(README)) >= 5


def objection(command: str) -> str | None:
    """What the command line's parser has against a command; None when it would run it. Nothing is run."""
    words = shlex.split(command)[1:]
    here: Any = typer.main.get_command(app)
    context: Any = None
    called = "ramster"
    try:
        while hasattr(here, "resolve_command"):
            context = here.make_context(called, words[:1], parent=context)
            called, here, words = here.resolve_command(context, words)
        here.make_context(called, list(words), parent=context)
    except Exception as error:  # the parser's errors; their class moved between typer's releases
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return None


@pytest.mark.parametrize(
    ("path", "command"), [(path, each) for path in DOCUMENTS for each in commands(path)], ids=lambda each: str(each)
)
def test_commands_in_documents_parse(path: Path, command: str) -> None:
    assert objection(command) is None, f"{name(path)}: `{command}`"


@pytest.mark.parametrize("wrong", ["ramster stats", "ramster status --jsn", "ramster node", "ramster cluster init"])
def test_a_wrong_command_would_be_noticed(wrong: str) -> None:
    assert objection(wrong)


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench", "asan", "docs", "clean"])
def test_make_targets_that_the_readme_names_exist(target: str) -> None:
    assert re.search(rf"make {target}\b|`{target}`", README.read_text())
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [README, WIRE, ARCHITECTURE], ids=name)
def test_knobs_in_documents_exist(path: Path) -> None:
    known = {section: {key for key, _, _ in knobs(kind)} for section, kind in SECTIONS.items()}
    for section, key in re.findall(r"`\[(\w+)\] (\w+)", path.read_text()):
        assert key in known[section], f"{name(path)} names [{section}] {key}"


@pytest.mark.parametrize("path", [README, ARCHITECTURE], ids=name)
def test_files_in_documents_exist(path: Path) -> None:
    source = ROOT / "src" / "ramster"
    for file in re.findall(r"`((?:\w+/)*\w+\.(?:pyx|pxd|py|sh|md|txt))[` ]", path.read_text()):
        places = [ROOT / file, source / file, source / "engine" / file]
        assert any(each.exists() for each in places) or file == "example.py", f"{name(path)} names {file}"


def test_functions_that_the_architecture_names_exist() -> None:
    names = re.findall(r"`(\w+\.pyx)`((?:,? (?:and )?`\w+`)+)", ARCHITECTURE.read_text())
    assert names
    for file, functions in names:
        text = (ROOT / "src" / "ramster" / "engine" / file).read_text()
        for each in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"\b{each}\(", text), f"{each} is not in {file}"


def test_the_frame_header_is_as_documented() -> None:
    documented = rows(WIRE, "Frame header")
    assert documented == [[str(each.offset), str(each.size), each.name, each.meaning] for each in frames.HEADER]
    assert f"a header of {frames.HEADER_BYTES} bytes" in WIRE.read_text()


def test_the_frame_types_are_as_documented() -> None:
    assert {row[1]: int(row[0]) for row in rows(WIRE, "Types")} == {each.name: each.value for each in frames.FrameType}


def test_the_hello_is_as_documented() -> None:
    handshake = WIRE.read_text().split("HELLO's body is a JSON object:")[1].split("\n\nUnknown keys")[0]
    assert re.findall(r"^\| `(\w+)` \|", handshake, re.MULTILINE) == list(hello.Hello.__struct_fields__)


def test_the_header_of_the_spill_file_is_as_documented() -> None:
    documented = rows(ROOT / "docs" / "spill.md", "SpillHeader")
    assert documented == [
        [str(offset), str(size), each.name, each.meaning] for offset, size, each in layout.SPILL_HEADER.rows()
    ]
    fields = {name for row in rows(ROOT / "docs" / "spill.md", "What `ramster status --json` says") for name in row[:1]}
    named = {each.strip("` ") for field in fields for each in field.split(",")}
    assert {field.name for field in dataclasses.fields(SpillStatistics)} <= named


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text()
    decisions = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    for number, path in enumerate(decisions, 1):
        assert path.name.startswith(f"{number:04}-")
        assert f"({path.name})" in index
        text = path.read_text()
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequence"]


def test_every_document_can_be_found_from_the_readme() -> None:
    seen, todo = set[Path](), [README]
    while todo:
        path = todo.pop()
        if path in seen or path.suffix != ".md":
            continue
        seen.add(path)
        targets = re.findall(r"\]\(([^)#\s:]+)[^)]*\)", without_code(path.read_text()))
        todo.extend((path.parent / target).resolve() for target in targets)
    assert {path.resolve() for path in DOCUMENTS} <= {path.resolve() for path in seen}


def test_units_that_documents_name_are_installed() -> None:
    units = {path.name.removesuffix(".service") for path in (ROOT / "packaging").rglob("*.service")}
    named = [each for path in DOCUMENTS for each in re.findall(r"journalctl -u ([\w@.-]+)", path.read_text())]
    assert named and {each.removesuffix(".service") for each in named} <= units


def test_what_a_regions_name_may_be_is_documented() -> None:
    rule = messages.NAME_RULE.replace("[red]", "`[red]`")
    assert rule in (ROOT / "docs" / "regions.md").read_text()
