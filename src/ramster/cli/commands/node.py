"""`ramster node`: runs a node in the foreground until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ramster.errors import UsageError
from ramster.signals import at_once

HELP = """Run a node in the foreground until `ramster stop`, Ctrl-C or SIGTERM.

The configuration file says its name, its peers, how much RAM it uses and
how much it lends. `ramster cluster init` writes one per node, `ramster
config list` explains each knob.

\b
Examples:
  ramster node --config lab/alpha.toml
"""


def node(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="This node's configuration file (TOML).")],
) -> int:
    if not __debug__:
        raise UsageError("a node keeps its assertions on; run it without python -O and without PYTHONOPTIMIZE")
    with at_once():
        from ramster.config import load

        settings = load(config)
        # After the file is known to be good: the node's imports are the slow part.
        from ramster.node.main import run

    return run(settings)
