"""The NBD protocol: every constant that is used, and the fixed-newstyle handshake as bytes in, bytes and decisions out.

Covers the server's side of the negotiation: what is offered, validated and refused, with all of its limits. Does no
I/O: `ramster.frontswap.nbd` carries it out. Requests and replies of the transmission phase are the engine's; their
constants stand here because a test compares them with the engine's own. Everything on the wire is big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Final, Literal, Protocol

from ramster.constants import MIB, PAGE_BYTES

# --- magic numbers ------------------------------------------------------------------------------------------------

INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

# --- handshake ----------------------------------------------------------------------------------------------------


class HandshakeFlag(IntFlag):
    """What the server says first."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client answers."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client may ask for before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """Type of an answer to an option; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# --- transmission -------------------------------------------------------------------------------------------------


class Command(IntEnum):
    """Type of a request."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ReplyFlag(IntFlag):
    """Flags of a structured reply's chunk."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """Type of a structured reply's chunk; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class Errno(IntEnum):
    """Error numbers on the wire, whatever the host's own are."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ExtentState(IntFlag):
    """What base:allocation says of an extent."""

    HOLE = 1 << 0
    ZERO = 1 << 1


REQUEST_BYTES: Final = 28
SIMPLE_REPLY_BYTES: Final = 16
STRUCTURED_REPLY_BYTES: Final = 20

PORT_DEFAULT: Final = 10809
BASE_ALLOCATION: Final = "base:allocation"

# --- limits -------------------------------------------------------------------------------------------------------

# Anything is readable and writable byte by byte; a part of a page costs reading the page first.
BLOCK_BYTES_MIN: Final = 1
BLOCK_BYTES_PREFERRED: Final = PAGE_BYTES
# What every client may expect of a server that has said nothing.
PAYLOAD_BYTES_MAX: Final = 32 * MIB
# The protocol's limit of any string: names, queries, messages.
STRING_BYTES_MAX: Final = 4096
# A name and a handful of queries, all of full length. What is longer is read and dropped, a piece at a time.
OPTION_BYTES_MAX: Final = 32 * 1024
# Of that much no option can consist: whoever sends it is no client, and its connection ends.
SKIP_BYTES_MAX: Final = MIB
# nbdinfo needs about ten. Far above every client, and it bounds what one connection can make the node answer.
OPTIONS_MAX: Final = 256
# One context exists; more queries than that are no honest question.
QUERIES_MAX: Final = 64

_GREETING: Final = struct.Struct(">QQH")
_CLIENT_FLAGS: Final = struct.Struct(">I")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_U32: Final = struct.Struct(">I")
_U16: Final = struct.Struct(">H")
_ZEROES: Final = bytes(124)
# A plain integer: the complement of an IntFlag has none of the bits that it does not know.
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
# The context's number on the wire; one context, so any constant would do.
_ALLOCATION_ID: Final = 1


# --- the server's side of the handshake ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Export:
    """What the handshake tells of an export. `number` is the engine's and never sent."""

    name: str
    number: int
    size_bytes: int
    read_only: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an export cannot be used now: sent to the client with this type."""

    reply: OptionReply
    reason: str


class Catalogue(Protocol):
    """What the handshake asks of the exports. Called between two messages; must not block."""

    def exports(self) -> Iterable[Export]:
        """All of them, in the order to be listed."""

    def find(self, name: str) -> Export | Refusal:
        """The export of that name, or why there is none."""

    def enter(self, name: str) -> Export | Refusal:
        """As `find`, for a client that goes on to use it: from now on it counts as used."""


class Tls(Enum):
    """Whether a connection may or must turn to TLS before it chooses an export."""

    OFF = "off"
    OFFERED = "offered"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class StartTls:
    """Send the bytes, then do the TLS handshake, then call `tls_started`."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Send the bytes, then serve this export. allocation_context: the number that base:allocation has, if asked for."""

    export: Export
    structured: bool
    allocation_context: int | None


@dataclass(frozen=True, slots=True)
class End:
    """Send the bytes, then close the connection. kind: "abort" is the client's own wish, "broken" a breach of the
    protocol, "refused" a wish that cannot be refused in another way.
    """

    kind: Literal["abort", "broken", "refused"]
    reason: str


