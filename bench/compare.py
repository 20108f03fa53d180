"""Runs the benchmarks of two checkouts in turns and shows what changed; bench/compare.sh builds the older one.

Each round runs each benchmark module once in either checkout, by the checkout's own bench/run.py. Two ratios come of a
round: that of the two figures, and that of the two ratios to the floor, in which a machine that was slower for one of
the two runs cancels out. Both are turned so that above 1 means that this checkout is slower, whatever the unit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from bench.rows import middle_half  # noqa: E402 (the folder above must be found first)
from bench.run import machine  # noqa: E402

MODULES = ("store", "fault", "remote", "nbd")
MORE_IS_BETTER = ("IOPS", "MB/s", "pages/s")


@dataclass(slots=True)
class Compared:
    """One path's rounds: figures of the older and of this checkout, and the ratios between the two."""

    unit: str
    older: list[float] = field(default_factory=list)
    newer: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    beside_floor: list[float] = field(default_factory=list)

    def add(self, older: Figure, newer: Figure) -> None:
        self.older.append(older.ours)
        self.newer.append(newer.ours)
        ratio = newer.ours / older.ours
        self.ratios.append(1 / ratio if self.unit in MORE_IS_BETTER else ratio)
        if older.ratio and newer.ratio:
            self.beside_floor.append(newer.ratio / older.ratio)


@dataclass(frozen=True, slots=True)
class Figure:
    ours: float
    unit: str
    ratio: float | None


def figures(checkout: Path, module: str, full: bool) -> dict[str, Figure]:
    """What one run of one module gave, by path; rows that were skipped, and bare floors, are left out."""
    command = [str(checkout / ".venv/bin/python"), "bench/run.py", "--json", *([] if full else ["--quick"]), module]
    out = subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return {
        row["path"]: Figure(row["ours"], row["unit"], row["ratio"])
        for row in json.loads(out)["rows"]
        if row["ours"] is not None and row["ours"] > 0
    }


def compare(older: Path, modules: list[str], rounds: int, full: bool) -> dict[str, Compared]:
    paths: dict[str, Compared] = {}
    for round_ in range(rounds):
        for module in modules:
            print(f"compare: round {round_ + 1} of {rounds}, {module} ...", file=sys.stderr, flush=True)
            order = (older, HERE) if round_ % 2 == 0 else (HERE, older)
            found = {checkout: figures(checkout, module, full) for checkout in order}
            for name, then in found[older].items():
                if now := found[HERE].get(name):
                    paths.setdefault(name, Compared(then.unit)).add(then, now)
    return paths


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    lo, hi = middle_half(values) if len(values) > 1 else (values[0], values[0])
    return f"{statistics.median(values):.2f} ({lo:.2f} to {hi:.2f})"


def table(paths: dict[str, Compared]) -> list[list[str]]:
    def number(values: list[float]) -> str:
        value = statistics.median(values)
        return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"

    return [
        [name, f"{number(p.older)} {p.unit}", f"{number(p.newer)} {p.unit}", spread(p.ratios), spread(p.beside_floor)]
        for name, p in paths.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, help="the older checkout, built")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"default: {' '.join(MODULES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="as many pages as `make bench` takes; default: --quick")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/benchmarks.md")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    paths = compare(options.older.resolve(), options.modules or list(MODULES), options.rounds, options.full)
    header = ["path", "before", "now", "now / before", "the same beside the floor"]
    rows = table(paths)
    if options.markdown:
        print("\n".join([f"| {' | '.join(header)} |", "|---|---|---|---|---|"]))
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
        print(f"\n{machine()}, {options.rounds} rounds; above 1: slower than before; in brackets the middle half.")
    else:
        widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
        for line in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print(f"{machine()}, {options.rounds} rounds; above 1: slower than before; in brackets the middle half.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
