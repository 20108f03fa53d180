"""The handshake after TLS: what each side says of itself, and the one place that decides whether to go on.

The node that connects says HELLO first; the other answers HELLO or REFUSE; then the first may still REFUSE. Nothing is
demanded to be equal that can be settled: versions are ranges, features are those that both have.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ramster.constants import NAME_BYTES_MAX, NAME_PATTERN, NODE_NUMBER_MAX, PAGE_BYTES
from ramster.errors import ProtocolError
from ramster.logs import escaped

VERSION_MIN: Final = 2
VERSION_MAX: Final = 2
KINDS: Final = ("get", "bulk")
FEATURES_MAX: Final = 64
# Of what a peer said, in a message of ours: a log line of 16 KiB tells nobody more.
_QUOTED_MAX: Final = 300

# What a peer says is bounded where it is read: everything behind may count on it.
Name = Annotated[str, msgspec.Meta(pattern=rf"^(?:{NAME_PATTERN.pattern})\Z", max_length=NAME_BYTES_MAX)]
Feature = Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]
Number16 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 16) - 1)]
Number32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
#: In the refusal of a node that has the lower number: who is refused like this was heard, and will be called.
WRONG_WAY: Final = "not the other way round"


class Hello(msgspec.Struct, kw_only=True, frozen=True):
    """Body of HELLO, as JSON. `generation` is drawn at random when the process starts: another one means that its
    memory was lost. `lend_segments` is how many segments it has room for now.
    """

    cluster: Name
    name: Name
    number: Number16
    generation: Annotated[int, msgspec.Meta(ge=0)]  # below 2^64, which `objection` sees to
    kind: Literal["get", "bulk"]
    versions: tuple[Number16, Number16] = (VERSION_MIN, VERSION_MAX)
    features: Annotated[tuple[Feature, ...], msgspec.Meta(max_length=FEATURES_MAX)] = ()
    page_bytes: Number32 = PAGE_BYTES
    segment_bytes: Number32
    lend_segments: Number32 = 0


class Refusal(msgspec.Struct, kw_only=True, frozen=True):
    """Body of REFUSE, as JSON."""

    reason: str


# Made while one thread imports this: msgspec learns a type at its first use, and two threads that do so at once can
# meet a table that is half made (a fault of native code, not an exception).
_hello = msgspec.json.Decoder(Hello).decode
_refusal = msgspec.json.Decoder(Refusal).decode


def encode(message: Hello | Refusal) -> bytes:
    return msgspec.json.encode(message)


def decode_hello(body: bytes) -> Hello:
    """ProtocolError names what is wrong with it."""
    try:
        return _hello(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"its hello cannot be read: {str(error)[:_QUOTED_MAX]}") from error
    except RecursionError as error:
        raise ProtocolError("its hello cannot be read: its JSON is nested too deeply") from error


def decode_refusal(body: bytes) -> str:
    """Its reason in words that may go to a log and a terminal."""
    try:
        return escaped(_refusal(body).reason, 500)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "it gave no reason"


def objection(own: Hello, theirs: Hello, certificate_name: str, known: dict[int, str], *, accepted: bool) -> str | None:
    """Why this node will not talk to that one, in words for both logs; None when it will.

    Args:
        own, theirs: what both said.
        certificate_name: the name that TLS proved.
        known: names of the configured peers by number.
        accepted: the peer connected to us, and we can connect to it. The higher number connects, so that two nodes that
            start together end up with one link.
    """
    if theirs.cluster != own.cluster:
        return f"it belongs to cluster {theirs.cluster!r}, this node to {own.cluster!r}"
    if not 0 <= theirs.number <= NODE_NUMBER_MAX or not 0 <= theirs.generation < 1 << 64:
        return f"node number {theirs.number} or generation {theirs.generation} is out of range"
    if theirs.name != certificate_name:
        return f"it calls itself {theirs.name!r}, but its certificate is for {certificate_name!r}"
    if theirs.number == own.number:
        return f"it has this node's own number, {own.number}"
    if known.get(theirs.number) != theirs.name:
        wanted = known.get(theirs.number)
        here = f"node {theirs.number} is {wanted!r} here" if wanted else f"no [[peers]] has number {theirs.number}"
        return f"it calls itself {theirs.name!r}, number {theirs.number}, but {here}"
    if accepted and theirs.number < own.number:
        return f"node {own.number} connects to node {theirs.number}, {WRONG_WAY}"
    low, high = max(theirs.versions[0], own.versions[0]), min(theirs.versions[1], own.versions[1])
    if low > high:
        return "it speaks versions {} to {}, this node {} to {}".format(*theirs.versions, *own.versions)
    if theirs.page_bytes != own.page_bytes:
        return f"its pages have {theirs.page_bytes} bytes, ours {own.page_bytes}"
    if theirs.segment_bytes != own.segment_bytes:
        return f"its segments have {theirs.segment_bytes} bytes, ours {own.segment_bytes}: set [arena] segment alike"
    return None