Decision = StartTls | Serve | End


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes to be sent, and what comes next; decision None: receive `Handshake.wants` bytes and feed them."""

    reply: bytes = b""
    decision: Decision | None = None


def transmission_flags(*, read_only: bool, structured: bool) -> TransmissionFlag:
    """What the engine can do with an export."""
    flag = TransmissionFlag
    flags = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.CAN_MULTI_CONN | flag.SEND_CACHE
    if read_only:
        flags |= flag.READ_ONLY
    else:
        flags |= flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
    return flags | flag.SEND_DF if structured else flags


class _Stop(Exception):
    """The connection ends: what the client did cannot be answered."""

    def __init__(self, kind: Literal["broken", "refused"], reason: str) -> None:
        super().__init__(reason)
        self.decision = End(kind, reason)


class _Error(Exception):
    """The option is answered with an error, and the connection goes on."""

    def __init__(self, reply: OptionReply, reason: str) -> None:
        super().__init__(reason)
        self.reply = reply


class Handshake:
    """One client's negotiation. Send `greeting`; then receive exactly `wants` bytes and `feed` them, until a Step has a
    decision. Feeding never raises for anything that a client sends, and what it answers is bounded.

    catalogue: the exports. tls: of this connection. Options are limited in length (OPTION_BYTES_MAX; up to
    SKIP_BYTES_MAX they are read, dropped and refused) and number (OPTIONS_MAX).
    """

    def __init__(self, catalogue: Catalogue, tls: Tls) -> None:
        self._catalogue = catalogue
        self._tls = tls
        self._encrypted = False
        self._fixed = False
        self._no_zeroes = False
        self._structured = False
        self._context_export: str | None = None  # base:allocation was chosen, for this export
        self._options = 0
        self._option = 0
        self._skip = 0  # bytes of an option that are still to be dropped
        self._ended = False
        self._waits_for_tls = False
        self._reading: Literal["flags", "header", "data", "skip"] = "flags"
        self.wants = _CLIENT_FLAGS.size

    @property
    def greeting(self) -> bytes:
        return _GREETING.pack(INIT_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

    def tls_started(self) -> None:
        """TLS is up: everything negotiated in the clear is forgotten."""
        assert self._waits_for_tls
        self._waits_for_tls = False
        self._encrypted = True
        self._structured = False
        self._context_export = None

    def feed(self, data: bytes) -> Step:
        """The next step. data: exactly `wants` bytes."""
        assert not self._ended and not self._waits_for_tls, "after a decision nothing is fed"
        assert len(data) == self.wants
        try:
            step = self._fed(data)
        except _Stop as stop:
            step = Step(b"", stop.decision)
        self._ended = isinstance(step.decision, Serve | End)
        self._waits_for_tls = isinstance(step.decision, StartTls)
        return step

    def _fed(self, data: bytes) -> Step:
        if self._reading == "flags":
            self._read_flags(data)
            return self._next()
        if self._reading == "header":
            length = self._read_header(data)
            if length > OPTION_BYTES_MAX:
                self._skip = length
                return self._skipping()
            if length:
                self._reading, self.wants = "data", length
                return Step()
            data = b""
        elif self._reading == "skip":
            self._skip -= len(data)
            if self._skip:
                return self._skipping()
            if self._option != Option.ABORT:  # whose data does not matter
                return self._next(self._too_long())
            data = b""
        try:
            reply, decision = self._answer(data)
        except _Error as error:
            reply, decision = self._reply(error.reply, str(error).encode()[:STRING_BYTES_MAX]), None
        return Step(reply, decision) if isinstance(decision, Serve | End) else self._next(reply, decision)

    def _next(self, reply: bytes = b"", decision: Decision | None = None) -> Step:
        self._reading, self.wants = "header", _OPTION.size
        return Step(reply, decision)

    def _skipping(self) -> Step:
        self._reading, self.wants = "skip", min(self._skip, OPTION_BYTES_MAX)
        return Step()

    def _read_flags(self, data: bytes) -> None:
        (flags,) = _CLIENT_FLAGS.unpack(data)
        unknown = flags & ~_KNOWN_CLIENT_FLAGS
        if unknown:
            raise _Stop("broken", f"client flags {flags:#x} have bits that were not offered: {unknown:#x}")
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & ClientFlag.NO_ZEROES)

    def _read_header(self, data: bytes) -> int:
        magic, self._option, length = _OPTION.unpack(data)
        if magic != OPTION_MAGIC:
            raise _Stop("broken", f"an option began with {magic:#018x} instead of {OPTION_MAGIC:#018x}")
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise _Stop("broken", f"more than {OPTIONS_MAX} options")
        if self._option == Option.EXPORT_NAME and length > STRING_BYTES_MAX:
            raise _Stop("broken", f"an export name of {length} bytes; allowed are {STRING_BYTES_MAX}")
        if not self._fixed and self._option != Option.EXPORT_NAME:
            raise _Stop("broken", f"option {self._option} of a client that did not agree to fixed newstyle")
        if length > SKIP_BYTES_MAX:
            raise _Stop("broken", f"option {self._option} of {length} bytes; allowed are {OPTION_BYTES_MAX}")
        return int(length)

    def _too_long(self) -> bytes:
        """The answer to an option whose data was dropped."""
        if self._tls_missing():
            return self._reply(OptionReply.ERR_TLS_REQD, b"turn to TLS first (STARTTLS)")
        if self._option not in _ANSWERS:
            return self._reply(OptionReply.ERR_UNSUP, b"this server does not know the option")
        text = f"the option's data is longer than {OPTION_BYTES_MAX} bytes"
        return self._reply(OptionReply.ERR_TOO_BIG, text.encode())

    def _tls_missing(self) -> bool:
        return self._tls is Tls.REQUIRED and not self._encrypted and self._option not in (Option.STARTTLS, Option.ABORT)

    def _reply(self, kind: OptionReply, data: bytes = b"") -> bytes:
        return _OPTION_REPLY.pack(OPTION_REPLY_MAGIC, self._option, kind, len(data)) + data

    def _answer(self, data: bytes) -> tuple[bytes, Decision | None]:
        if self._option == Option.EXPORT_NAME:
            return self._export_name(data)
        if self._option == Option.ABORT:
            return self._reply(OptionReply.ACK), End("abort", "the client ended the negotiation")
        if self._tls_missing():
            raise _Error(OptionReply.ERR_TLS_REQD, "turn to TLS first (STARTTLS)")
        answer = _ANSWERS.get(self._option)
        if answer is None:
            raise _Error(OptionReply.ERR_UNSUP, "this server does not know the option")
        return answer(self, data)

    def _export_name(self, data: bytes) -> tuple[bytes, Decision | None]:
        """The old way in, which has no way to refuse but to end."""
        if self._tls_missing():
            raise _Stop("refused", "EXPORT_NAME without TLS, which is required here")
        try:
            export = self._entered(_text(data, "the export name"))
        except _Error as error:
            raise _Stop("refused", f"EXPORT_NAME: {error}") from None
        reply = _EXPORT_NAME_REPLY.pack(export.size_bytes, self._flags(export))
        return reply + (b"" if self._no_zeroes else _ZEROES), self._serve(export)

    def _list(self, data: bytes) -> tuple[bytes, Decision | None]:
        self._no_data(data)
        parts = []
        for export in self._catalogue.exports():
            name = export.name.encode()
            parts.append(self._reply(OptionReply.SERVER, _U32.pack(len(name)) + name + export.description.encode()))
        return b"".join(parts) + self._reply(OptionReply.ACK), None

    def _start_tls(self, data: bytes) -> tuple[bytes, Decision | None]:
        if self._encrypted:
            raise _Error(OptionReply.ERR_INVALID, "TLS is on already")
        self._no_data(data)
        if self._tls is Tls.OFF:
            raise _Error(OptionReply.ERR_POLICY, "this server has no certificate: its configuration has no [cluster]")
        return self._reply(OptionReply.ACK), StartTls()

    def _info(self, data: bytes) -> tuple[bytes, Decision | None]:
        """INFO and GO, which differ in what follows alone."""
        reader = _Reader(data)
        name = reader.text("the export name")
        asked = {reader.u16() for _ in range(reader.u16())}
        reader.end()
        go = self._option == Option.GO
        export = self._entered(name) if go else _found(self._catalogue.find(name))
        info = [_INFO_EXPORT.pack(Info.EXPORT, export.size_bytes, self._flags(export))]
        if Info.NAME in asked:
            info.append(_U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in asked:
            info.append(_U16.pack(Info.DESCRIPTION) + export.description.encode())
        if Info.BLOCK_SIZE in asked:
            sizes = (BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX)
            info.append(_INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        reply = b"".join(self._reply(OptionReply.INFO, each) for each in info) + self._reply(OptionReply.ACK)
        return reply, self._serve(export) if go else None

    def _structured_reply(self, data: bytes) -> tuple[bytes, Decision | None]:
        self._no_data(data)
        self._structured = True
        return self._reply(OptionReply.ACK), None

    def _meta_context(self, data: bytes) -> tuple[bytes, Decision | None]:
        """LIST and SET; a SET that fails leaves nothing chosen."""
        choosing = self._option == Option.SET_META_CONTEXT
        if choosing:
            self._context_export = None
        if not self._structured:
            raise _Error(OptionReply.ERR_INVALID, "metadata needs structured replies; ask for them first")
        reader = _Reader(data)
        name = reader.text("the export name")
        count = reader.u32()
        if count > QUERIES_MAX:
            raise _Error(OptionReply.ERR_TOO_BIG, f"{count} queries; allowed are {QUERIES_MAX}")
        queries = [reader.text("a query") for _ in range(count)]
        reader.end()
        for query in queries:
            if not query.partition(":")[1] or query.startswith(":"):
                raise _Error(OptionReply.ERR_INVALID, f"query {_shown(query)} has no namespace: write namespace:name")
        export = _found(self._catalogue.find(name))
        if choosing:
            hit = BASE_ALLOCATION in queries
        else:
            hit = not queries or BASE_ALLOCATION in queries or "base:" in queries
        parts = []
        if hit:
            number = _ALLOCATION_ID if choosing else 0
            parts.append(self._reply(OptionReply.META_CONTEXT, _U32.pack(number) + BASE_ALLOCATION.encode()))
            if choosing:
                self._context_export = export.name
        return b"".join(parts) + self._reply(OptionReply.ACK), None

    def _no_data(self, data: bytes) -> None:
        if data:
            raise _Error(OptionReply.ERR_INVALID, f"the option takes no data, {len(data)} bytes came")

    def _entered(self, name: str) -> Export:
        return _found(self._catalogue.enter(name))

    def _flags(self, export: Export) -> TransmissionFlag:
        return transmission_flags(read_only=export.read_only, structured=self._structured)

    def _serve(self, export: Export) -> Serve:
        # What was chosen for another export says nothing about this one.
        context = _ALLOCATION_ID if self._context_export == export.name else None
        return Serve(export, self._structured, context)


_ANSWERS: Final[dict[int, Callable[[Handshake, bytes], tuple[bytes, Decision | None]]]] = {
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._start_tls,
    Option.INFO: Handshake._info,
    Option.GO: Handshake._info,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.LIST_META_CONTEXT: Handshake._meta_context,
    Option.SET_META_CONTEXT: Handshake._meta_context,
}


def _found(answer: Export | Refusal) -> Export:
    if isinstance(answer, Refusal):
        raise _Error(answer.reply, answer.reason)
    return answer


def _shown(text: str) -> str:
    """For a message: short, and nothing in it moves a terminal's cursor."""
    return ascii(text if len(text) <= 64 else text[:61] + "...")


