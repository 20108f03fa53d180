"""Reads the TOML file into a `Config`, or says where it is wrong, what was given and what is allowed."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from ramster.config.knobs import ARRAYS, SECTIONS, Config, conflicts, knobs
from ramster.config.paths import canonical_run_dir
from ramster.errors import ConfigError, UsageError

# A configuration is a page or two; a larger file is somebody's mistake (a disk image, /dev/zero).
_FILE_BYTES_MAX: Final = 1 << 20

Place = tuple[str | int, ...]  # ("arena", "size") or ("peers", 0, "address")

_HEADER: Final = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_.\-\"' ]+?)\s*=")


def load(path: str | Path) -> Config:
    """The configuration in the file at `path`; relative paths in it start at the file's folder.

    ConfigError: one line per mistake, all of them at once.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {_FILE_BYTES_MAX} bytes; is it a configuration?")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """As `load`, for a text that would stand at `path`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{path}:{line[1] if line else text.count(chr(10)) + 1}: not TOML: {error}") from error
    reader = _Reader(text, path)
    config = reader.config(tables)
    if config is not None:
        for place, wrong in conflicts(config):
            reader.report(place, wrong, reader.given(tables, place))
    if reader.problems:
        raise ConfigError("\n".join(problem for _, problem in sorted(reader.problems, key=lambda each: each[0])))
    assert config is not None, "a configuration without problems was built"
    return config


class _Reader:
    def __init__(self, text: str, path: Path) -> None:
        self.path = path
        self.folder = path.parent.absolute()
        self.lines = dict(_places(text))
        self.problems: list[tuple[int, str]] = []

    def report(self, place: Place, wrong: str, given: str | None = None) -> None:
        # tomllib keeps no lines; the nearest place that has one serves (an inline table, a whole section).
        line = next((self.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in self.lines), 1)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        self.problems.append((line, f"{self.path}:{line}: {key}{'' if given is None else f' = {given}'}: {wrong}"))

    @staticmethod
    def given(tables: Mapping[str, Any], place: Place) -> str | None:
        value: Any = tables
        for part in place:
            if isinstance(part, str) and part not in value:
                return None  # a default
            value = value[part]
        return None if isinstance(value, dict | list) else _toml(value)

    def config(self, tables: Mapping[str, Any]) -> Config | None:
        values: dict[str, Any] = {}
        for name in tables.keys() - SECTIONS.keys():
            self.report((name,), f"no such section{_suggest(name, SECTIONS)}")
        for name, cls in SECTIONS.items():
            table = tables.get(name)
            if name in ARRAYS:
                if not isinstance(table, list | None) or not all(isinstance(each, dict) for each in table or ()):
                    self.report((name,), f"allowed are tables that begin with [[{name}]]")
                    continue
                values[name] = tuple(self.section((name, i), cls, each) for i, each in enumerate(table or ()))
            elif not isinstance(table, dict | None):
                self.report((name,), f"allowed is a section that begins with [{name}]", _toml(table))
            elif table is not None or name == "node":
                values[name] = self.section((name,), cls, table or {})
        if self.problems:
            return None
        config = Config(**values)
        return replace(config, node=replace(config.node, run_dir=canonical_run_dir(config.node.run_dir)))

    def section(self, place: Place, cls: type, table: Mapping[str, Any]) -> Any:
        known = {key: (field, knob) for key, field, knob in knobs(cls)}
        for key in table.keys() - known.keys():
            self.report((*place, key), f"no such key{_suggest(key, known)}", _toml(table[key]))
        values: dict[str, Any] = {}
        for key, (field, knob) in known.items():
            if key not in table:
                if field.default is MISSING and field.default_factory is MISSING:
                    self.report((*place, key), f"missing; allowed is {knob.allowed}")
                continue
            try:
                value = knob.parse(table[key])
            except ValueError as error:
                self.report((*place, key), str(error), _toml(table[key]))
                continue
            values[field.name] = self.folder / value.expanduser() if isinstance(value, Path) else value
        if self.problems:
            return None
        try:
            return cls(**values)
        except UsageError as error:  # a default that this user has not
            self.report((*place, "run_dir"), f"missing, and {error}")
            return None


def _places(text: str) -> Iterator[tuple[Place, int]]:
    """Where each table and key begins. Good for files that tomllib accepts; a line inside a multi-line string may be
    taken for a key, which adds a place that nobody asks for."""
    table: Place = ()
    arrays: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            table = _split(header[2])
            if header[1] == "[[":
                index = arrays[header[2]] = arrays.get(header[2], -1) + 1
                table = (*table, index)
                if index == 0:
                    yield table[:-1], number
            yield table, number
        elif key := _KEY.match(line):
            yield (*table, *_split(key[1])), number


def _split(dotted: str) -> Place:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _suggest(word: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; allowed are {', '.join(known)}"


def _toml(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, str | bool | list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
