"""`ramster cluster`: makes a cluster's certificates and configuration files, certificates of clients, renews one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ramster.cli.complete import node_names

app = typer.Typer(help="Make a cluster, let clients in, renew its certificates.", no_args_is_help=True)

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
  ramster cluster init --directory one --cluster one --nodes alpha=127.0.0.1:7777
"""
RENEW_HELP = """Sign a node's certificate anew, where ca.key is: for two more years, for other addresses.

NBD clients refuse a node whose certificate does not have what stands in
their URI. It has the node's name and the address that `cluster init` was
told. Each --address is one more that clients may use, and together they
replace those it has; without any, it keeps them.

The node's key stays, so that the new DIR/NODE.crt is all there is to copy
to its machine. The node reads it for the next connection, without a restart.
Copies of the old one stay valid until they expire. Where nothing would change, nothing does.

\b
Examples:
  ramster cluster renew alpha --directory lab
  ramster cluster renew alpha --directory lab \\
      --address 192.0.2.1 --address storage.example.org
"""


CLIENT_HELP = """Make a certificate for a client of block devices, where ca.key is.

The new folder DIR/clients/NAME has what libnbd, QEMU and nbdfuse look for:
ca-cert.pem, client-cert.pem and client-key.pem. Copy it to the client's
machine. Whoever has it can use the exports that are for everybody and those
that allow NAME, and nothing else: no node takes it for another node.

It is valid for two years. For another one, remove the folder first; a copy
of the old one stays valid until its end, so where it is in wrong hands take
NAME off the exports' allow lists.

\b
Examples:
  ramster cluster client web --directory lab
  nbdinfo 'nbds://192.0.2.1/vm?tls-certificates=lab/clients/web'
"""


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
    typer.echo(f"made cluster {cluster} in {_quoted(directory)}; to start a node on its machine:")
    for path in written:
        typer.echo(f"  ramster node --config {_quoted(path)}")


@app.command("renew", help=RENEW_HELP)
def renew(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node's name.", autocompletion=node_names)],
    directory: Annotated[Path, typer.Option("--directory", metavar="DIR", help="Where ca.key and NODE.crt are.")],
    address: Annotated[
        list[str] | None,
        typer.Option("--address", metavar="HOST", help="An IP address or a host name of it; may be repeated."),
    ] = None,
) -> None:
    from ramster.cluster import identity

    before, after = identity.renew_node(directory, node, address)
    path = identity.node_files(directory, node).cert
    said = f"for {', '.join(after.hosts)}; valid until {after.not_after:%Y-%m-%d}"
    if after == before:
        typer.echo(f"{_quoted(path)} stays as it is: {said}")
        return
    typer.echo(f"{_quoted(path)} is new: {said}")
    if gone := [host for host in before.hosts if host not in after.hosts]:
        typer.echo(f"no longer for {', '.join(gone)}")
    typer.echo(f"copy it over the old one on the machine of {node}, which reads it for the next connection")


@app.command("client", help=CLIENT_HELP)
def client(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client's name, none of a node's.")],
    directory: Annotated[Path, typer.Option("--directory", metavar="DIR", help="Where ca.key is.")],
) -> None:
    from ramster.cluster import identity

    files = identity.add_client(directory, name)
    until = identity.describe(files.cert).not_after
    typer.echo(f"made {_quoted(files.cert.parent)} for client {name}; valid until {until:%Y-%m-%d}")
    typer.echo("copy the folder to the client's machine; its URIs end in ?tls-certificates=FOLDER")


def _quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))
