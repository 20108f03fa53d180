"""Where the node keeps its sockets, and where a client looks for them."""

import os
from pathlib import Path

from ramster.constants import CONTROL_SOCKET, NBD_SOCKET, REGION_SOCKET

#: What `default_run_dir` does, for help texts.
DEFAULT_RUN_DIR_RULE = "/run/ramster as root, else $XDG_RUNTIME_DIR/ramster, else /tmp/ramster-UID"


def default_run_dir() -> Path:
    """The run directory that a node and its clients agree on without being told; it may not exist."""
    if os.geteuid() == 0:
        return Path("/run/ramster")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "ramster"
    return Path(f"/tmp/ramster-{os.geteuid()}")


def region_socket(run_dir: Path) -> Path:
    """Where applications connect."""
    return run_dir / REGION_SOCKET


def control_socket(run_dir: Path) -> Path:
    """Where `ramster status` and `ramster stop` connect."""
    return run_dir / CONTROL_SOCKET


def nbd_socket(run_dir: Path) -> Path:
    """Where NBD clients connect."""
    return run_dir / NBD_SOCKET
