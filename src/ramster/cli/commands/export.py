"""`ramster export`: block devices that any NBD client can use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ramster.cli.commands.options import ChosenNode, JsonOption, for_node, say, size_option
from ramster.cli.complete import export_names
from ramster.errors import UsageError

app = typer.Typer(help="Block devices of this node, for any NBD client.", no_args_is_help=True)

CREATE_HELP = """Make an export and print its URIs, to be pasted into any NBD client.

It takes RAM for what is written to it alone; what is discarded is freed,
here and on lenders. It ends with the node.

Over TCP each client of the cluster may use it, or those alone that --allow
names: `ramster cluster client` makes their certificates. This machine's
nbd.sock is for the node's user and group in any case.

\b
Examples:
  ramster export create vm --size 1GiB
  nbdcopy disk.img "$(ramster export create disk --size 8GiB | head -1)"
  ramster export create data --size 8GiB --max-size 64GiB --json
  ramster export create vm --size 8GiB --allow web --allow backup
"""
LS_HELP = """Show every export: its size, what it holds here and away, who uses it.

\b
Examples:
  ramster export ls
  ramster export ls --json
"""
RM_HELP = """Remove an export and all that is in it, here and away.

Refused while clients use it. --force ends their connections first; their
further requests then fail.

\b
Examples:
  ramster export rm vm
  ramster export rm vm --force
"""
SET_HELP = """Let an export grow, be read-only or writable, or be for other clients. What is in it stays.

It grows up to the --max-size that it was made with; clients see the new size
when they connect the next time. --read-only and --read-write are refused
while clients use it, because a client learns which it is when it connects.

The names after --allow take the place of those that it was for. It counts for
new connections at once; those of clients that are not named are closed.

\b
Examples:
  ramster export set data --size 16GiB
  ramster export set data --read-only
  ramster export set data --allow web --allow backup
  ramster export set data --allow-all
  ramster export set data --read-write --size 32GiB
"""

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The export's name.")]
ExistingArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The export's name.", autocompletion=export_names)
]
SizeOption = Annotated[str, typer.Option("--size", metavar="SIZE", help='Its size, such as "8GiB".')]

AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="NAME", help="A client that may use it over TCP; may be repeated."),
]


@app.command("create", help=CREATE_HELP)
@for_node()
def create(
    name: NameArgument,
    size: SizeOption,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="How large it may ever grow; its size if not given."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Clients may not write.")] = False,
    allow: AllowOption = None,
    as_json: JsonOption = False,
    *,
    node: ChosenNode,
) -> None:
    size_bytes = size_option("--size", size)
    max_bytes = None if max_size is None else size_option("--max-size", max_size)
    client = node.awaited()
    export = client.create_export(name, size_bytes, max_bytes=max_bytes, read_only=read_only, allow=allow or ())
    _show(export, as_json, asked=bool(allow))


@app.command("ls", help=LS_HELP)
@for_node()
def ls(
    as_json: JsonOption = False,
    *,
    node: ChosenNode,
) -> None:
    exports = node.awaited().exports()
    if as_json:
        typer.echo(json.dumps({"exports": exports}, indent=2))
        return
    from ramster.cli.render import export_table
    from ramster.cli.tables import show

    show(*export_table(exports))
    for export in exports:
        for uri in export.get("uris") or []:
            typer.echo(uri)


@app.command("rm", help=RM_HELP)
@for_node()
def rm(
    name: ExistingArgument,
    force: Annotated[bool, typer.Option("--force", help="End the connections of its clients first.")] = False,
    as_json: JsonOption = False,
    *,
    node: ChosenNode,
) -> None:
    node.awaited().remove_export(name, force=force)
    typer.echo(json.dumps({"removed": name}) if as_json else f"removed the export {name}")


@app.command("set", help=SET_HELP)
@for_node()
def set_(
    name: ExistingArgument,
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help='Its new size, such as "16GiB"; it cannot shrink.')
    ] = None,
    read_only: Annotated[
        bool | None, typer.Option("--read-only/--read-write", help="Clients may not write, or may again.")
    ] = None,
    allow: AllowOption = None,
    allow_all: Annotated[bool, typer.Option("--allow-all", help="Every client of the cluster may use it.")] = False,
    as_json: JsonOption = False,
    *,
    node: ChosenNode,
) -> None:
    if size is None and read_only is None and not allow and not allow_all:
        raise UsageError("nothing to set; give --size, --read-only, --read-write, --allow or --allow-all")
    if allow and allow_all:
        raise UsageError("--allow and --allow-all both say who may use it; give one of them")
    size_bytes = None if size is None else size_option("--size", size)
    client = node.awaited()
    allowed = [] if allow_all else allow or None
    changed = client.change_export(name, size_bytes=size_bytes, read_only=read_only, allow=allowed)
    _show(changed, as_json, asked=allowed is not None)


def _show(export: Mapping[str, Any], as_json: bool, *, asked: bool) -> None:
    """URIs alone on stdout, so that a script can take them; what else there is to say on stderr. asked: for
    whom it is.
    """
    if as_json:
        typer.echo(json.dumps(export, indent=2))
        return
    if asked:
        from ramster.cli.render import for_whom

        # Nobody knows whether there are certificates of these names: a mistyped one lets nobody in.
        others = "; over TCP, clients whose certificate has another name are refused" if export.get("allow") else ""
        say(f"for: {for_whom(export)}{others}", by="")
    for note in export.get("notes") or []:
        say(note, by="")
    for uri in export.get("uris") or []:
        typer.echo(uri)
