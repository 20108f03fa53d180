"""`ramster demo`: see the whole thing work on this machine in under a minute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ramster.cli.commands.options import size_option
from ramster.signals import at_once

HELP = """Run two real nodes on this machine and work on an array that is larger than its RAM.

Fills an array with real bytes, walks it in sequential, random and cyclic
order, sorts it, and compares every page with digests made outside. What
does not fit is compressed, kept by node 1 and moved to node 2 over TLS.
The same work runs on plain numpy in RAM and on numpy.memmap.

Exit code 0: every page was compared and right. 6: pages were lost (a
lender died), none was wrong.

\b
Examples:
  ramster demo
  ramster demo --size 2GiB --resident 128MiB --nodes 3
  ramster demo --file big.parquet --json > result.json
"""


def demo(
    size: Annotated[str, typer.Option(metavar="SIZE", help="Size of the array.")] = "512MiB",
    resident: Annotated[str, typer.Option(metavar="SIZE", help="RAM that the array may use itself.")] = "64MiB",
    local: Annotated[str, typer.Option(metavar="SIZE", help="Node 1's arena for compressed pages.")] = "64MiB",
    nodes: Annotated[int, typer.Option(metavar="N", help="Nodes; node 1 borrows, the others lend.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Order of the files and of the random walk.")] = 1,
    file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Fill the array with this file, repeated if it is shorter.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the nodes running and all files in place.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Report progress as JSON lines on stderr.")] = False,
) -> None:
    # Here, not above: numpy and rich would slow down every other command's start.
    with at_once():
        from ramster.cli.demo import live
        from ramster.cli.demo.plan import Options
        from ramster.cli.demo.run import run, verdict

    options = Options(
        size=size_option("--size", size),
        local=size_option("--local", local),
        resident=size_option("--resident", resident),
        nodes=nodes,
        seed=seed,
        keep=keep,
        file=file,
    )
    if events:
        result = run(options, live.Lines())
    elif as_json:
        result = run(options, live.Quiet())
    else:
        with live.Screen() as screen:
            result = run(options, screen)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        from ramster.cli.tables import show

        show(*result.tables())
    verdict(result)
