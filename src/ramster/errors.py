"""Every error that a user can meet: a stable code, an exit status, whose fault it is, whether trying again can help.

Codes go over sockets and into scripts: they are never changed and never used again for something else. The first
paragraph of a docstring says what happened, the second what to do; docs/errors.md is made of both.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

Blame = Literal["caller", "peer", "self", "environment"]


class RamsterError(Exception):
    """An internal fault of RAMster that has no class of its own.

    Report it with the message; no page is wrong because of it.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1
    blame: ClassVar[Blame] = "self"
    retryable: ClassVar[bool] = False


class UsageError(RamsterError):
    """A command or a call got an argument that makes no sense.

    The message names the argument and what is allowed; nothing was changed.
    """

    code = "usage"
    exit_code = 2
    blame = "caller"


class ConfigError(RamsterError):
    """The configuration file is missing, unreadable or says something that is not allowed.

    Each line of the message names file, line, key, what was given and what is allowed; nothing was started.
    """

    code = "config"
    exit_code = 3
    blame = "caller"


class NodeUnreachable(RamsterError):
    """No node answers at the socket.

    Start it (`ramster node --config FILE`) or name the right socket (RAMSTER_SOCKET); what it keeps is untouched.
    """

    code = "node-unreachable"
    exit_code = 4
    blame = "environment"
    retryable = True


class NodeAbsent(NodeUnreachable):
    """Nobody listens at the socket: the node does not run, or not yet. Of one that is slow this is not said."""


class Refused(RamsterError):
    """The node understood and says no, for example to a stop that would lose pages.

    The message says why and what would be lost; `--force` where the command offers it.
    """

    code = "refused"
    exit_code = 5
    blame = "peer"


class RegionLost(RamsterError):
    """Pages of a region had their only copy on a node that is gone or out of reach; `runs` lists them.

    Those pages give SIGBUS when touched; every other page of the region is right and stays usable.
    """

    code = "region-lost"
    exit_code = 6
    blame = "peer"

    def __init__(self, message: str, runs: Iterable[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        #: (first page, number of pages), ascending
        self.runs: list[tuple[int, int]] = [(first, count) for first, count in runs]


class PageLost(RamsterError):
    """A stored page cannot be had: its only copy was on a node that is gone, or its checksum or tag is wrong.

    The page is reported lost for good until it is put again or flushed; it is never replaced by other bytes.
    """

    code = "page-lost"
    exit_code = 6
    blame = "peer"


class PoolGone(RamsterError):
    """A pool was destroyed, and something still uses its id, which no other pool of this node ever gets.

    Nothing was read or changed; make a pool anew and use its id.
    """

    code = "pool-gone"
    exit_code = 17
    blame = "caller"


class KernelUnsupported(RamsterError):
    """The kernel lacks something that cannot be done without, such as write-protection on shared memory (Linux 5.19).

    The message names the feature and the Linux version that has it; the rest of RAMster works.
    """

    code = "kernel-unsupported"
    exit_code = 7
    blame = "environment"


class PermissionMissing(RamsterError):
    """The process may not do what is needed, such as making a userfaultfd or locking memory.

    The message names one sentence of what to do; nothing was changed.
    """

    code = "permission-missing"
    exit_code = 8
    blame = "environment"


class UntrustedNode(RamsterError):
    """The process that listens at a node's socket is another user's, or others could have put the socket there.

    The message names the user; nothing was sent. Name the socket of a node of your own or of root (RAMSTER_SOCKET).
    """

    code = "untrusted-node"
    exit_code = 8
    blame = "environment"


class RegionFull(RamsterError):
    """Neither the arena nor a lender took a page within the bounded wait, or the resident budget is all pinned.

    The page stays where it was, resident and right; free pages, unpin, or add a lender, then try again.
    """

    code = "region-full"
    exit_code = 9
    blame = "environment"
    retryable = True


class StoreFull(RamsterError):
    """The arena is full and nothing left it within the bounded wait.

    The put was refused and changed nothing: an older page under the same key still is what a get returns (in an
    ephemeral pool it is gone, so that no reader sees stale bytes).
    """

    code = "store-full"
    exit_code = 9
    blame = "environment"
    retryable = True


class ForkedError(RamsterError):
    """A region or client was used in a process that did not create it (after `fork`).

    Connect anew in the child; the parent's region is not affected.
    """

    code = "forked"
    exit_code = 10
    blame = "caller"


class CertificateError(RamsterError):
    """A certificate or key is missing, expired, of another cluster, of another node, or would be overwritten.

    The message names the file and what is wrong with it; `ramster cluster init` makes a set; no file was changed.
    """

    code = "certificate"
    exit_code = 11
    blame = "caller"


class ProtocolError(RamsterError):
    """The other side sent what the protocol does not allow: garbage, a wrong version, a size over its limit.

    The connection was closed and the event counted; nothing that was sent was used.
    """

    code = "protocol"
    exit_code = 12
    blame = "peer"


class PortTaken(RamsterError):
    """Another process listens on the address.

    Stop it, or set another `listen` in `[links]`.
    """

    code = "port-taken"
    exit_code = 13
    blame = "environment"


class ToolMissing(RamsterError):
    """A program that the command needs is not installed.

    The message names it and Debian's package; nothing was changed.
    """

    code = "tool-missing"
    exit_code = 14
    blame = "environment"


class RegionBusy(RamsterError, BufferError):
    """A region cannot be closed: arrays or memoryviews of it exist, or another thread is inside one of its methods.

    Nothing was changed; delete the arrays (views, tracebacks and `_` hold them too) or wait, then close it.
    """

    code = "region-busy"
    exit_code = 15
    blame = "caller"
    retryable = True


class LimitReached(RamsterError):
    """A limit of the system on a process is reached: descriptors, address space, memory or threads.

    The message names the process and the limit (`ulimit -n`, `ulimit -v` ...); nothing was changed.
    """

    code = "limit-reached"
    exit_code = 16
    blame = "environment"
    retryable = True


def every_error() -> Iterator[type[RamsterError]]:
    """RamsterError and the subclasses declared here, in that order."""
    yield RamsterError
    yield from (cls for cls in RamsterError.__subclasses__() if cls.__module__ == __name__)


def from_code(code: str, message: str, runs: Iterable[tuple[int, int]] = ()) -> RamsterError:
    """The error that travelled as `code` and `message`; `runs` matters for RegionLost alone.

    A code that this version does not know becomes a RamsterError that shows the code.
    """
    if code == RegionLost.code:
        return RegionLost(message, runs)
    for cls in every_error():
        if cls.code == code:
            return cls(message)
    return RamsterError(f"{message} ({code})")
