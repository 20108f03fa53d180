"""The store's bytes as tables, and decoders for tools and tests. docs/store-format.md shows the same tables.

The native code has its own packed structs; a test holds the three together. Everything is little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ramster.constants import SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MIN

CODEC_LZ4 = 1
CODEC_RAW = 2
CODEC_ZSTD = 3
FLAG_SPARSE = 1
FRAME_MAGIC = 0x47455352  # "RSEG"
IMAGE_MAGIC = 0x4C455352  # "RSEL"
DIRECTORY_DEAD = 0x8000
DIRECTORY_ABSENT = 0xFFFF
OBJECT_ID_BYTES = 24
ALIGNMENT = 8
SEAL_LABEL = b"ramster seal v2\0"
DIRECTORY_HINTED = 0x80000000
DIRECTORY_OFFSET_MASK = 0x7FFF
DIRECTORY_SIZE_SHIFT = 16
#: a segment is at most as large as a 15-bit offset in units of 8 bytes can say
SEGMENT_BYTES_LIMIT = 0x8000 * ALIGNMENT

KIND_NONE, KIND_FILLED, KIND_STORED = 0, 1, 2

assert SEGMENT_BYTES_MIN <= SEGMENT_BYTES_DEFAULT <= SEGMENT_BYTES_LIMIT


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    format: str
    meaning: str

    @property
    def size(self) -> int:
        return struct.calcsize("<" + self.format)


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    fields: tuple[Field, ...]

    @property
    def format(self) -> str:
        return "<" + "".join(field.format for field in self.fields)

    @property
    def size(self) -> int:
        return struct.calcsize(self.format)

    def rows(self) -> Iterator[tuple[int, int, Field]]:
        """(offset, size, field) in order."""
        offset = 0
        for field in self.fields:
            yield offset, field.size, field
            offset += field.size


ENTRY_HEADER = Table(
    "EntryHeader",
    (
        Field("length", "H", "bytes after the header, object id included, padding not"),
        Field("codec", "B", "1 LZ4 block, 2 raw, 3 zstd frame (sealed only)"),
        Field("flags", "B", "bit 0: the object id comes first; other bits 0"),
        Field("index", "I", "of the page in its object"),
        Field("version", "Q", "grows with each put of this store"),
        Field("pool", "Q", "pool id, which no other pool of the node ever has"),
        Field(
            "check",
            "16s",
            "CRC32C over bytes 0 to 23 and the bytes after the header, then zeros; the AES-GCM tag once sealed",
        ),
    ),
)

IMAGE_HEADER = Table(
    "ImageHeader",
    (
        Field("magic", "I", "0x47455352 `RSEG` in the arena, 0x4c455352 `RSEL` in a sealed image"),
        Field("segment", "I", "segment id of the owner"),
        Field("generation", "I", "how often that id was used before, modulo 2^14"),
        Field("entries", "I", "ordinals in the directory; 0 in the arena"),
        Field("data_bytes", "I", "bytes after the directory; 0 in the arena"),
        Field("flags", "I", "0"),
        Field("seal_id", "24s", "random, new for each sealing; 0 in the arena"),
        Field("reserved", "16s", "0"),
    ),
)

SPILL_HEADER = Table(
    "SpillHeader",
    (
        Field("magic", "8s", "`RAMspill`: a file that begins otherwise is not touched"),
        Field("version", "I", "2"),
        Field("image_bytes", "I", "of a whole segment"),
        Field("images", "Q", "that fit, whole ones, from byte 4096 on"),
        Field("node", "I", "number of the node that writes it"),
        Field("pid", "I", "its process, for people"),
    ),
)
SPILL_MAGIC = b"RAMspill"
SPILL_VERSION = 2
SPILL_FIRST_IMAGE = 4096

#: begins the page after the last segment of an arena in a file
ARENA_MARK = b"RAMarena"

TABLES = (ENTRY_HEADER, IMAGE_HEADER)


class EntryHeader(NamedTuple):
    length: int
    codec: int
    flags: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    version: int
    pool: int
    check: bytes

    @property
    def crc(self) -> int:
        """Of an entry that is not sealed."""
        return int.from_bytes(self.check[:4], "little")

    @property
    def prefix(self) -> int:
        """Bytes of object id in front of the payload."""
        return OBJECT_ID_BYTES if self.flags & FLAG_SPARSE else 0


class ImageHeader(NamedTuple):
    magic: int
    segment: int
    generation: int
    entries: int
    data_bytes: int
    flags: int
    seal_id: bytes
    reserved: bytes


class Slot(NamedTuple):
    """One 8-byte word of a page table. Fields that the kind does not have are 0."""

    kind: int
    generation: int = 0
    segment: int = 0
    ordinal: int = 0
    check: int = 0
    pattern: int = 0


class Entry(NamedTuple):
    ordinal: int
    offset: int  # of the header in the frame or image
    header: EntryHeader
    oid: tuple[int, int, int]
    payload: bytes  # compressed, or sealed
    body: bytes  # object id and payload, as the checksum sees them


def decode_slot(slot: int) -> Slot:
    """Take a slot apart. ValueError for a kind that does not exist."""
    kind = slot >> 62
    if kind == KIND_NONE and slot == 0:
        return Slot(KIND_NONE)
    if kind == KIND_FILLED:
        return Slot(kind, check=slot >> 32 & 0x3FFFFFFF, pattern=slot & 0xFFFFFFFF)
    if kind == KIND_STORED:
        return Slot(kind, slot >> 48 & 0x3FFF, slot >> 16 & 0xFFFFFFFF, slot & 0xFFFF)
    raise ValueError(f"slot {slot:#018x} is of no known kind")


def encode_slot(slot: Slot) -> int:
    if slot.kind == KIND_FILLED:
        return KIND_FILLED << 62 | slot.check << 32 | slot.pattern
    if slot.kind == KIND_STORED:
        return KIND_STORED << 62 | slot.generation << 48 | slot.segment << 16 | slot.ordinal
    return 0


def decode_entry_header(data: bytes | memoryview, offset: int = 0) -> EntryHeader:
    return EntryHeader(*struct.unpack_from(ENTRY_HEADER.format, data, offset))


def decode_image_header(data: bytes | memoryview, offset: int = 0) -> ImageHeader:
    return ImageHeader(*struct.unpack_from(IMAGE_HEADER.format, data, offset))


def align(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def read_entry(data: bytes | memoryview, offset: int, ordinal: int) -> Entry:
    """The entry at a byte offset. ValueError where it does not fit in the data."""
    header = decode_entry_header(data, offset)
    begin = offset + ENTRY_HEADER.size
    if header.length < header.prefix or begin + header.length > len(data):
        raise ValueError(f"entry {ordinal} at {offset}: length {header.length} does not fit")
    body = bytes(data[begin : begin + header.length])
    oid = struct.unpack("<QQQ", body[:OBJECT_ID_BYTES]) if header.prefix else (0, 0, 0)
    return Entry(ordinal, offset, header, oid, body[header.prefix :], body)


class Word(NamedTuple):
    """One word of a frame's directory, in bytes. A dead one with a size is room, without one it names nothing."""

    offset: int
    size: int
    dead: bool
    hinted: bool


