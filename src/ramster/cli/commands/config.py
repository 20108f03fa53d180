"""`ramster config`: checks a configuration file, explains the knobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check and explain configuration files.", no_args_is_help=True)

CHECK_HELP = """Check a node's configuration file and its certificates without starting anything.

Every mistake is shown with file, line, key, what was given and what is allowed.

\b
Examples:
  ramster config check lab/alpha.toml
"""
LIST_HELP = """Show every knob with its default, what is allowed and what it does.

\b
Examples:
  ramster config list
"""


@app.command("check", help=CHECK_HELP)
def check(file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration file (TOML).")]) -> None:
    from ramster.config import load

    config = load(file)
    if config.cluster is not None:
        from ramster.cluster import identity

        files = identity.NodeFiles(config.cluster.ca, config.cluster.cert, config.cluster.key)
        identity.verify(files, config.cluster.id, config.node.name)
    peers = ", ".join(peer.name for peer in config.peers) or "none"
    typer.echo(f"{file}: fine: node {config.node.name}, peers: {peers}")


@app.command("list", help=LIST_HELP)
def list_() -> None:
    from ramster.config.knobs import ARRAYS, SECTIONS, default_text, knobs

    for number, (section, kind) in enumerate(SECTIONS.items()):
        title = f"[[{section}]]" if section in ARRAYS else f"[{section}]"
        typer.echo(("\n" if number else "") + title)
        for key, field, knob in knobs(kind):
            default = default_text(field, knob)
            typer.echo(f"  {key} = {'(required)' if default is None else default}")
            typer.echo(f"      {knob.help}")
            typer.echo(f"      Allowed: {knob.allowed}")
