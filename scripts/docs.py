"""Writes docs/configuration.md and docs/errors.md from the code; tests compare them with what stands there."""

import inspect
from pathlib import Path

from ramster.config.knobs import ARRAYS, SECTIONS, default_text, knobs
from ramster.config.units import SIZE_RULE, TIME_RULE
from ramster.errors import every_error

DOCS = Path(__file__).parent.parent / "docs"

EXAMPLE = """\
[node]
name = "alpha"
number = 0

[cluster]
id = "lab"
ca = "ca.crt"
cert = "alpha.crt"
key = "alpha.key"

[arena]
size = "256MiB"

[lend]
size = "1GiB"

[[peers]]
name = "beta"
number = 1
address = "10.0.0.2:7777"
"""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _paragraphs(cls: type) -> list[str]:
    return [" ".join(each.split()) for each in (inspect.getdoc(cls) or "").split("\n\n")]


def configuration() -> str:
    """docs/configuration.md: a table per section of the file."""
    parts = [
        "# Configuration\n\n",
        "Made from `src/ramster/config/knobs.py` by `make docs`; edit there.\n\n",
        "`ramster node --config FILE` reads one TOML file. Mistakes are reported all at once before anything starts,\n",
        "each with file, line, key, what was given and what is allowed. Only `[node]` is required.\n\n",
        f"- Sizes: {SIZE_RULE}.\n- Times: {TIME_RULE}.\n",
        "- Paths: a relative one starts at the folder of the file.\n\n",
        f"```toml\n{EXAMPLE}```\n",
    ]
    for name, cls in SECTIONS.items():
        title, *rest = _paragraphs(cls)
        rows = []
        for key, each, knob in knobs(cls):
            default = default_text(each, knob)
            constant = knob.default_rule is None
            shown = "required" if default is None else f"`{default}`" if constant else default
            rows.append([f"`{key}`", shown, knob.allowed, knob.help])
        heading = f"[[{name}]]" if name in ARRAYS else f"[{name}]"
        text = title.partition(": ")[2]
        parts.append(f"\n## {heading}\n\n{' '.join([text[0].upper() + text[1:], *rest])}\n\n")
        parts.append(_table(["key", "default", "allowed", "meaning"], rows))
    return "".join(parts)


def errors() -> str:
    """docs/errors.md: a row per error."""
    rows = []
    for cls in every_error():
        meaning, advice = _paragraphs(cls)
        retry = "yes" if cls.retryable else "no"
        rows.append([f"`{cls.code}`", f"`{cls.__name__}`", str(cls.exit_code), cls.blame, retry, meaning, advice])
    return (
        "# Errors\n\n"
        "Made from `src/ramster/errors.py` by `make docs`; edit there.\n\n"
        "Every error of the Python API is a `ramster.RamsterError`; the command exits with the status given here.\n"
        "Codes are stable: they are never changed and never used again for something else.\n\n"
        + _table(["code", "class", "exit", "whose fault", "retry helps", "what happened", "what to do"], rows)
    )


PAGES = {"configuration.md": configuration, "errors.md": errors}

if __name__ == "__main__":
    for page, render in PAGES.items():
        (DOCS / page).write_text(render())
