"""`ramster status`: what a node does, for people or as JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ramster.cli.commands.options import ChosenNode, JsonOption, for_node
from ramster.errors import NodeUnreachable

HELP = """Show a running node: arena, pages here and away, peers, regions, foreign data.

\b
Examples:
  ramster status
  ramster status --config lab/alpha.toml --json
  ramster status --links --wait 60
"""


@for_node()
def status(
    as_json: JsonOption = False,
    links: Annotated[bool, typer.Option("--links", help="Wait for the links to all peers, too.")] = False,
    *,
    node: ChosenNode,
) -> None:
    patience, client = node.patience, node.awaited()
    data = client.status()
    while links and (absent := _absent(data)) and patience.left(f"waiting for the link to {', '.join(absent)}"):
        data = client.status()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        from ramster.cli.render import status_tables
        from ramster.cli.tables import show

        show(*status_tables(data))
    if links and (absent := _absent(data)):
        raise NodeUnreachable(
            f"no link within {patience.wait_s:g} s: {'; '.join(f'{name} ({why})' for name, why in absent.items())}; "
            "is its node running, and does it reach this one?"
        )


def _absent(status: dict[str, Any]) -> dict[str, str]:
    """Peers without a link, and why."""
    return {
        str(peer["name"]): str(peer.get("reason") or peer["state"])
        for peer in status.get("peers") or []
        if peer["state"] != "up"
    }
