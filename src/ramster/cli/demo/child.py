"""Runs a command that dies with its parent: `python -m ramster.cli.demo.child PARENT_PID COMMAND...`.

Without it a demo that is killed with SIGKILL would leave its nodes behind. Set here, between fork and exec, because
subprocess's preexec_fn is not safe in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
