"""`ramster stop`: an orderly stop, refused while data would be lost."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Annotated, Any

import typer

from ramster.cli.commands.options import ChosenNode, for_node, say
from ramster.cli.control_client import ControlClient
from ramster.errors import NodeUnreachable, Refused

HELP = """Stop a node and wait until it is gone.

A node that holds data which exists nowhere else refuses, and this prints
what would be lost: pages kept for other nodes, regions of running
processes, and exports with pages in them. --force stops it all the same; those pages are then lost, never
wrong. Where no node runs, memory that is kept for the next one ([arena]
keep) is given back.

\b
Examples:
  ramster stop
  ramster stop --config lab/alpha.toml --force
"""
WAIT_S = 60.0


@for_node(waits=False)
def stop(
    force: Annotated[bool, typer.Option("--force", help="Stop even if data is lost.")] = False,
    *,
    node: ChosenNode,
) -> None:
    path, client = node.path, node.client()
    try:
        status = client.status()
    except NodeUnreachable:
        from ramster.node import holder

        if not holder.end(path.parent):
            raise
        typer.echo("no node runs; the memory that was kept for the next one is given back")
        return
    name, pid = str(status.get("name", "?")), int(status.get("pid", 0))
    # Opened before the order, so that the number cannot have gone to another process meanwhile.
    with _process(pid) as process:
        answer = client.stop(force=force)
        from ramster.cli.render import losses

        lines = losses(answer.would_lose)
        if not answer.accepted:
            raise Refused(
                f"node {name} was not stopped, because this would be lost:\n"
                + "".join(f"  {line}\n" for line in lines)
                + "close the regions, remove the exports and stop the owners first, or use --force to lose it"
            )
        for line in lines:
            say(line, by="lost: ")
        _wait(client, process, name)
    typer.echo(f"node {name} has stopped")


@contextlib.contextmanager
def _process(pid: int) -> Any:
    """A pidfd of the node, or None where it is not visible from here (another PID namespace) or already gone."""
    try:
        descriptor = os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait(client: ControlClient, process: int | None, name: str) -> None:
    deadline = time.monotonic() + WAIT_S
    if process is not None:
        if select.select([process], [], [], WAIT_S)[0]:
            return
    else:
        while time.monotonic() < deadline:
            try:
                client.status()
            except NodeUnreachable:
                return
            time.sleep(0.1)
    raise NodeUnreachable(f"node {name} accepted the stop but still runs after {WAIT_S:.0f} s; see its log")
