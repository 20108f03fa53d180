"""The folder of a node's sockets: nobody else may put something there, or take it away.

Whoever may write to it can replace a socket, and then programs hand their memory to him. Made here, it has a mode that
keeps others out; one that exists is looked at.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ramster import limits
from ramster.errors import PermissionMissing, UsageError

MODE = 0o750


def prepare(run_dir: Path) -> None:
    """Make it, or look at the one that is there. UsageError, PermissionMissing, LimitReached: it will not do."""
    try:
        run_dir.mkdir(mode=MODE, parents=True, exist_ok=True)
        status = run_dir.stat()
    except FileExistsError as error:
        raise UsageError(f"{run_dir} is no directory; set another run_dir in [node]") from error
    except PermissionError as error:
        raise PermissionMissing(f"cannot make {run_dir}: set another run_dir in [node]") from error
    except OSError as error:
        if (limit := limits.reached(error, f"use {run_dir}", "the node")) is not None:
            raise limit from error
        why = (error.strerror or str(error)).lower()
        raise UsageError(f"cannot use {run_dir}: {why}; set another run_dir in [node]") from error
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(
            f"{run_dir} belongs to user {status.st_uid}, and this node runs as user {os.geteuid()}: sockets in there "
            "could be replaced; set another run_dir in [node]"
        )
    if status.st_mode & 0o002:
        raise UsageError(
            f"{run_dir} has mode {stat.S_IMODE(status.st_mode):04o}: everybody could replace sockets in there; "
            "chmod o-w, or set another run_dir in [node]"
        )
