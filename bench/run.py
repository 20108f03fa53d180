"""Runs every benchmark of this folder that has `run(quick)` and shows each path beside its floor.

bench/run.py [--quick] [--json | --markdown] [MODULE ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))

if TYPE_CHECKING:
    from bench.rows import Row

COLUMNS = ("path", "ours", "floor", "ratio", "middle half", "note")


def modules() -> list[str]:
    """Names of the benchmark modules, in the order of their files' names."""
    files = sorted(path for path in FOLDER.glob("*.py") if path != Path(__file__).resolve())
    return [path.stem for path in files if "\ndef run(quick: bool)" in path.read_text(encoding="utf-8")]


def number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}".rstrip()


def cells(row: Row) -> tuple[str, ...]:
    floor = "-" if row.floor is None else ", ".join(filter(None, (number(row.floor, row.unit), row.floor_name)))
    spread = "-" if row.lo is None or row.hi is None else f"{row.lo:.2f} to {row.hi:.2f}"
    return row.path, number(row.ours, row.unit), floor, number(row.ratio), spread, row.note


def machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}"


def markdown(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join([*lines, "", f"{machine()}."])


def show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=machine())
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in {"ours", "ratio", "middle half"} else "left")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure each path beside its floor, in the same run.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(modules())}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer pages and rounds: shows that it runs, not how fast")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    output.add_argument("--markdown", action="store_true", help="a table for docs/benchmarks.md on stdout")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.modules if name not in modules()]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(modules())}")
    rows: list[Row] = []
    for name in options.modules or modules():
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"bench.{name}").run(options.quick)
    if options.json:
        print(
            json.dumps({"machine": machine(), "quick": options.quick, "rows": [asdict(row) for row in rows]}, indent=2)
        )
    elif options.markdown:
        print(markdown(rows))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
