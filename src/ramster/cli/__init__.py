"""The command line. Talks to a node's control socket; `main` is the only place that prints errors."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command (default: the process's own arguments) and returns its exit code (listed in docs/cli.md)."""
    from ramster.signals import at_once

    with at_once():
        from ramster.cli.app import main as run

    return run(arguments)
