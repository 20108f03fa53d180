"""Options and small checks that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ramster.config.paths import canonical_socket, default_run_dir
from ramster.config.paths import control_socket as control_path
from ramster.errors import UsageError

SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket", metavar="PATH", help="The node's control socket. Default: the one in the default run_dir."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Take the control socket from this node's configuration file."),
]
#: A node needs about a second from its start to its sockets; longer where it locks a large arena.
WAIT_S = 10.0
WaitOption = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0, max=3600, help="For a node that was just started."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def control_socket(socket: Path | None, config: Path | None) -> Path:
    """The control socket that the options name. Raises UsageError for both at once, ConfigError for a bad file."""
    if socket is not None and config is not None:
        raise UsageError("--socket and --config both name a node; give one of them")
    if socket is not None:
        return canonical_socket(socket)
    if config is not None:
        from ramster.config import load

        return control_path(load(config).node.run_dir)
    return control_path(default_run_dir())


def say(line: str) -> None:
    """What is not the answer itself: on stderr, as errors are."""
    typer.echo(f"ramster: {line}", err=True)


def size_option(option: str, text: str) -> int:
    """Bytes of a size as people write it. UsageError names the option."""
    from ramster.config.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}; {error}") from None
