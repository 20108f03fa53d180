"""What is on record of this machine's swaps, in RUN_DIR/swap/NAME.json: what a crash must not make us forget."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from ramster.config import paths
from ramster.constants import NAME_PATTERN, NAME_RULE, NBD_SOCKET
from ramster.errors import Refused, UsageError
from ramster.frontswap.devices import Place, loops, nbd_attachment

LOCK_S: Final = 60.0
_RECORD_VERSION: Final = 2
_POLL_S: Final = 0.2  # a lock does not tell when it is free


@dataclass(frozen=True, slots=True)
class Record:
    """What a crash must not make us forget. device: chosen, not necessarily attached. made: the export is ours.

    token: in the names of what is made, see `devices`. attachment: which one of the kernel's nbd device is ours.
    """

    name: str
    size_bytes: int
    priority: int
    way: str
    device: str | None = None
    made: bool = False
    attached: bool = False
    attachment: str | None = None
    done: bool = False
    token: str = field(default_factory=partial(secrets.token_hex, 8))
    version: int = _RECORD_VERSION


def check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(f"a swap's name is {NAME_RULE}; given was {name!r:.80}")


def place(run_dir: Path, name: str, token: str = "") -> Place:
    """token: of its record, "" before there is one. UsageError for what is no name."""
    check_name(name)
    directory = paths.canonical(run_dir) / "swap"
    return Place(name, directory, paths.canonical_run_dir(run_dir) / NBD_SOCKET, token)


def look_up(where: Place) -> tuple[Place, Record] | None:
    """What is on record, and where it is; None: there is nothing. Refused as `read`."""
    record = read(where)
    return None if record is None else (replace(where, token=record.token), record)


def recorded(run_dir: Path) -> Iterator[tuple[Place, Record]]:
    """Every swap of the node with this run directory."""
    for name in names(run_dir):
        if (each := look_up(place(run_dir, name))) is not None:
            yield each


def write(where: Place, record: Record) -> None:
    """Whole or not at all."""
    staging = where.record.with_suffix(".new")
    with staging.open("w") as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(where.record)


def read(where: Place) -> Record | None:
    """None: there is none. Refused for one that nobody could have written."""
    try:
        data = json.loads(where.record.read_text())
        if data.get("version") != _RECORD_VERSION:
            raise ValueError(f"version {data.get('version')!r:.20}")
        return Record(**data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused(
            f"{where.record} cannot be read ({error}); "
            "look at /proc/swaps, switch the device off by hand (swapoff DEVICE), then remove the file"
        ) from None


def names(run_dir: Path) -> list[str]:
    """Of all records, in order."""
    found = (path.stem for path in (paths.canonical(run_dir) / "swap").glob("*.json"))
    return sorted(name for name in found if NAME_PATTERN.fullmatch(name))


@contextlib.contextmanager
def locked(where: Place) -> Iterator[Place]:
    """One command at a time changes swaps of this node: two would choose the same device."""
    where.directory.mkdir(mode=0o750, exist_ok=True)
    descriptor = os.open(where.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Refused(
                        f"another `ramster swap` has worked for more than {LOCK_S:g} s; wait until it is done"
                    ) from None
                time.sleep(_POLL_S)
        yield replace(where, lock=descriptor)
    finally:
        os.close(descriptor)


def own_devices(where: Place, record: Record) -> list[str]:
    """The block devices that are its own: those on its file, and the one in the record.

    The latter while it is attached as we left it, or not at all: another program may have taken the same number since.
    """
    found = loops(where)
    device, left = record.device, record.attachment
    if record.way == "nbd" and device is not None and left is not None and nbd_attachment(device) in (None, left):
        found.append(device)
    return found


def half_done(run_dir: Path) -> bool:
    """Whether a swap of this node is being made, or was left so."""
    return any(not record.done for _, record in recorded(run_dir))
