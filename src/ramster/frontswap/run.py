"""A command in a memory cgroup of its own: what does not fit goes to swap, and at the end one knows how much did.

The command gets our terminal, our standard files and our process group. It is in the group before its first
instruction. The group never stays behind: not after an error, and not after a `kill -9` of this process, for which a
second process waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from ramster.config.units import counted
from ramster.constants import PAGE_BYTES
from ramster.errors import UsageError
from ramster.frontswap.cgroups import Group, name_for, remove, stale, table

PREFIX: Final = "ramster-run"
SAMPLE_S: Final = 0.2  # for peaks that the kernel does not keep
WATCH_S: Final = 1.0  # between two looks at what the swap depends on
WATCHER_ENDS_S: Final = 5.0  # one look may wait for a node that is slow to answer
NOT_EXECUTABLE: Final = 126  # as shells count
NOT_FOUND: Final = 127
_SI_KERNEL: Final = 0x80
# What a process manager or a person sends to a process. From the terminal they reach the command anyway.
FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the command did. None: this kernel does not say.

    pages_in, pages_out: swapped, of this group, or, where machine_wide, of all processes in that time. stalled_*:
    time in which some task, or all of them, waited for memory. left: processes that still ran at its end, killed.
    broken: what was wrong with the swap meanwhile, and what to do; None: nothing.
    """

    exit_code: int
    seconds: float
    limit_bytes: int
    peak_bytes: int
    swap_peak_bytes: int | None
    swap_sampled: bool
    pages_out: int
    pages_in: int
    machine_wide: bool
    stalled_some_s: float | None
    stalled_full_s: float | None
    oom_kills: int | None
    left: int
    cgroup: int
    broken: str | None = None


#: What is wrong with the swap that a command depends on; None: nothing. Called by a thread of its own.
Watch = Callable[[], str | None]
Say = Callable[[str], None]


class _Watcher:
    """Looks at the swap while the command runs, and says once, at that moment, what is wrong with it."""

    def __init__(self, watch: Watch, say: Say) -> None:
        self._watch, self._say = watch, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="ramster-watch", daemon=True)
        self._lock = threading.Lock()
        self._found: str | None = None

    def start(self) -> None:
        """After the forks: the thread is in none of them."""
        self._thread.start()

    def _loop(self) -> None:
        while not self._over.wait(WATCH_S) and self._look() is None:
            pass

    def _look(self) -> str | None:
        found = self._watch()
        with self._lock:
            if found is not None and self._found is None:
                self._found = found
                self._say(f"while the command runs: {found}")
            return self._found

    def end(self, failed: bool) -> str | None:
        """What was found. failed: the command did, so it is worth one more look."""
        self._over.set()
        self._thread.join(WATCHER_ENDS_S)
        return self._look() if failed and not self._thread.is_alive() else self._found


def run(command: Sequence[str], limit_bytes: int, watch: Watch = lambda: None, say: Say = lambda _: None) -> Summary:
    """Runs it to its end. Its exit code is 128 + n when signal n ended it, 127 and 126 when it could not be started.

    watch: is asked again and again while it runs; what it finds goes to `say` at once and into the summary.
    UsageError for such a one, after nothing was left; PermissionMissing and KernelUnsupported from the cgroup.
    """
    for path in stale(PREFIX):
        with contextlib.suppress(OSError):  # one with processes may belong to another PID namespace
            path.rmdir()
    group = Group(name_for(PREFIX, os.getpid()))
    try:
        group.limit(limit_bytes)
        with _guardian(group):
            return _run(command, limit_bytes, group, _Watcher(watch, say))
    finally:
        group.remove()


