"""What the two ends of the region socket say to each other: JSON, one message per SEQPACKET record, pages as the unit.

The application asks, the node answers each request once and in order; `id` is copied to the answer, so that an
answer that came after the application gave up on it is recognised and dropped. Descriptors travel beside the record
(SCM_RIGHTS): the answer to `Create` and `Join` carries the region's memfd and the guard channel, `Attach` carries the
userfaultfd.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from ramster.config.units import counted
from ramster.constants import POOL_PAGES_MAX

# 2: the guard channel's text has 128 bytes.
VERSION: Final = 2
# An answer with this many runs takes at most 26 KiB, well inside REGION_MESSAGE_BYTES_MAX.
RUNS_MAX: Final = 1000
# Pages that one pin, unpin, prefetch, evict or discard may name (16 MiB): short enough that every answer comes within
# its deadline.
SPAN_MAX: Final = 4096
# Characters of a region's name; with the longest UTF-8 still a valid name for a memfd.
NAME_MAX: Final = 48
NAME_RULE: Final = f"1 to {NAME_MAX} printable characters, none of them markup such as [red]"
# What a library that colours terminals takes for an order. Ours never reads names so; others that show them may.
_MARKUP: Final = re.compile(r"\[[a-z#/@!][^\[]*?\]")

# A record of the guard channel: op, flags, first page, pages, text (UTF-8, NUL padded).
GUARD: Final = struct.Struct("<IIQQ128s")
GUARD_LOST: Final = 1
GUARD_NOTE: Final = 2

# As the id of an answer to whatever was asked or will be: the connection ends with it.
ANY_ID: Final = -1

# How a range will be used; see docs/regions.md.
Advice: TypeAlias = Literal["normal", "sequential", "random", "cyclic"]

# What becomes of a write when neither arena, lenders nor spill file take a page; see docs/regions.md.
WhenFull: TypeAlias = Literal["fail", "wait"]

Page = Annotated[int, Meta(ge=0, lt=POOL_PAGES_MAX)]
Count = Annotated[int, Meta(ge=1, le=POOL_PAGES_MAX)]
Group = Annotated[int, Meta(ge=0, le=2**63 - 1)]


def lost_words(runs: Sequence[tuple[int, int]], count: int) -> str:
    """What RegionLost says of `count` pages of which these runs cannot be had. The node's status tells those that are
    lost for good from those whose lender may come back.
    """
    pages = sum(size for _, size in runs)
    return (
        f"{pages} of {counted(count, 'page')} {'is' if pages == 1 else 'are'} lost or out of reach "
        f"(`ramster status` says which), the first is page {runs[0][0]}"
    )


def is_name(text: str) -> bool:
    """Whether a region may have this name: it is shown on terminals and in logs. NAME_RULE says it in words."""
    return 1 <= len(text) <= NAME_MAX and text.isprintable() and _MARKUP.search(text) is None


class _Request(msgspec.Struct, tag_field="op", kw_only=True, omit_defaults=True):
    id: int = 0


class Create(_Request, tag="create"):
    """First message of a connection: make a region of `pages`, of which `resident_pages` may be in RAM (None: the
    node decides).
    """

    version: int
    pages: Count
    resident_pages: Count | None = None
    name: Annotated[str, Meta(max_length=NAME_MAX)] | None = None
    full: WhenFull = "fail"


class Join(_Request, tag="join"):
    """First message instead of `Create`: share a region of the same user's, by its name or its number."""

    version: int
    region: Annotated[str, Meta(max_length=NAME_MAX)] | int


class Capacity(_Request, tag="capacity"):
    """Needs no region: what the node's tiers can still take."""

    version: int


class Attach(_Request, tag="attach"):
    """Second message: the application mapped the memfd at `base` and hands over its userfaultfd with these features
    enabled.
    """

    base: Annotated[int, Meta(ge=4096, le=2**63 - 1)]
    features: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    user_mode_only: bool = False


class Pin(_Request, tag="pin"):
    """group: a number that the application makes up, not 0, by which `Undo` takes back all pins that have it."""

    first: Page
    count: Count
    group: Group = 0


class Undo(_Request, tag="undo"):
    """Take back what was granted to pins of this group; again, or where there was nothing: does nothing."""

    group: Group


class Unpin(_Request, tag="unpin"):
    first: Page
    count: Count


class Prefetch(_Request, tag="prefetch"):
    first: Page
    count: Count


class Evict(_Request, tag="evict"):
    first: Page
    count: Count


class Discard(_Request, tag="discard"):
    """These pages read as zeros from now on, in every process, and nothing is kept of them."""

    first: Page
    count: Count


class Advise(_Request, tag="advise"):
    kind: Advice
    first: Page
    count: Count


class Check(_Request, tag="check"):
    first: Page
    count: Count


class Statistics(_Request, tag="statistics"):
    pass


class Close(_Request, tag="close"):
    pass


Span: TypeAlias = Pin | Unpin | Prefetch | Evict | Discard | Advise | Check
Request: TypeAlias = (
    Create
    | Join
    | Capacity
    | Attach
    | Pin
    | Undo
    | Unpin
    | Prefetch
    | Evict
    | Discard
    | Advise
    | Check
    | Statistics
    | Close
)


class Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to any request. ok=False: `error` is the stable code of a RamsterError, `message` says what
    happened.
    """

    ok: bool
    id: int = 0
    error: str = ""
    message: str = ""
    runs: list[tuple[int, int]] = []
    """Lost pages, (first, count) each; at most RUNS_MAX."""
    next_page: int | None = None
    """Check: where to go on, because more than RUNS_MAX runs were found."""
    pages: int = 0
    """Create, Join: pages of the region. Prefetch: pages now resident. Evict: pages written out. Discard: pages that
    are zeros now. Undo: pages that have one pin less.
    """
    region: int = 0
    name: str = ""
    """Create, Join: as `ramster status` shows it."""
    resident_pages: int = 0
    node_wait_ms: int = 0
    poison: str = "auto"
    """Create, Join: "guard" asks the application to leave UFFDIO_POISON off."""
    statistics: dict[str, int] = {}
    capacity: dict[str, int] = {}
    """Create, Capacity: see frontswap/capacity.py."""


_encode = msgspec.json.Encoder().encode
_T = TypeVar("_T")
_request: Callable[[bytes], Request] = msgspec.json.Decoder(Request).decode
_reply: Callable[[bytes], Reply] = msgspec.json.Decoder(Reply).decode


def encode(message: Request | Reply) -> bytes:
    """The bytes of one record."""
    return _encode(message)


def decode_request(data: bytes) -> Request:
    """Raises msgspec.DecodeError (ValidationError included) for anything that is no request."""
    return _decoded(_request, data)


def decode_reply(data: bytes) -> Reply:
    """Raises msgspec.DecodeError for anything that is no answer."""
    return _decoded(_reply, data)


def _decoded(decode: Callable[[bytes], _T], data: bytes) -> _T:
    """What msgspec has other errors for is no message either: text that is not UTF-8, lists nested too deeply."""
    try:
        return decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
