"""Arrays larger than their RAM budget: the application's API.

A `Region` is memory of which only a part is in RAM; the node keeps the rest compressed, here or on other nodes, and
brings a page back when it is touched. Sizes and ranges are bytes here; the node works in pages of 4096 bytes and
ranges are rounded outwards to them.

Everything acts in the process that made it. After `fork` every method raises ForkedError in the child and a touch of
the memory is SIGSEGV; the parent does not notice.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, SupportsIndex

from ramster.config.paths import canonical_socket, default_run_dir
from ramster.constants import REGION_SOCKET
from ramster.errors import ForkedError, RegionBusy, UsageError
from ramster.frontswap import arguments, capacity, messages
from ramster.frontswap.capacity import Capacity
from ramster.frontswap.region import Pin, Region, close_after
from ramster.frontswap.region_control import Control
from ramster.frontswap.region_statistics import RegionStatistics

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from ramster.frontswap.arguments import Shape, Size

__all__ = [
    "Client",
    "Pin",
    "Region",
    "RegionStatistics",
    "attach",
    "connect",
    "default_client",
    "empty",
    "region_of",
    "zeros",
]

# From a view to its owner in turn; numpy itself keeps it to two or three.
_OWNERS_MAX: Final = 1000


class Client:
    """Makes regions at one node, and attaches to those of other processes. Cheap: each region has its own connection.

    socket: path of the node's region socket; None: $RAMSTER_SOCKET, else region.sock in the default run directory.
    Raises NodeUnreachable, PermissionMissing, UntrustedNode (the socket is in a folder where others may put one),
    UsageError (it is no region socket).

    Attributes: socket, its path; creator, the process that made it.
    """

    def __init__(self, socket: str | Path | None = None) -> None:
        given = os.environ.get("RAMSTER_SOCKET") or None if socket is None else socket
        self.socket = (
            default_run_dir() / REGION_SOCKET if given is None else canonical_socket(arguments.path("socket", given))
        )
        self.creator = os.getpid()
        self._regions: weakref.WeakSet[Region] = weakref.WeakSet()
        Control(self.socket).hang_up()

    def region(
        self,
        nbytes: Size,
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> Region:
        """A new region of `nbytes` bytes, of which at most `resident` are in RAM; see Region for arguments and errors.

        Raises what Region raises, and ForkedError; nothing is left behind then.
        """
        if self.creator != os.getpid():
            raise ForkedError("a client belongs to the process that made it; connect anew in the child")
        made = Region(self.socket, nbytes, resident=resident, name=name, full=full)
        self._regions.add(made)
        return made

    def attach(self, name: str | SupportsIndex) -> Region:
        """A region that another process of the same user has made, by its name or its number (`Region.number`).

        The same memory, at another address: what one process writes the others read at once, as with any shared memory,
        and it is up to them to take turns. Whichever process ends first, the region lives on with the others.

        Raises UsageError (no such region, or several of that name; the message says which there are),
        PermissionMissing (another user's region, or userfaultfd is not permitted), Refused (too many processes),
        KernelUnsupported, NodeUnreachable, ForkedError. Nothing is left behind then.
        """
        if self.creator != os.getpid():
            raise ForkedError("a client belongs to the process that made it; connect anew in the child")
        found = Region.attached(self.socket, name)
        self._regions.add(found)
        return found

    def empty(
        self,
        shape: Shape,
        dtype: DTypeLike = float,
        order: arguments.Order = "C",
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> NDArray[Any]:
        """A numpy array of this shape (in items) in a region of its own, which lives as long as the array; see
        ramster.empty for arguments and errors.

        Raises what ramster.empty raises, and ForkedError; nothing is left behind then.
        """
        sides, kind = arguments.layout(shape, dtype)
        placed = arguments.order(order)
        size = max(1, kind.itemsize * math.prod(sides))
        return self.region(size, resident=resident, name=name, full=full).array(sides, kind, order=placed)

    def zeros(
        self,
        shape: Shape,
        dtype: DTypeLike = float,
        order: arguments.Order = "C",
        *,
        resident: Size | None = None,
        name: str | None = None,
        full: messages.WhenFull = "fail",
    ) -> NDArray[Any]:
        """As `empty`, with the same arguments: fresh memory is zeros and costs nothing until touched.

        Raises what `empty` raises.
        """
        return self.empty(shape, dtype, order, resident=resident, name=name, full=full)

    def capacity(self) -> Capacity:
        """What arena, lenders and spill file of the node can take now, in bytes: a Capacity. Makes nothing.

        Raises NodeUnreachable, Refused.
        """
        control = Control(self.socket)
        try:
            return capacity.decode(control.ask(messages.Capacity(version=messages.VERSION)).capacity)
        finally:
            control.hang_up()

    def close(self) -> None:
        """Close every region of this client; again: does nothing. It can make others afterwards.

        Raises RegionBusy where one is in use (the others are closed), ForkedError.
        """
        busy: RegionBusy | None = None
        for region in list(self._regions):
            try:
                region.close()
            except RegionBusy as error:
                busy = error
        if busy is not None:
            raise busy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_after(self, error)


_default: Client | None = None
_default_lock = threading.Lock()


def _renew_lock() -> None:
    global _default_lock
    _default_lock = threading.Lock()


# Another thread of the parent may hold it at the moment of the fork.
os.register_at_fork(after_in_child=_renew_lock)


def connect(socket: str | Path | None = None) -> Client:
    """A client of the node at `socket`, a path; see Client. Raises what Client raises."""
    return Client(socket)


def default_client() -> Client:
    """The one of this process behind `ramster.empty`; made on first use."""
    global _default
    with _default_lock:
        if _default is None or _default.creator != os.getpid():
            _default = Client()
        return _default


def attach(name: str | SupportsIndex) -> Region:
    """A region that another process of this user has made, by its name or its number: `Client.attach` with the default
    client of this process. Raises what that raises.
    """
    return default_client().attach(name)


def empty(
    shape: Shape,
    dtype: DTypeLike = float,
    order: arguments.Order = "C",
    *,
    resident: Size | None = None,
    name: str | None = None,
    full: messages.WhenFull = "fail",
) -> NDArray[Any]:
    """A numpy array that may be larger than the RAM it uses, in a region of its own at this machine's node.

    The region lives as long as the array and its views; `ramster.region_of(array)` is it, with `pin`, `prefetch`,
    `evict` and `statistics`. The array reads as zeros until it is written.

    shape, dtype, order ("C" or "F"): as for numpy.empty; types that hold Python objects are refused.
    resident: RAM budget in bytes, or a size such as "64MiB"; None: the node's default.
    name: shown by `ramster status`, and what other processes attach by.
    full: "fail" or "wait": what becomes of a write when no page can leave RAM any more. Either ends in SIGBUS, "wait"
    much later; see ramster.Region. A CapacityWarning comes now where the array may outgrow what there is.

    Uses the default client of this process: $RAMSTER_SOCKET, else the default run directory.

    Raises UsageError (the message names the argument), NodeUnreachable, PermissionMissing (userfaultfd is not
    permitted), KernelUnsupported, Refused (over the node's limits), RegionFull.
    """
    return default_client().empty(shape, dtype, order, resident=resident, name=name, full=full)


def zeros(
    shape: Shape,
    dtype: DTypeLike = float,
    order: arguments.Order = "C",
    *,
    resident: Size | None = None,
    name: str | None = None,
    full: messages.WhenFull = "fail",
) -> NDArray[Any]:
    """As `ramster.empty`, with the same arguments and errors: fresh memory is zeros and costs nothing until touched."""
    return default_client().zeros(shape, dtype, order, resident=resident, name=name, full=full)


def region_of(array: NDArray[Any] | memoryview) -> Region:
    """The region that an array or memoryview lies in. Raises UsageError where it lies in none."""
    owner: Any = array
    for _ in range(_OWNERS_MAX):
        if owner is None:
            break
        if isinstance(owner, Region):
            return owner
        try:
            owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
        except Exception:  # a memoryview that was released, or an object of whatever kind
            break
    raise UsageError(f"array: {arguments.shown(array)}, does not lie in a region")
