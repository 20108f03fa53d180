"""The frame header: the table in the code, in docs/wire-protocol.md and in the engine's memory are one."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.errors import ProtocolError
from ramster.testing import _layout
from ramster.wire import frames
from ramster.wire.frames import HEADER, HEADER_BYTES, FrameType

DOCUMENT = Path(__file__).parents[2] / "docs" / "wire-protocol.md"


def test_the_table_has_no_gap() -> None:
    end = 0
    for field in HEADER:
        assert field.offset == end, field.name
        end += field.size
    assert end == HEADER_BYTES


def test_the_engines_struct_is_the_table() -> None:
    size, fields = _layout.frame_layout()
    assert size == HEADER_BYTES
    assert fields == {field.name: (field.offset, field.size) for field in HEADER}


def test_the_document_is_the_table() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `?(\w+)`? \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows[: len(HEADER)] == [(str(f.offset), str(f.size), f.name, f.meaning) for f in HEADER]


def test_the_document_has_every_type() -> None:
    rows = re.findall(r"^\| (\d+) \| `?([A-Z]+)`? \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(kind.value, kind.name) for kind in FrameType]


@given(st.binary(max_size=200))
def test_both_compute_the_same_checksum(data: bytes) -> None:
    assert frames.crc32c(data) == _layout.crc32c(data)


def test_it_is_the_standards_crc32c() -> None:
    assert frames.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@given(st.sampled_from(FrameType), st.binary(max_size=300))
def test_what_is_packed_is_unpacked(kind: FrameType, body: bytes) -> None:
    frame = frames.pack(kind, body)
    assert frames.unpack(frame[:HEADER_BYTES]) == (kind, len(body))
    assert frame[HEADER_BYTES:] == body


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_refused(bit: int) -> None:
    header = bytearray(frames.pack(FrameType.HELLO, b"x" * 10)[:HEADER_BYTES])
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        frames.unpack(bytes(header))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_refused(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.unpack(header)


def _header(**changed: int) -> bytes:
    values = dict.fromkeys((field.name for field in HEADER), 0)
    values |= {"magic": frames.MAGIC, "version": frames.VERSION, "type": 1} | changed
    packed = struct.pack("<IBBHQIIIIIII", *[values[field.name] for field in HEADER[:-1]])
    return packed + struct.pack("<I", frames.crc32c(packed))


def test_a_header_with_a_right_checksum_but_wrong_content_says_what_is_wrong() -> None:
    assert frames.unpack(_header()) == (1, 0)
    for changed, words in (
        ({"magic": 0x20544547}, "not a RAMster node: the first bytes are b'GET '"),
        ({"version": 1}, "frames of version 1: this node reads version 2"),
        ({"length": frames.SMALL_BODY_MAX + 1}, "16385 bytes during the handshake: at most 16384"),
    ):
        with pytest.raises(ProtocolError, match=re.escape(words)):
            frames.unpack(_header(**changed))


def test_a_body_that_is_too_long_is_not_packed() -> None:
    assert len(frames.pack(FrameType.HELLO, bytes(frames.SMALL_BODY_MAX))) == HEADER_BYTES + frames.SMALL_BODY_MAX
    with pytest.raises(ValueError, match="at most 16384"):
        frames.pack(FrameType.HELLO, bytes(frames.SMALL_BODY_MAX + 1))
