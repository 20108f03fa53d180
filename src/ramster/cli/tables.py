"""What commands print for people: tables where they fit, else a paragraph per row. No word is ever divided or cut.

People copy addresses, reasons and commands out of what is printed here. So every value stays on one line as it is, and
a terminal that is too narrow gets a paragraph per row. What is not a terminal, such as a pipe or a file, has no width.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ramster.logs import escaped

GAP = "  "
INDENT = "  "
# A text, or a text and the style that a terminal shows it in.
Cell = str | tuple[str, str]
Line = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns. left: how many columns from the first are aligned to the left; figures are not.

    Without `heads` the rows are pairs, a name and its value, and the columns' names are not shown.
    """

    title: str
    columns: Sequence[str]
    left: int = 1
    heads: bool = True
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        """One more row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)


Part = Table | Cell


def show(*parts: Part) -> None:
    """Prints the parts on stdout, in this order: tables, and texts of one line each."""
    console = Console(highlight=False)
    width = _width()
    with console.capture() as styled:
        for part in parts:
            for line in lines(part, width):
                # soft_wrap: rich neither breaks the line nor cuts it.
                console.print(Text.assemble(*line), soft_wrap=True)
    # Not by rich: it ends the program itself where a pipe is closed.
    sys.stdout.write(styled.get())


def _width() -> int | None:
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size((0, 0)).columns or None  # some consoles do not say


def lines(part: Part, width: int | None) -> list[Line]:
    """The lines of a part in a terminal of `width` columns, or without a width. Pure.

    A table ends in an empty line.
    """
    if not isinstance(part, Table):
        return [[_said(part)]]
    rows = [[_said(cell) for cell in row] for row in part.rows]
    title: list[Line] = [[(escaped(part.title, sys.maxsize), "bold")]] if part.title else []
    grid = [[(column, "bold") for column in part.columns], *rows] if part.heads else rows
    widths = [max(cell_len(text) for text, _ in column) for column in zip(*grid, strict=True)]
    if width is None or sum(widths) + len(GAP) * (len(widths) - 1) <= width:
        body = [_row(row, widths, part.left) for row in grid]
    elif part.heads:
        body = _paragraphs(part.columns, rows)
    else:
        body = [[(f"{name}: ", ""), (value, style)] for (name, _), (value, style) in rows]
    return [*title, *body, []]


def _said(cell: Cell) -> tuple[str, str]:
    text, style = (cell, "") if isinstance(cell, str) else cell
    return escaped(text, sys.maxsize), style


def _row(row: Sequence[tuple[str, str]], widths: Sequence[int], left: int) -> Line:
    """One line of a table, without blanks at its end."""
    line: Line = []
    blanks = ""
    for number, ((text, style), width) in enumerate(zip(row, widths, strict=True)):
        padding = " " * (width - cell_len(text))
        before, after = ("", padding) if number < left else (padding, "")
        if text:
            line += [(blanks + before, ""), (text, style)]
            blanks = after + GAP
        else:
            blanks += padding + GAP
    return line


def _paragraphs(columns: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> list[Line]:
    """A paragraph per row: its first cell, and below it `name: value` for each of the others that says something."""
    body: list[Line] = []
    for row in rows:
        if body:
            body.append([])
        (first, style), *others = row
        body.append([(f"{columns[0]}: ", ""), (first, style)])
        body += [
            [(f"{INDENT}{column}: ", ""), (text, style)]
            for column, (text, style) in zip(columns[1:], others, strict=True)
            if text
        ]
    return body
