"""What callers of the region API may give, made into what the node works with.

Sizes, shapes, types, names, ranges and paths: each is taken as numpy (or `open`) would take it, or refused with one
UsageError that names the argument, shows the value and says what is allowed. Nothing here touches a region's memory, so
that an argument can be shown whose pages are lost.
"""

from __future__ import annotations

import contextlib
import operator
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, SupportsIndex, TypeAlias

from ramster.config.units import SIZE_RULE, parse_bytes
from ramster.constants import PAGE_BYTES, POOL_PAGES_MAX
from ramster.errors import UsageError
from ramster.frontswap.messages import NAME_MAX, NAME_RULE, is_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer

    Size: TypeAlias = SupportsIndex | str
    """Bytes, or text such as "64MiB"."""
    Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | NDArray[np.integer[Any]]
    Range: TypeAlias = slice | range | tuple[Size, Size] | NDArray[Any] | Buffer | None
    """A part of a region: a slice, a range or (start, stop) in bytes, an array or other buffer that lies in it, or None
    for all of it."""

Order: TypeAlias = Literal["C", "F"]

RANGE_RULE: Final = (
    "a slice, a range or a tuple (start, stop) in bytes, an array or memoryview that lies in the region, or None"
)
SHAPE_RULE: Final = "an integer or a sequence of integers, none of them negative"
# Far above what any numpy allows; only so that a long array given as a shape is not read through.
_SIDES_MAX: Final = 1024
_NUMBER_MAX: Final = (1 << 63) - 1
_SHOWN_BITS: Final = 256


def shown(value: object) -> str:
    """A value for a message: short, and never by reading an array."""
    if isinstance(value, tuple | list) and len(value) <= 8:
        inner = ", ".join(shown(each) for each in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, slice):
        return f"slice({shown(value.start)}, {shown(value.stop)}, {shown(value.step)})"
    if type(value) is int and value.bit_length() > _SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    if type(value) in (int, bool, float, complex, str, bytes, range, type(None)) or isinstance(value, type):
        return reprlib.repr(value)
    shape = None
    with contextlib.suppress(Exception):
        shape = getattr(value, "shape", None)
    sides = f" of shape {shape}" if type(shape) is tuple and len(shape) <= 8 else ""
    return f"{type(value).__name__}{sides}"


def _index(value: Any) -> int | None:
    """An integer, or what numpy counts as one; None for anything else, truth values included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except Exception:
        return None


def size(what: str, value: object) -> int:
    """Bytes of an integer or of text such as "64MiB"; not negative."""
    number = _index(value)
    try:
        return parse_bytes(value if number is None else number)
    except (ValueError, ArithmeticError) as error:
        raise UsageError(f"{what}: {shown(value)}, {str(error) or 'allowed is ' + SIZE_RULE}") from None


def region_pages(what: str, value: object) -> int:
    """Pages of a region of that many bytes."""
    pages = -(-size(what, value) // PAGE_BYTES)
    if not 1 <= pages <= POOL_PAGES_MAX:
        raise UsageError(f"{what}: {shown(value)}, must be 1 to {POOL_PAGES_MAX * PAGE_BYTES} bytes")
    return pages


def resident_pages(value: object, pages: int) -> int | None:
    """Pages of a RAM budget, never more than the region has; None leaves it to the node."""
    if value is None:
        return None
    wanted = min(pages, size("resident", value) // PAGE_BYTES)
    if wanted < 1:
        raise UsageError(f"resident: {shown(value)}, must be at least one page of {PAGE_BYTES} bytes")
    return wanted


def name(value: object) -> str | None:
    """A region's name, or None."""
    if value is None or (isinstance(value, str) and is_name(value)):
        return None if value is None else str(value)
    raise UsageError(f"name: {shown(value)}, must be {NAME_RULE}; or None")


def which(value: object) -> str | int:
    """The region to attach to: its name or its number."""
    number = _index(value)
    if number is None:
        return _text("name", value, f"the name of a region (1 to {NAME_MAX} characters) or its number")
    if not 0 <= number <= _NUMBER_MAX:
        raise UsageError(f"name: {shown(value)}, there is no region of this number")
    return number


def _text(what: str, value: object, rule: str) -> str:
    if isinstance(value, str) and 1 <= len(value) <= NAME_MAX:
        try:
            value.encode()
        except UnicodeEncodeError:
            pass  # half of a surrogate pair
        else:
            return str(value)
    raise UsageError(f"{what}: {shown(value)}, must be {rule}")


def word(what: str, value: object, allowed: Sequence[str]) -> str:
    """One of a few words."""
    if isinstance(value, str) and value in allowed:
        return str(value)
    raise UsageError(f"{what}: {shown(value)}, must be one of {', '.join(allowed)}")


def order(value: object) -> Order:
    """As for `numpy.empty`: None is C order."""
    if value is None or (isinstance(value, str) and value in ("C", "c")):
        return "C"
    if isinstance(value, str) and value in ("F", "f"):
        return "F"
    raise UsageError(f"order: {shown(value)}, must be 'C' or 'F'")


def path(what: str, value: Any) -> Path:
    """A path in the file system."""
    try:
        text = os.fsdecode(value)
        os.fsencode(text)
    except Exception:
        text = ""
    if not text or "\0" in text:
        raise UsageError(f"{what}: {shown(value)}, must be a path")
    return Path(text)


