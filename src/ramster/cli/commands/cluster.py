"""`ramster cluster`: makes a cluster's certificates and configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make a cluster.", no_args_is_help=True)

INIT_HELP = """Make an authority, and for each node a certificate, a key and a configuration.

Copy NAME.toml, NAME.crt, NAME.key and ca.crt to each node's machine, into
one directory. Keep ca.key to yourself: whoever has it can add nodes. Set
what a node lends in \\[lend] of its NAME.toml.

\b
Examples:
  ramster cluster init --directory lab --cluster lab \\
      --nodes alpha=192.0.2.1:7777,beta=192.0.2.2:7777
  ramster cluster init --directory lab --cluster lab \\
      --nodes 'alpha=[2001:db8::1]:7777,beta=[2001:db8::2]:7777'
"""


@app.callback()
def _root() -> None:
    # A callback keeps `cluster init` two words although init is alone.
    pass


@app.command("init", help=INIT_HELP)
def init(
    directory: Annotated[Path, typer.Option("--directory", metavar="DIR", help="A new or empty directory.")],
    cluster: Annotated[str, typer.Option("--cluster", metavar="ID", help="Name of the cluster.")],
    nodes: Annotated[
        str, typer.Option("--nodes", metavar="NAME=ADDRESS:PORT,...", help="Each node and where the others reach it.")
    ],
) -> None:
    from ramster.cli.cluster_files import create, parse_nodes

    written = create(directory, cluster, parse_nodes(nodes))
    typer.echo(f"made cluster {cluster} in {directory}; to start a node on its machine:")
    for path in written:
        typer.echo(f"  ramster node --config {path}")
