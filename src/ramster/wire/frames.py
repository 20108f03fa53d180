"""The frame header: 48 bytes, little-endian, in front of everything that travels between two nodes.

The table is the one in docs/wire-protocol.md (a test compares them) and the struct `Frame` of the engine (a test
compares sizes and offsets). Python packs and unpacks only the few frames of the handshake; the rest is the engine's.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from ramster.errors import ProtocolError

MAGIC: Final = 0x54534D52  # "RMST"
VERSION: Final = 2
# What a hello or a refusal may take: a page of JSON, with room for features to come.
SMALL_BODY_MAX: Final = 16384


class Field(NamedTuple):
    """One row of the header's table."""

    offset: int
    size: int
    name: str
    meaning: str


HEADER: Final = (
    Field(0, 4, "magic", "0x54534D52: the bytes RMST"),
    Field(4, 1, "version", "2"),
    Field(5, 1, "type", "see the table of types"),
    Field(6, 2, "status", "of a reply: 0 done, 1 absent, 2 full, 3 bad, 4 share"),
    Field(8, 8, "request", "chosen by whoever asks, repeated in the reply"),
    Field(16, 4, "length", "bytes of body that follow"),
    Field(20, 4, "credit", "segments that the sender has room for"),
    Field(24, 4, "segment", "the owner's number of the segment"),
    Field(28, 4, "generation", "how often the owner has used that number before, modulo 2^14"),
    Field(32, 4, "handle", "the lender's hint where the segment lies; 0xFFFFFFFF none"),
    Field(36, 4, "left", "of COMPACTED: bytes of the image that are left"),
    Field(40, 4, "reserved", "zero"),
    Field(44, 4, "crc", "CRC32C of the 44 bytes before"),
)
HEADER_BYTES: Final = 48
_HEADER: Final = struct.Struct("<IBBHQIIIIIIII")
assert _HEADER.size == HEADER_BYTES == HEADER[-1].offset + HEADER[-1].size


class FrameType(IntEnum):
    """Frame types. HELLO and REFUSE belong to the handshake, PING and PONG to both connections."""

    HELLO = 1
    REFUSE = 2
    PING = 3
    PONG = 4
    GET = 5
    PAGE = 6
    SHIP = 7
    SHIPPED = 8
    FREE = 9
    FREED = 10
    GOODBYE = 11
    COMPACT = 12
    COMPACTED = 13


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli, reflected) as ISA-L's crc32_iscsi computes it: seed all ones, no final inversion."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc


def pack(kind: FrameType, body: bytes) -> bytes:
    """A whole frame of the handshake. ValueError for a body larger than SMALL_BODY_MAX."""
    if len(body) > SMALL_BODY_MAX:
        raise ValueError(f"a body of {len(body)} bytes: at most {SMALL_BODY_MAX}")
    header = _HEADER.pack(MAGIC, VERSION, kind, 0, 0, len(body), 0, 0, 0, 0, 0, 0, 0)[:-4]
    return header + struct.pack("<I", crc32c(header)) + body


def unpack(header: bytes) -> tuple[int, int]:
    """(type, body length) of a handshake frame's header; ProtocolError for anything else than one of ours."""
    magic, version, kind, _, _, length, *_, crc = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError(f"not a RAMster node: the first bytes are {header[:4]!r}")
    if crc != crc32c(header[:-4]):
        raise ProtocolError("the frame header's checksum is wrong")
    if version != VERSION:
        raise ProtocolError(f"frames of version {version}: this node reads version {VERSION}")
    if length > SMALL_BODY_MAX:
        raise ProtocolError(f"a frame of {length} bytes during the handshake: at most {SMALL_BODY_MAX}")
    return kind, length