def decode_word(word: int) -> Word:
    return Word(
        (word & DIRECTORY_OFFSET_MASK) * ALIGNMENT,
        (word >> DIRECTORY_SIZE_SHIFT & DIRECTORY_OFFSET_MASK) * ALIGNMENT,
        bool(word & DIRECTORY_DEAD),
        bool(word & DIRECTORY_HINTED),
    )


def walk_directory(frame: bytes | memoryview) -> Iterator[Word]:
    """The words of a frame's directory, by ordinal; none for a frame that was never used."""
    if decode_image_header(frame).magic != FRAME_MAGIC:
        return
    for place in range(len(frame) - 4, IMAGE_HEADER.size, -4):
        (word,) = struct.unpack_from("<I", frame, place)
        if word == 0:
            return
        yield decode_word(word)


def walk_frame(frame: bytes | memoryview) -> Iterator[Entry]:
    """Live entries of one frame of an arena, by ordinal. ValueError where one does not fit in it.

    A frame that is free now may still show the entries of its last segment: the segment table knows.
    """
    for ordinal, word in enumerate(walk_directory(frame)):
        if not word.dead:
            yield read_entry(frame, word.offset, ordinal)


def walk_image(image: bytes | memoryview) -> Iterator[Entry]:
    """Entries of a sealed image; object ids and payloads are ciphertext. ValueError when it is not an image."""
    header = decode_image_header(image)
    base = align(IMAGE_HEADER.size + 2 * header.entries)
    if header.magic != IMAGE_MAGIC or base + header.data_bytes != len(image):
        raise ValueError("not a sealed image")
    for ordinal in range(header.entries):
        (offset,) = struct.unpack_from("<H", image, IMAGE_HEADER.size + 2 * ordinal)
        if offset != DIRECTORY_ABSENT:
            yield read_entry(image, base + offset * ALIGNMENT, ordinal)


def seal_info(seal_id: bytes) -> bytes:
    """The `info` of HKDF-Expand-SHA256 (RFC 5869) from which the segment key comes; the node key is its PRK."""
    return SEAL_LABEL + seal_id


def seal_nonce(ordinal: int) -> bytes:
    return bytes(8) + struct.pack("<I", ordinal)


def seal_associated_data(seal_id: bytes, ordinal: int, header: EntryHeader, oid: tuple[int, int, int]) -> bytes:
    """76 bytes: seal id, ordinal, the first 24 bytes of the entry header, object id (zeros in a dense pool)."""
    first = struct.pack("<HBBIQQ", *header[:6])
    return seal_id + struct.pack("<I", ordinal) + first + struct.pack("<QQQ", *oid)
