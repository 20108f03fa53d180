"""The command tree and the one place that turns errors into a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ramster import limits
from ramster.cli.commands import cluster, config, demo, doctor, export, node, run, status, stop, swap
from ramster.cli.commands.options import say
from ramster.errors import RamsterError

# What no command can foresee wherever it happens: no more descriptors, no more memory.
_OF_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

EXIT_USAGE = 2
EXIT_INTERNAL = 70  # EX_SOFTWARE
EXIT_OUTPUT = 74  # EX_IOERR
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_PIPE = 141  # 128 + SIGPIPE

app = typer.Typer(
    name="ramster",
    help="Machines pool their RAM: pages that do not fit are compressed, kept locally and moved to other nodes.",
    epilog="Start here: `ramster demo` runs two nodes on this machine and checks every page.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("demo", help=demo.HELP)(demo.demo)
app.command("node", help=node.HELP)(node.node)
app.command("status", help=status.HELP)(status.status)
app.command("stop", help=stop.HELP)(stop.stop)
app.command("run", help=run.HELP, context_settings=run.CONTEXT)(run.run)
app.command("doctor", help=doctor.HELP)(doctor.doctor)
app.add_typer(export.app, name="export")
app.add_typer(swap.app, name="swap")
app.add_typer(cluster.app, name="cluster")
app.add_typer(config.app, name="config")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ramster {version('ramster')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Prints every error once, on stderr, without a traceback."""
    if sys.stdout is None:  # closed by whoever started us: nobody wants the output
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0:
            return _unwritable(error)
        _let_go()
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result = _command()(
            args=None if arguments is None else list(arguments), prog_name="ramster", standalone_mode=False
        )
    except RamsterError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # the parser met the broken pipe first
            return EXIT_PIPE
        raise
    except Exception as error:
        if isinstance(error, OSError) and _of_output(error):
            return _unwritable(error)
        if hasattr(error, "format_message"):  # the parser's errors; their class moved between typer's releases
            return _usage(error)
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_LIMITS):
            limit = limits.reached(error, "go on")
            if limit is not None:
                return _fail(str(limit), limit.exit_code)
        if os.environ.get("RAMSTER_DEBUG"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}; this is a bug, "
            "please report it with the output of the same command under RAMSTER_DEBUG=1",
            EXIT_INTERNAL,
        )
    if result == EXIT_INTERRUPTED:  # newer parsers turn Ctrl-C into this result
        return _fail("interrupted", EXIT_INTERRUPTED)
    return result if isinstance(result, int) else 0


def _of_output(error: OSError) -> bool:
    """Whether an error is that of writing our output: what could not be written is still to be, and still cannot."""
    if isinstance(error, BrokenPipeError):
        return True
    if error.filename is not None:
        return False
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):  # PYTHONUNBUFFERED keeps nothing
        return True
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _unwritable(error: OSError) -> int:
    _let_go()
    if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
        return EXIT_PIPE
    return _fail(f"cannot write the output: {error.strerror or error}", EXIT_OUTPUT)


def _let_go() -> None:
    """What is left of the output goes nowhere: the interpreter's own flush at exit must not complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _command() -> Any:
    # Typed as Any: its class moved between typer's releases, its call did not.
    return typer.main.get_command(app)


def _usage(error: Any) -> int:
    message = str(error.format_message())
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        if message.strip():  # with rich the help was printed when the error was made
            typer.echo(message, err=True)
        return EXIT_USAGE
    command = context.command_path if context is not None else "ramster"
    return _fail(f"{message.rstrip('.')}; `{command} --help` shows what is allowed", EXIT_USAGE)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be as full as stdout
        say(message)
    return code
