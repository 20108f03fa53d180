"""What a shell offers for a name that is being typed: exports and swaps of the node, nodes of a cluster's folder.

Nobody who presses the tab key wants to wait or to read a message: whatever goes wrong, nothing is offered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

TIMEOUT_S = 1.0


def _offered(find: Callable[[typer.Context], Iterable[str]]) -> Callable[[typer.Context, str], list[str]]:
    def complete(context: typer.Context, incomplete: str) -> list[str]:
        with contextlib.suppress(Exception):
            return sorted({name for name in find(context) if name.startswith(incomplete)})
        return []

    return complete


def _socket(context: typer.Context) -> Path:
    from ramster.cli.commands.options import control_socket

    socket, config = (context.params.get(name) for name in ("socket", "config"))
    return control_socket(Path(socket) if socket else None, Path(config) if config else None)


def _exports(context: typer.Context) -> list[str]:
    from ramster.cli.control_client import ControlClient

    return [str(each["name"]) for each in ControlClient(_socket(context), TIMEOUT_S).exports()]


def _swaps(context: typer.Context) -> list[str]:
    from ramster.frontswap import swap

    return swap.names(_socket(context).parent)


def _nodes(context: typer.Context) -> list[str]:
    return [path.stem for path in Path(context.params["directory"]).glob("*.crt") if path.stem != "ca"]


export_names, swap_names, node_names = _offered(_exports), _offered(_swaps), _offered(_nodes)
