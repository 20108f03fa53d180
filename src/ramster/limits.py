"""Limits of the system that a process runs into: which one it was, in words that name the knob."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from typing import Final

from ramster.errors import LimitReached

# 256 regions of 32 processes with four each, 1024 NBD connections with two, and as much again.
DESCRIPTORS: Final = 65536
_NO_ROOM: Final = (errno.ENOMEM, errno.ENOBUFS)


def reached(error: BaseException, doing: str, who: str = "this process") -> LimitReached | None:
    """What to raise in the place of `error` where a limit is behind it, else None. doing: what failed, as "make a
    region".
    """
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE:
        return descriptors(doing, who)
    if number == errno.ENFILE:
        return LimitReached(f"cannot {doing}: this machine has as many files open as it may (sysctl fs.file-max)")
    if isinstance(error, MemoryError) or number in _NO_ROOM:
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            return LimitReached(
                f"cannot {doing}: {who} may have {soft} bytes of address space; raise the limit (ulimit -v)"
            )
        return LimitReached(
            f"cannot {doing}: the system gives {who} no more memory "
            "(RAM, vm.overcommit_memory, vm.max_map_count or a limit of its control group)"
        )
    if number == errno.EAGAIN or (isinstance(error, RuntimeError) and "start new thread" in str(error)):
        return LimitReached(
            f"cannot {doing}: the system gives {who} no more threads "
            "(ulimit -u, ulimit -v, TasksMax= of a service, or pids.max of its control group)"
        )
    return None


def descriptors(doing: str, who: str = "this process") -> LimitReached:
    """As `reached`, where it is known that descriptors ran out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = f" (up to {hard} without root)" if soft != hard else ""
    return LimitReached(
        f"cannot {doing}: {who} has as many descriptors open as it may, {soft}; "
        f"raise the limit (ulimit -n, LimitNOFILE= of a service){more}, or close what is not needed"
    )


@contextlib.contextmanager
def named(doing: str, who: str = "this process") -> Iterator[None]:
    """What fails inside for a limit of the system raises LimitReached."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        limit = reached(error, doing, who)
        if limit is None:
            raise
        raise limit from error


def raise_descriptors() -> int:
    """Let this process open as many as a node ever needs, as far as it may without asking; how many it then may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