class CannotStart(UsageError):
    """The command is not there, or is no program."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # of this one, not of the class: 126 or 127, as shells have it


def _run(command: Sequence[str], limit_bytes: int, group: Group, watcher: _Watcher) -> Summary:
    watched = {*FORWARDED, signal.SIGCHLD}
    before_mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    # An ignored SIGCHLD would take the child's exit code with it.
    before_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        vm_before = table(Path("/proc/vmstat").read_text())
        started = time.monotonic()
        pid = _start(command, group, before_mask)
        watcher.start()
        swap_peak, memory_peak, status = 0, 0, None
        while status is None:
            caught = signal.sigtimedwait(watched, SAMPLE_S)
            if caught is not None and caught.si_signo != signal.SIGCHLD and caught.si_code != _SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, caught.si_signo)
            swap_peak = max(swap_peak, group.swap_now() or 0)
            memory_peak = max(memory_peak, group.memory_now())
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
        seconds = time.monotonic() - started
        vm_after = table(Path("/proc/vmstat").read_text())
    finally:
        signal.signal(signal.SIGCHLD, before_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before_mask)
    counted = group.swapped_pages()
    pages_in, pages_out = counted or tuple(vm_after[name] - vm_before[name] for name in ("pswpin", "pswpout"))
    stalled = group.stalled_us()
    kept_peak = group.swap_peak()
    exit_code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Summary(
        exit_code=exit_code,
        seconds=seconds,
        limit_bytes=limit_bytes,
        peak_bytes=group.memory_peak() or memory_peak,
        swap_peak_bytes=None if group.swap_now() is None else max(swap_peak, kept_peak or 0),
        swap_sampled=kept_peak is None,
        pages_out=pages_out,
        pages_in=pages_in,
        machine_wide=counted is None,
        stalled_some_s=None if stalled is None else stalled[0] / 1e6,
        stalled_full_s=None if stalled is None else stalled[1] / 1e6,
        oom_kills=group.oom_kills(),
        left=group.remove(),
        cgroup=group.version,
        broken=watcher.end(failed=exit_code != 0),
    )


def _start(command: Sequence[str], group: Group, mask: set[int | signal.Signals]) -> int:
    """The child's pid, once it is the command. CannotStart, OSError (the group does not take it)."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _become(command, group, mask, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        failed = pipe.read(8)  # exec closes the other end
    if not failed:
        return pid
    os.waitpid(pid, 0)
    joined, number = struct.unpack("ii", failed)
    if not joined:
        raise OSError(number, f"cannot enter {group.path}: {os.strerror(number)}")
    code = NOT_FOUND if number in (2, 20) else NOT_EXECUTABLE  # ENOENT, ENOTDIR
    raise CannotStart(f"cannot run {command[0]!r}: {os.strerror(number)}; name a program, then its arguments", code)


def _become(command: Sequence[str], group: Group, mask: set[int | signal.Signals], writer: int) -> NoReturn:
    """In the child. What Python ignores for itself (SIGPIPE) the command must not inherit."""
    joined = False
    try:
        group.join()
        joined = True
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(writer, struct.pack("ii", joined, error.errno or 0))
    finally:
        os._exit(NOT_EXECUTABLE)


@contextlib.contextmanager
def _guardian(group: Group) -> Iterator[None]:
    """A process that removes the group should this one be killed; it ends with the block."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()  # Ctrl-C is not meant for it
            os.close(writer)
            for number in (0, 1, 2):  # nobody who reads our output waits for it
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_RDWR), number)
            if not os.read(reader, 1):
                remove(group.paths)
        finally:
            os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.write(writer, b"x")
        os.close(writer)
        os.waitpid(pid, 0)


def explain(summary: Summary) -> list[str]:
    """The summary in lines for people."""

    def size(amount: int | None) -> str:
        return "not available on this kernel" if amount is None else f"{amount / (1 << 20):,.1f} MiB"

    def seconds(amount: float | None) -> str:
        return "not available on this kernel" if amount is None else f"{amount:.2f} s"

    whose = "of the whole machine meanwhile; this kernel does not count them for each cgroup"
    paged = f"{summary.pages_out:,} out ({size(summary.pages_out * PAGE_BYTES)}), {summary.pages_in:,} in"
    lines = [
        f"exit code {summary.exit_code} after {summary.seconds:.1f} s",
        f"RAM        peak {size(summary.peak_bytes)} of {size(summary.limit_bytes)}",
        f"in swap    peak {size(summary.swap_peak_bytes)}"
        + (" (sampled)" if summary.swap_sampled and summary.swap_peak_bytes is not None else ""),
        f"pages      {paged}" + (f" ({whose})" if summary.machine_wide else ""),
        f"stalled    {seconds(summary.stalled_some_s)}"
        + ("" if summary.stalled_full_s is None else f", {seconds(summary.stalled_full_s)} of it all tasks at once"),
    ]
    if summary.oom_kills:
        lines.append(
            f"OOM        {counted(summary.oom_kills, 'kill')}: "
            + (
                "the swap took nothing any more, see below"
                if summary.broken
                else "neither the limit nor the swap had room; raise --memory or add swap (ramster swap on --size ...)"
            )
        )
    if summary.broken:
        lines.append(f"swap       {summary.broken}")
    if summary.left:
        lines.append(f"ended      {summary.left} process{'es' * (summary.left > 1)} that the command had left running")
    return lines
