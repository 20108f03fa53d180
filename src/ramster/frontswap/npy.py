"""Arrays to and from .npy files, piece by piece: never more in RAM than a piece, nor a file that is half written.

What numpy's own `save` and `tofile` do in one system call fails where a process may serve only faults of user mode,
and leaves a truncated file. Here each piece of a region is pinned while a system call reads or fills it, which works in
every process, and says RegionLost for a lost page where a touch would be SIGBUS.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from ramster.constants import PAGE_BYTES
from ramster.errors import UsageError
from ramster.frontswap import arguments
from ramster.frontswap.regions import Client, Region, default_client, region_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from ramster.frontswap.arguments import Size
    from ramster.frontswap.messages import WhenFull

# Bytes of one system call; of a region at most a quarter of its budget, so that others can pin, too.
_PIECE_BYTES: Final = 16 << 20
# As numpy's own limit on a header: more is an attack on whoever reads it.
_HEADER_BYTES_MAX: Final = 10_000


def save(file: str | os.PathLike[str], array: ArrayLike) -> None:
    """Write an array to a .npy file, as numpy.save does, by pinned pieces where it lies in a region.

    file: path; ".npy" is added where it does not end so. array: in a region or not, of any layout; what is no array
    becomes one.

    The file appears whole, with its name, or not at all: it is written under another name beside it first. Raises
    UsageError (Python objects, no path), RegionLost (pages that are gone; the message of `Region.check`), RegionFull
    (the budget is pinned), NodeUnreachable, OSError of the file system.
    """
    import numpy as np

    path = arguments.path("file", file)
    if path.suffix != ".npy":
        path = path.with_name(path.name + ".npy")
    try:
        data = np.asanyarray(array)
    except Exception as error:
        raise UsageError(f"array: {arguments.shown(array)}, {error}") from None
    if data.dtype.hasobject:
        raise UsageError(f"array: of {data.dtype}, must hold no Python objects")
    region: Region | None = None
    with contextlib.suppress(UsageError):
        region = region_of(data)
    if region is not None:
        region.check(data)
    header = _header(data)
    with _replaced(path) as out:
        _write(out, memoryview(header))
        if data.size == 0:
            return
        if data.flags.c_contiguous:
            _write_pieces(out, data, region)
        elif data.flags.f_contiguous:
            _write_pieces(out, data.T, region)
        else:
            # Through a buffer of ordinary memory, in the order of the file: no system call ever meets the region.
            for chunk in np.nditer(
                data,
                flags=["external_loop", "buffered", "zerosize_ok"],
                buffersize=max(1, _PIECE_BYTES // data.itemsize),
                order="C",
            ):
                _write(out, memoryview(chunk.tobytes("C")))  # type: ignore[attr-defined]  # numpy types it as a tuple


def load(
    file: str | os.PathLike[str],
    *,
    resident: Size | None = None,
    name: str | None = None,
    full: WhenFull = "fail",
    client: Client | None = None,
) -> NDArray[Any]:
    """Read a .npy file into an array in a region of its own, by pinned pieces. Never takes Python objects.

    file: path, as for numpy.load. resident, name, full: as for ramster.empty. client: whose node makes the region;
    None: the default client of this process.

    Raises UsageError (no .npy file, too short, Python objects), OSError of the file system, and what ramster.empty
    raises; no region is left then.
    """
    path = arguments.path("file", file)
    with path.open("rb", buffering=0) as source:
        shape, fortran, dtype = _read_header(path, source)
        sides, kind = arguments.layout(shape, dtype)
        size = kind.itemsize
        for side in sides:
            size *= side
        start = source.tell()
        status = os.fstat(source.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size - start < size:
            raise UsageError(f"file: {path} ends after {status.st_size - start} of its array's {size} bytes")
        found = (client or default_client()).empty(
            sides, kind, "F" if fortran else "C", resident=resident, name=name, full=full
        )
        if size:
            region = region_of(found)
            for piece in _pieces(found.T if fortran else found, region):
                _read(path, source, piece)
    return found


# -- bytes ---------------------------------------------------------------------------------------------------------


def _pieces(array: NDArray[Any], region: Region | None) -> Iterator[memoryview]:
    """The bytes of a C-contiguous array in turn; pinned while they are out, where it lies in a region."""
    import numpy as np

    flat = array.reshape(-1).view(np.uint8) if array.ndim else array.reshape(1).view(np.uint8)
    most = _PIECE_BYTES
    if region is not None:
        most = max(PAGE_BYTES, min(most, region.resident // 4 // PAGE_BYTES * PAGE_BYTES))
    for at in range(0, flat.size, most):
        piece = flat[at : at + most]
        # A piece that begins within a page takes one page more.
        with region.pin(piece) if region is not None else contextlib.nullcontext():
            yield piece.data


def _write_pieces(out: int, array: NDArray[Any], region: Region | None) -> None:
    for piece in _pieces(array, region):
        _write(out, piece)


def _write(out: int, data: memoryview) -> None:
    while data:
        data = data[os.write(out, data) :]


def _read(path: Path, source: IO[bytes], into: memoryview) -> None:
    while into:
        got = os.readv(source.fileno(), [into])
        if got == 0:
            raise UsageError(f"file: {path} ends before its array does")
        into = into[got:]


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[int]:
    """A descriptor of a new file that takes the place of `path` once all went well; else nothing of it stays."""
    path = Path(os.path.realpath(path))  # through a symbolic link, as if it were written to
    beside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    out = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(out, stat.S_IMODE(path.stat().st_mode))
            yield out
            # The name must not be there before the bytes are, also after a crash of the machine.
            os.fsync(out)
        finally:
            os.close(out)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


# -- header --------------------------------------------------------------------------------------------------------


def _header(array: NDArray[Any]) -> bytes:
    from numpy.lib import format as npy

    fields = npy.header_data_from_array_1_0(array)
    for write in (npy.write_array_header_1_0, npy.write_array_header_2_0):
        out = io.BytesIO()
        # Too long for version 1; letters beyond Latin-1 in the names of fields for both.
        with contextlib.suppress(ValueError):
            write(out, fields)
            return out.getvalue()
    text = ("{" + "".join(f"'{key}': {value!r}, " for key, value in sorted(fields.items())) + "}").encode()
    pad = -(npy.MAGIC_LEN + 4 + len(text) + 1) % npy.ARRAY_ALIGN
    return bytes(npy.magic(3, 0)) + struct.pack("<I", len(text) + pad + 1) + text + b" " * pad + b"\n"


def _read_header(path: Path, source: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(source)
        if version == (1, 0):
            return npy.read_array_header_1_0(source, max_header_size=_HEADER_BYTES_MAX)
        if version == (2, 0):
            return npy.read_array_header_2_0(source, max_header_size=_HEADER_BYTES_MAX)
        if version != (3, 0):
            raise ValueError(f"version {version[0]}.{version[1]} of the format is not known")
        (length,) = struct.unpack("<I", source.read(4))
        if length > _HEADER_BYTES_MAX:
            raise ValueError(f"a header of {length} bytes")
        fields = ast.literal_eval(source.read(length).decode())
        shape, fortran = fields["shape"], fields["fortran_order"]
        if type(shape) is not tuple or not all(type(side) is int for side in shape) or type(fortran) is not bool:
            raise ValueError("a header that says nothing")
        return shape, fortran, npy.descr_to_dtype(fields["descr"])
    except OSError:
        raise
    except Exception as error:
        raise UsageError(f"file: {path} is no .npy file: {error}") from None