def _text(data: bytes, what: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _Error(OptionReply.ERR_INVALID, f"{what} is not UTF-8") from None
    if "\0" in text:
        raise _Error(OptionReply.ERR_INVALID, f"{what} has a NUL in it")
    return text


class _Reader:
    """Takes an option's data apart; whatever does not fit is ERR_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, size: int, what: str) -> bytes:
        if size > len(self._data) - self._at:
            raise _Error(OptionReply.ERR_INVALID, f"the option's data ends within {what}")
        self._at += size
        return self._data[self._at - size : self._at]

    def u16(self) -> int:
        return int(_U16.unpack(self._take(2, "a number"))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self._take(4, "a number"))[0])

    def text(self, what: str) -> str:
        length = self.u32()
        if length > STRING_BYTES_MAX:
            raise _Error(OptionReply.ERR_INVALID, f"{what} has {length} bytes; allowed are {STRING_BYTES_MAX}")
        return _text(self._take(length, what), what)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Error(OptionReply.ERR_INVALID, f"{len(self._data) - self._at} bytes follow the option's data")


# --- for clients and tests ----------------------------------------------------------------------------------------


def pack_option(option: int, data: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return _OPTION.pack(OPTION_MAGIC, option, len(data)) + data


def pack_info(name: str, *asked: int) -> bytes:
    """Data of INFO and GO."""
    raw = name.encode()
    return _U32.pack(len(raw)) + raw + struct.pack(f">H{len(asked)}H", len(asked), *asked)


def pack_queries(name: str, *queries: str) -> bytes:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    raw = [each.encode() for each in (name, *queries)]
    head = _U32.pack(len(raw[0])) + raw[0] + _U32.pack(len(queries))
    return head + b"".join(_U32.pack(len(each)) + each for each in raw[1:])


def unpack_replies(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(option, type, data) of each reply in what a server answered; ValueError where it is none."""
    at = 0
    while at < len(data):
        if len(data) - at < _OPTION_REPLY.size:
            raise ValueError("cut off within a reply's header")
        magic, option, kind, length = _OPTION_REPLY.unpack_from(data, at)
        at += _OPTION_REPLY.size
        if magic != OPTION_REPLY_MAGIC or length > len(data) - at:
            raise ValueError("not a reply")
        yield option, kind, data[at : at + length]
        at += length
