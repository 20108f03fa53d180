"""`ramster status`: what a node does, for people or as JSON."""

from __future__ import annotations

import json

import typer

from ramster.cli.commands.options import (
    WAIT_S,
    ConfigOption,
    JsonOption,
    SocketOption,
    WaitOption,
    control_socket,
    say,
)
from ramster.cli.control_client import ControlClient, Patience

HELP = """Show a running node: arena, pages here and away, peers, regions, foreign data.

\b
Examples:
  ramster status
  ramster status --config lab/alpha.toml --json
"""


def status(
    as_json: JsonOption = False,
    wait: WaitOption = WAIT_S,
    socket: SocketOption = None,
    config: ConfigOption = None,
) -> None:
    data = ControlClient(control_socket(socket, config)).await_node(Patience(wait, say)).status()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    from ramster.cli.render import status_tables
    from ramster.cli.tables import show

    show(*status_tables(data))
