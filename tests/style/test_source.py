"""What matters about style and can be checked without running anything."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ramster"
PYTHON = sorted(SOURCE.rglob("*.py"))
CYTHON = sorted([*SOURCE.rglob("*.pyx"), *SOURCE.rglob("*.pxd")])

# Imports go to the left only; those in the first group import nothing of ours.
LEAVES = ("constants", "errors", "signals", "logs", "admission")
PACKAGES = (
    *LEAVES,
    "limits",
    "config",
    "tmem",
    "wire",
    "engine",
    "remotify",
    "cluster",
    "frontswap",
    "node",
    "cli",
    "testing",
)

# Packages that decide or translate: no I/O, no time, no randomness, so that one seed replays them.
PURE = ("tmem", "wire", "remotify", "cluster")
# Their parts that carry decisions out or touch files.
SHELLS = ("remotify/worker.py", "cluster/identity.py")
IMPURE = {"asyncio", "concurrent", "multiprocessing", "random", "select", "selectors", "socket", "ssl", "subprocess"}
IMPURE |= {"secrets", "signal", "threading", "time"}


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def package(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports or cimports, relative ones resolved."""
    parents = ("ramster", *path.relative_to(SOURCE).parent.parts)
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = (*parents[: len(parents) - node.level + 1], node.module or "") if node.level else (node.module,)
                module = ".".join(part for part in base if part)
                # `from ramster import engine` names a package, `from ramster.engine import x` is in one.
                yield from (f"{module}.{alias.name}" for alias in node.names)
        return
    for line in path.read_text().splitlines():
        if found := re.match(r"\s*from\s+(\.*)([\w.]*)\s+c?import\s+\(?\s*([\w, ]*)", line):
            level = len(found[1])
            base = parents[: len(parents) - level + 1] if level else ()
            module = ".".join((*base, *filter(None, [found[2]])))
            names = [each.split()[0] for each in found[3].split(",") if each.strip()]
            yield from (f"{module}.{each}" for each in names or [""])
        elif found := re.match(r"\s*c?import\s+([\w.]+)", line):
            yield found[1]


def ours(path: Path) -> Iterator[str]:
    for dotted in imports(path):
        parts = dotted.split(".")
        if parts[0] == "ramster" and len(parts) > 1 and parts[1] in PACKAGES:
            yield parts[1]


def test_every_package_has_its_place_in_the_order() -> None:
    assert {package(path) for path in PYTHON + CYTHON} - {"__init__", "__main__", "py"} <= set(PACKAGES)


@pytest.mark.parametrize("path", PYTHON + CYTHON, ids=name)
def test_imports_go_in_one_direction(path: Path) -> None:
    here = package(path)
    # The front door opens onto every package that is not for tests.
    rank = PACKAGES.index(here) if here in PACKAGES else PACKAGES.index("testing") - 1
    for other in ours(path):
        if here in LEAVES:
            pytest.fail(f"{name(path)} is a leaf and imports {other}")
        assert PACKAGES.index(other) <= rank, f"{name(path)} imports {other}, which stands further right"


@pytest.mark.parametrize(
    "path", [path for path in PYTHON if package(path) in PURE and name(path) not in SHELLS], ids=name
)
def test_what_decides_does_no_io_and_has_no_clock_and_no_dice(path: Path) -> None:
    found = {dotted.split(".")[0] for dotted in imports(path)} & IMPURE
    assert not found, f"{name(path)} imports {', '.join(sorted(found))}; take it as an argument"
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert not any(isinstance(func, ast.Name) and func.id == "open" for func in calls), "opens a file"


@pytest.mark.parametrize("path", [path for path in PYTHON + CYTHON if package(path) != "cli"], ids=name)
def test_only_the_command_line_prints(path: Path) -> None:
    if path.suffix == ".py":
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(func, ast.Name) and func.id == "print" for func in calls)
    else:
        assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_decoders_are_made_at_import(path: Path) -> None:
    """msgspec learns a type at its first use; two threads that do so at once have ended a node by SIGSEGV."""
    assert not re.search(r"msgspec\.\w+\.decode\([^)]*type=", path.read_text())


@pytest.mark.parametrize("path", PYTHON + CYTHON, ids=name)
def test_no_exception_is_caught_unnamed(path: Path) -> None:
    assert not re.search(r"^\s*except\s*:", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", PYTHON + [path for path in CYTHON if path.suffix == ".pyx"], ids=name)
def test_each_module_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else re.match(r'(\s*#.*\n|\s*\n)*"""\w', text)
    assert said, f"{name(path)} has no docstring"


@pytest.mark.parametrize("path", [path for path in CYTHON if path.suffix == ".pyx"], ids=name)
def test_each_extension_has_its_declarations_and_its_types_beside_it(path: Path) -> None:
    assert path.with_suffix(".pxd").exists()
    assert path.with_suffix(".pyi").exists()


@pytest.mark.parametrize("path", CYTHON, ids=name)
def test_c_declarations_stand_in_one_place(path: Path) -> None:
    if "_c" not in path.parts:
        assert not re.search(r"^cdef extern from", path.read_text(), re.MULTILINE)