def kind(dtype: DTypeLike) -> np.dtype[Any]:
    """A numpy type whose items are bytes of their own."""
    import numpy as np

    try:
        found = np.dtype(dtype)
    except Exception as error:
        raise UsageError(f"dtype: {shown(dtype)}, {error}") from None
    if found.hasobject or found.itemsize == 0:
        raise UsageError(f"dtype: {found}, must have a size and hold no Python objects")
    return found


def layout(shape: Shape, dtype: DTypeLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(sides, type) of an array, as `numpy.empty` understands both: a type of sub-arrays adds their sides."""
    import numpy as np

    found = kind(dtype)
    sides = _sides(shape)
    if found.subdtype is not None:
        found, more = found.subdtype
        sides += more
    try:
        # numpy's own limits on sides and their number, found without any memory.
        np.broadcast_to(np.empty((), found), sides)
    except Exception as error:
        raise UsageError(f"shape: {shown(shape)}, {error}") from None
    return sides, found


def _sides(shape: object) -> tuple[int, ...]:
    import numpy as np

    number = _index(shape)
    found: list[int | None]
    if number is not None:
        found = [number]
    elif isinstance(shape, np.ndarray):
        found = [_index(each) for each in shape] if shape.ndim == 1 and shape.size <= _SIDES_MAX else [None]
    elif isinstance(shape, Sequence) and not isinstance(shape, str | bytes | bytearray | memoryview):
        found = [_index(each) for each in shape] if len(shape) <= _SIDES_MAX else [None]
    else:
        found = [None]
    sides = tuple(side for side in found if side is not None and side >= 0)
    if len(sides) != len(found):
        raise UsageError(f"shape: {shown(shape)}, must be {SHAPE_RULE}")
    return sides


def page_run(first: object, count: object, pages: int) -> tuple[int, int]:
    """(first page, pages) of a run of a region that has so many."""
    at, length = _index(first), _index(count)
    if at is None or length is None or not 0 <= at <= at + length <= pages:
        raise UsageError(
            f"first, count: {shown(first)}, {shown(count)}, must be numbers of pages within the region's {pages}"
        )
    return at, length


def byte_range(where: object, address: int, nbytes: int) -> tuple[int, int]:
    """(start, stop) in bytes of a range of a region that is mapped at `address`."""
    if where is None:
        return 0, nbytes
    if isinstance(where, slice):
        try:
            first, last = (size("range", end) if isinstance(end, str) else end for end in (where.start, where.stop))
            start, stop, step = slice(first, last, where.step).indices(nbytes)
        except (TypeError, ValueError):
            raise UsageError(f"range: {shown(where)}, must be {RANGE_RULE}") from None
        stop = max(start, stop)
    elif isinstance(where, range):
        start, stop, step = where.start, where.stop, where.step
    elif isinstance(where, tuple):
        if len(where) != 2:
            raise UsageError(f"range: {shown(where)}, must be {RANGE_RULE}")
        start, stop, step = size("range", where[0]), size("range", where[1]), 1
    else:
        low, high = _bounds(where)
        if not address <= low <= high <= address + nbytes:
            raise UsageError(f"range: {shown(where)}, does not lie in this region")
        return low - address, high - address
    if step != 1:
        raise UsageError(f"range: {shown(where)}, must be contiguous: a step of 1")
    if not 0 <= start <= stop <= nbytes:
        raise UsageError(
            f"range: {shown(where)}, bytes {shown(start)} to {shown(stop)} must lie in order within 0 to {nbytes}"
        )
    return start, stop


def whole_range(where: Any, address: int, nbytes: int) -> tuple[int, int]:
    """As `byte_range`, of what is to be given up: an array must have every byte of it for its own, and
    be writable.
    """
    start, stop = byte_range(where, address, nbytes)
    if where is None or isinstance(where, slice | range | tuple):
        return start, stop
    own, read_only = _own_bytes(where)
    if read_only:
        raise _ReadOnlyError(
            f"range: {shown(where)}, is read-only (flags.writeable is False): discard would write to it"
        )
    if own != stop - start:
        raise UsageError(
            f"range: {shown(where)}, must be contiguous: {stop - start - own} bytes between its items are not its own"
        )
    return start, stop


class _ReadOnlyError(UsageError, ValueError):
    """ValueError is what numpy raises for a write to such an array."""


def _own_bytes(where: Any) -> tuple[int, bool]:
    """(bytes of an array's or buffer's items, whether it is read-only)."""
    import numpy as np

    if isinstance(where, np.ndarray):  # not every type of it has a buffer: dates have none
        return where.nbytes, not where.flags.writeable
    with memoryview(where) as view:
        return view.nbytes, view.readonly


def _bounds(where: Any) -> tuple[int, int]:
    """First address, and the one behind the last, of an array or buffer."""
    import numpy as np

    try:
        array = where if isinstance(where, np.ndarray) else np.asarray(memoryview(where))
        low: int = array.__array_interface__["data"][0]
        steps = list(zip(array.shape, array.strides, strict=True))
    except Exception:
        raise UsageError(f"range: {shown(where)}, must be {RANGE_RULE}") from None
    if array.size == 0:
        return low, low
    high = low + array.itemsize
    for sides, stride in steps:
        if stride < 0:
            low += (sides - 1) * stride
        else:
            high += (sides - 1) * stride
    return low, high
