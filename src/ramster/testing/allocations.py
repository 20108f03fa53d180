"""Whether a thread asked the kernel for memory: page faults and memory system calls, counted from outside.

For any thread of any process that this user may trace, so that the same test can be held against a store, an NBD
connection or a whole node. Counts are per thread: what others allocate meanwhile is not its concern.
"""

from __future__ import annotations

import re
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

ATTACH_S: Final = 10.0
_CALL: Final = re.compile(r"^(\d+)\s+(\w+\(.*)$")


def minor_faults(tid: int, pid: int | str = "self") -> int:
    """Page faults of a thread so far that needed no I/O, and those that did."""
    fields = Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]) + int(fields[9])


class MemoryCalls:
    """Memory system calls (mmap, brk, mlock, madvise ...) of every thread of a process inside the block.

    `of(tid)` afterwards: those of one thread, as strace writes them. FileNotFoundError without strace,
    PermissionError where tracing is not allowed.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._calls: list[tuple[int, str]] = []

    def of(self, tid: int) -> list[str]:
        return [call for thread, call in self._calls if thread == tid]

    def __enter__(self) -> Self:
        strace = shutil.which("strace")
        if strace is None:
            raise FileNotFoundError("strace is not installed")
        self._output = tempfile.NamedTemporaryFile("r", prefix="ramster-", suffix=".strace")
        command = [
            strace,
            "-f",
            "-e",
            "trace=memory",
            "-e",
            "signal=none",
            "-o",
            self._output.name,
            "-p",
            str(self._pid),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        # Said once all threads are attached. strace writes it at once and whole, so a line is ready when anything is.
        said = ""
        while " attached" not in said:
            ready = select.select([self._process.stderr], [], [], ATTACH_S)[0]
            line = self._process.stderr.readline() if ready else ""
            said += line
            if not line:
                self._process.kill()
                self._process.wait()
                self._close()
                raise PermissionError(f"strace cannot attach: {said.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGINT)  # it lets go of the process and ends
        self._process.communicate(timeout=ATTACH_S)
        for line in self._output.read().splitlines():
            if found := _CALL.match(line):
                self._calls.append((int(found[1]), found[2]))
        self._close()

    def _close(self) -> None:
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._output.close()
