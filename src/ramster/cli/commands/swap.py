"""`ramster swap`: this machine's kernel swaps on an export of its node."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from ramster.cli.commands.options import ChosenNode, JsonOption, for_node, say, size_option
from ramster.cli.complete import swap_names
from ramster.constants import MIB
from ramster.errors import UsageError

app = typer.Typer(help="Let this machine's kernel swap to its node.", no_args_is_help=True)

ON_HELP = """Make an export and let this machine's kernel swap on it. Needs root.

Attached through the kernel's nbd and nbd-client; on a kernel without nbd
through nbdfuse and a loop device, which is slower. Refused, with every
reason, where it is unsafe: an arena that is not locked, too little room,
pages on other machines without a second copy (--accept-loss insists). An
error in the middle leaves nothing behind.

\b
Examples:
  ramster swap on --size 8GiB
  ramster swap on --size 8GiB --priority 200 --name fast
"""
OFF_HELP = """Switch a swap off: swapoff, then the device, then the export. Needs root.

What is out there is read back first, which takes its time. Refused while
RAM has no room for it; --force takes the risk that processes are killed.
Copes with whatever a crash has left, and may be run again.

\b
Examples:
  ramster swap off
  ramster swap off fast
  ramster swap off --all
"""
STATUS_HELP = """Show what this machine swaps on, and how each swap is attached.

\b
Examples:
  ramster swap status
  ramster swap status --json
"""


ANSWER_S = 30.0  # to forget a large export takes a while


@app.command("on", help=ON_HELP)
@for_node()
def on(
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help='How large, such as "8GiB".')],
    priority: Annotated[
        int | None,
        typer.Option(
            "--priority", metavar="N", help="The kernel fills the highest first. Default: 50, behind zram's usual 100."
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Of the swap and of its export.")] = "swap0",
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss", help="Also when processes die with another machine, because their pages have no copy."
        ),
    ] = False,
    connections: Annotated[int, typer.Option("--connections", metavar="N", help="Connections to the node.")] = 4,
    way: Annotated[
        str,
        typer.Option("--way", metavar="WAY", help="auto, nbd (the kernel's), or bridge (nbdfuse and a loop device)."),
    ] = "auto",
    as_json: JsonOption = False,
    *,
    node: ChosenNode,
) -> None:
    from ramster.frontswap import swap

    plan = swap.Plan(
        name,
        size_option("--size", size),
        swap.DEFAULT_PRIORITY if priority is None else priority,
        accept_loss,
        connections,
        way,
    )
    swap.check(plan)
    swap.need_root("switching swap on")
    client = node.awaited(ANSWER_S, strict=True)  # the machine's memory is to go there

    def tell(made: dict[str, Any]) -> None:
        if as_json:
            typer.echo(json.dumps(made, indent=2))
            return
        size_mib = -(-made["size_bytes"] // MIB)  # the header takes a page of it
        typer.echo(f"the kernel swaps on {made['device']}, {size_mib} MiB, priority {made['priority']}")
        typer.echo(f"to undo it: ramster swap off {name}")

    swap.on(client, node.path.parent, plan, say, node.patience.left, tell)


@app.command("off", help=OFF_HELP)
@for_node(waits=False)
def off(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Which one; may be left out when there is one.", autocompletion=swap_names),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every swap of this node.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also when RAM may not have room for it.")] = False,
    as_json: JsonOption = False,
    *,
    node: ChosenNode,
) -> None:
    from ramster.frontswap import swap

    path = node.path
    there = swap.names(path.parent)
    if name is not None and every:
        raise UsageError("NAME and --all both say which; give one of them")
    if name is None and not every and len(there) > 1:
        raise UsageError(f"there are {len(there)} swaps ({', '.join(there)}); name one, or use --all")
    wanted = there if name is None else [name]
    swap.need_root("switching swap off")
    ended = [swap.off(node.client(ANSWER_S), path.parent, each, force=force, say=_progress) for each in wanted]
    if sys.stderr.isatty():
        typer.echo("\r\x1b[K", err=True, nl=False)  # the last line of progress
    if as_json:
        typer.echo(json.dumps({"swaps": [{"name": e.name, "done": e.done, "notes": e.notes} for e in ended]}, indent=2))
        return
    for each in ended:
        for note in each.notes:
            say(note)
        typer.echo(f"{each.name}: {', '.join(each.done) or 'there is nothing of it'}")
    if not ended:
        typer.echo("there is no swap of this node")


@app.command("status", help=STATUS_HELP)
@for_node(waits=False)
def status(as_json: JsonOption = False, *, node: ChosenNode) -> None:
    from ramster.frontswap import swap

    found = swap.status(node.client(ANSWER_S), node.path.parent)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    _tables(found)


_said = 0.0


def _progress(line: str) -> None:
    """On one line of a terminal, or every ten seconds."""
    global _said
    if sys.stderr.isatty():
        typer.echo(f"\r\x1b[K{line}", err=True, nl=False)
    elif time.monotonic() - _said >= 10.0:
        _said = time.monotonic()
        say(line)


def _tables(found: dict[str, Any]) -> None:
    from ramster.cli.tables import Table, show

    if not found["node"]:
        say("the node does not answer; what follows is what the kernel says")
    if not found["swaps"] and not found["others"]:
        typer.echo("this machine has no swap; `ramster swap on --size SIZE` makes one")
        return
    columns = ("name", "state", "device", "way", "size", "used", "priority", "away", "lost")
    table = Table("", columns, left=4)
    for each in found["swaps"]:
        export = each["export"] or {}
        table.add(
            each["name"],
            each["state"],
            each["device"] or "-",
            each["way"] + ("" if each["direct_io"] in (None, True) else " (through the page cache)"),
            f"{-(-each['size_bytes'] // MIB)} MiB",
            f"{each['used_bytes'] >> 20} MiB",
            str(each["priority"]),
            f"{int(export.get('pages_away', 0)) >> 8} MiB" if export else "-",
            str(export.get("pages_gone", 0)) if export else "-",
        )
    for row in found["others"]:
        table.add(
            "-",
            "on",
            row["device"],
            row["kind"],
            f"{-(-row['size_bytes'] // MIB)} MiB",
            f"{row['used_bytes'] >> 20} MiB",
            str(row["priority"]),
            "-",
            "-",
        )
    show(table)
    if found["zswap"]:
        say("zswap is on: each page is compressed twice (echo N > /sys/module/zswap/parameters/enabled)")
    for each in found["swaps"]:
        if each["state"] != "on":
            say(f"{each['name']} is {each['state']}: {each['why']}")
