"""`ramster run`: one command with a limit on its RAM; what does not fit goes to swap."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ramster.cli.commands.options import ChosenNode, for_node, say, size_option
from ramster.errors import Refused, UsageError
from ramster.signals import at_once

HELP = """Run a command with so much RAM; what does not fit goes to swap.

It runs in a memory cgroup of its own, with your terminal and files; its
exit code is passed on, 128 + n when signal n ended it. At the end stderr
shows its peak, the pages swapped and the time stalled. What it leaves
running is ended. Needs a RAMster swap that is on (`ramster swap on`), or
--any-swap. Without root it needs a delegated cgroup (v2).

\b
Examples:
  ramster run --memory 512MiB -- sort -S 2G big.txt -o sorted.txt
  ramster run --memory 2GiB --json report.json -- python train.py
"""
#: For the node's word on the swap, before and meanwhile.
ANSWER_S = 5.0
#: What the command itself is told, so that `ramster run -- ls -l` is no option of ours.
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}


@for_node()
def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What to run.")],
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help='RAM that it may use, such as "512MiB".')],
    any_swap: Annotated[bool, typer.Option("--any-swap", help="With whatever swap there is, or none.")] = False,
    report: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the summary as JSON; - is stdout.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No summary on stderr.")] = False,
    *,
    node: ChosenNode,
) -> int:
    with at_once():
        from ramster.frontswap import swap
        from ramster.frontswap.cgroups import LIMIT_BYTES_MIN
        from ramster.frontswap.devices import swaps
        from ramster.frontswap.run import explain
        from ramster.frontswap.run import run as run_limited

    limit = size_option("--memory", memory)
    if limit < LIMIT_BYTES_MIN:
        raise UsageError(f"--memory is {memory!r}; allowed is {LIMIT_BYTES_MIN >> 20}MiB or more")
    path, patience = node.path, node.patience
    client = node.client(ANSWER_S)
    on, bad = swap.health(client, path.parent)
    while not on and swap.half_done(path.parent) and patience.left("waiting for a swap that is being switched on"):
        on, bad = swap.health(client, path.parent)
    if bad and not any_swap:
        raise Refused(f"{'; and '.join(bad)}; --any-swap runs the command all the same")
    for line in bad:
        say(line)
    if not any_swap and not on:
        raise Refused(
            "no RAMster swap is on, so what does not fit would have nowhere to go; "
            "make one (ramster swap on --size SIZE), or use --any-swap for what there is"
        )
    if not swaps():
        say("this machine has no swap: what does not fit is killed")

    def watch() -> str | None:
        return "; and ".join(swap.health(client, path.parent)[1]) or None

    summary = run_limited(command, limit, watch if on and not bad else lambda: None, say)
    if report is not None:
        text = json.dumps(asdict(summary), indent=2) + "\n"
        if report == "-":
            sys.stdout.write(text)
        else:
            try:
                Path(report).write_text(text)
            except OSError as error:
                say(f"cannot write {report}: {error.strerror}")
    if not quiet:
        for line in explain(summary):
            say(line)
    return summary.exit_code
