"""Options and small checks that several commands share."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ramster.cli.control_client import ControlClient, Patience
from ramster.config.paths import canonical_socket, default_run_dir
from ramster.config.paths import control_socket as control_path
from ramster.errors import UsageError
from ramster.logs import escaped

Result = TypeVar("Result")

#: A node needs about a second from its start to its sockets; longer where it locks a large arena.
WAIT_S = 10.0
_SOCKET = Annotated[
    Path | None,
    typer.Option(
        "--socket", metavar="PATH", help="The node's control socket. Default: the one in the default run_dir."
    ),
]
_CONFIG = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Take the control socket from this node's configuration file."),
]
_WAIT = Annotated[
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


@dataclass(frozen=True, slots=True)
class ChosenNode:
    """The node that --socket or --config names, and how long --wait waits for it."""

    path: Path
    patience: Patience

    def client(self, timeout_s: float | None = None, *, strict: bool = False) -> ControlClient:
        """As of `ControlClient`; asks nothing yet."""
        return ControlClient(self.path, strict=strict, **({} if timeout_s is None else {"timeout_s": timeout_s}))

    def awaited(self, timeout_s: float | None = None, *, strict: bool = False) -> ControlClient:
        """The same, once the node answers."""
        return self.client(timeout_s, strict=strict).await_node(self.patience)


def for_node(*, waits: bool = True) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Gives a command the options that name a node, in place of its last parameter, `node: ChosenNode`.

    waits: --wait is one of them.
    """
    options = {"wait": (_WAIT, WAIT_S), "socket": (_SOCKET, None), "config": (_CONFIG, None)}
    if not waits:
        del options["wait"]
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in options.items()
    ]

    def decorate(command: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(command)
        def with_options(
            *, wait: float = 0.0, socket: Path | None = None, config: Path | None = None, **given: Any
        ) -> Result:
            return command(**given, node=ChosenNode(control_socket(socket, config), Patience(wait, say)))

        signature = inspect.signature(command, eval_str=True)
        kept = [each for each in signature.parameters.values() if each.name != "node"]
        # What the parser reads of a command.
        with_options.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        with_options.__annotations__ = {each.name: each.annotation for each in [*kept, *added]}
        return with_options

    return decorate


def say(text: str, by: str = "ramster: ") -> None:
    """What is not the answer itself, and errors: on stderr.

    Words of other nodes, programs and files stand in it: what cannot be printed is shown as an escape.
    """
    typer.echo(by + "\n".join(escaped(line, sys.maxsize) for line in text.split("\n")), err=True)


def size_option(option: str, text: str) -> int:
    """Bytes of a size as people write it. UsageError names the option."""
    from ramster.config.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}; {error}") from None
