"""What a node knows of one export, and who may use it. The service changes it under its lock."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ramster.config.units import counted, format_bytes
from ramster.constants import PAGE_BYTES, POOL_PAGES_MAX
from ramster.errors import UsageError
from ramster.wire.nbd import Export, OptionReply, Refusal

if TYPE_CHECKING:
    from ramster.frontswap.nbd_connections import Connection

# As many as the engine has rows for; a machine has a handful.
EXPORTS_MAX: Final = 256
# Names on one export's allow list.
ALLOW_MAX: Final = 64


class Configured(Protocol):
    """What is used of the configuration's [[exports]]."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def max_size_bytes(self) -> int | None: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def allow(self) -> Sequence[str]: ...


@dataclass(slots=True, eq=False)
class Registered:
    """A registered export. Changed under the service's lock."""

    name: str
    number: int
    pool: int
    size_bytes: int
    max_bytes: int
    read_only: bool
    swap: bool
    allow: tuple[str, ...] = ()
    clients: set[Connection] = field(default_factory=set)
    removing: bool = False
    glance: threading.Lock = field(default_factory=threading.Lock)
    """Held while its pool is looked at, which must not be destroyed meanwhile."""
    forgotten: bool = False
    deserted_at: float | None = None
    """When the last of its clients left, by time.monotonic(); None while there are any, or none has come yet."""

    def in_use(self) -> str:
        """By whom, for a refusal."""
        shown = ", ".join([client.who for client in self.clients][:3]) + (", ..." if len(self.clients) > 3 else "")
        return f"export {self.name} is in use by {counted(len(self.clients), 'connection')} ({shown})"

    def wire(self) -> Export:
        text = format_bytes(self.size_bytes) + (", read-only" if self.read_only else "")
        return Export(self.name, self.number, self.size_bytes, self.read_only, text)


def objection(allow: Sequence[str], name: str | None, *, local: bool) -> Refusal | None:
    """Why a client may not use an export; None where it may.

    allow: names of the certificates that may; empty for everybody who may connect at all. name: what the client's
    certificate has proved, None without TLS. local: it came by nbd.sock, whose mode says who may.
    """
    if local or not allow or name in allow:
        return None
    if name is None:
        text = "the export is for certain clients: connect with TLS and a certificate (nbds://)"
        return Refusal(OptionReply.ERR_TLS_REQD, text)
    return Refusal(OptionReply.ERR_POLICY, f"the export is not for {name!r}, which its allow list does not have")


def whole_pages(what: str, size_bytes: int, notes: list[str]) -> int:
    """A size in whole pages, at least one; a note where it is not the one asked for. UsageError beyond the limit."""
    most = POOL_PAGES_MAX * PAGE_BYTES
    if not 0 < size_bytes <= most:
        raise UsageError(
            f"{what} of {size_bytes} bytes: allowed are 1 to {most} ({format_bytes(most)}, "
            f"{POOL_PAGES_MAX} pages of {PAGE_BYTES} bytes)"
        )
    rounded = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
    if rounded != size_bytes:
        notes.append(f"{what} {size_bytes} is rounded up to {rounded} bytes, whole pages of {PAGE_BYTES}")
    return rounded
