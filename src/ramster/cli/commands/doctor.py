"""`ramster doctor`: what this machine can do, before anything is changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

HELP = """Say what this kernel and this user can: swap, arrays, cgroups, locks, limits.

Changes nothing. Exit code 0: a kernel can swap on a node here; 7: the
kernel lacks something, 14: a program is not installed, 8: a permission is
missing.

\b
Examples:
  ramster doctor
  sudo ramster doctor --json
"""
_STYLES = {"ok": "green", "missing": "red", "refused": "yellow", "note": ""}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> int:
    from ramster.cli.doctor import checks, exit_code, way

    found = checks()
    code = exit_code(found)
    if as_json:
        rows = [{key: value for key, value in asdict(check).items() if key != "code"} for check in found]
        typer.echo(json.dumps({"exit_code": code, "way": way(found), "checks": rows}, indent=2))
        return code
    from ramster.cli.tables import Table, show

    table = Table("", ("what", "state", "it means", "to do"), left=4)
    for check in found:
        table.add(check.name, (check.state, _STYLES[check.state]), check.detail, check.advice)
    wanting = [check.name for check in found if check.needed and check.state != "ok"]
    verdict = {
        "nbd": "A kernel can swap on a node here, through nbd.",
        "bridge": "A kernel can swap on a node here, through nbdfuse and a loop device (slower than nbd).",
    }
    if code == 0:
        show(table, verdict.get(way(found) or "", ""))
    else:
        show(table, f"A kernel cannot swap on a node here yet: {', '.join(wanting)}.")
    return code
