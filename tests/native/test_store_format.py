"""docs/store-format.md, engine/layout.py and the native structs say the same, and so do the bytes of a real arena."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st
from tests.native.conftest import SEGMENT, Factory, fill, noise, text
from tests.native.lz4_block import crc32c, decompress

from ramster.constants import PAGE_BYTES
from ramster.engine import layout
from ramster.engine.store import Store
from ramster.errors import PageLost
from ramster.testing import _stress

DOCUMENT = Path(__file__).parents[2] / "docs" / "store-format.md"
KEY = bytes(range(32))


@pytest.mark.parametrize("table", layout.TABLES, ids=lambda table: table.name)
def test_the_native_struct_is_the_table(table: layout.Table) -> None:
    size, fields = _stress.native_layout()[table.name]
    assert size == table.size
    assert fields == {field.name: (offset, bytes_) for offset, bytes_, field in table.rows()}


@pytest.mark.parametrize("table", layout.TABLES, ids=lambda table: table.name)
def test_the_document_is_the_table(table: layout.Table) -> None:
    chapter = DOCUMENT.read_text().split(f"### {table.name}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \| (.+) \|$", chapter, re.MULTILINE)
    assert rows == [(str(offset), str(size), field.name, field.meaning) for offset, size, field in table.rows()]


def test_crc32c_is_the_standard_one() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@given(
    st.one_of(
        st.builds(
            layout.Slot,
            st.just(layout.KIND_STORED),
            *[st.integers(0, n) for n in (0x3FFF, 2**32 - 1, 2**16 - 1)],
            *[st.just(0)] * 2,
        ),
        st.builds(
            layout.Slot,
            st.just(layout.KIND_FILLED),
            *[st.just(0)] * 3,
            *[st.integers(0, n) for n in (2**30 - 1, 2**32 - 1)],
        ),
        st.just(layout.Slot(0)),
    )
)
def test_slots_survive_encoding(slot: layout.Slot) -> None:
    assert layout.decode_slot(layout.encode_slot(slot)) == slot


def test_a_slot_of_no_kind_is_an_error() -> None:
    for slot in (3 << 62, 1):
        with pytest.raises(ValueError, match="no known kind"):
            layout.decode_slot(slot)


def payload_page(header: layout.EntryHeader, payload: bytes) -> bytes:
    return decompress(payload) if header.codec == layout.CODEC_LZ4 else payload


def checked_bytes(frame: memoryview, entry: layout.Entry) -> bytes:
    return bytes(frame[entry.offset : entry.offset + 24]) + entry.body


def test_every_live_page_is_found_in_the_arena_file(make_store: Factory, tmp_path: Path) -> None:
    """With the tables alone: frames, directory, headers, checksums and payloads as documented."""
    path = tmp_path / "arena"
    store = make_store(16, path=str(path))
    dense, sparse = store.create_pool(pages=500), store.create_pool()
    expected: dict[tuple[int, tuple[int, int, int], int], bytes] = {}
    for n in range(60):
        page = noise(n) if n % 5 == 0 else text(n, 0.1 + 0.1 * (n % 7))
        store.put(dense, n * 3, b"\1" * 100 + noise(n)[100:])
        store.put(dense, n * 3, page)
        store.put(sparse, 2**32 - 1 - n, page, (n % 3, n, 2**64 - 1))
        expected[dense, (0, 0, 0), n * 3] = page
        expected[sparse, (n % 3, n, 2**64 - 1), 2**32 - 1 - n] = page
    store.flush_page(dense, 0)
    del expected[dense, (0, 0, 0), 0]
    store.seal_open()
    store.clean(2)

    arena = memoryview(path.read_bytes())
    assert (len(arena), bytes(arena[16 * SEGMENT :][:8])) == (16 * SEGMENT + PAGE_BYTES, layout.ARENA_MARK)
    arena = arena[: 16 * SEGMENT]
    newest: dict[tuple[int, tuple[int, int, int], int], tuple[int, bytes]] = {}
    for begin in range(0, len(arena), SEGMENT):
        frame = arena[begin : begin + SEGMENT]
        words = list(layout.walk_directory(frame))
        for entry in layout.walk_frame(frame):
            header = entry.header
            assert crc32c(checked_bytes(frame, entry)) == header.crc
            assert header.check[4:] == bytes(12)
            assert words[entry.ordinal].size == layout.align(layout.ENTRY_HEADER.size + header.length)
            key = (header.pool, entry.oid, header.index)
            if header.version > newest.get(key, (0, b""))[0]:
                newest[key] = header.version, payload_page(header, entry.payload)
    assert {key: page for key, (_, page) in newest.items() if key in expected} == expected


def test_a_slot_says_where_the_entry_is(make_store: Factory, tmp_path: Path) -> None:
    path = tmp_path / "arena"
    store = make_store(8, path=str(path))
    pool = store.create_pool(pages=10)
    for index in range(4):
        store.put(pool, index, text(index))
    store.put(pool, 4, fill(0x01020304))
    slots = [layout.decode_slot(int(_stress.reference(store, pool, index)["slot"])) for index in range(5)]
    frame = path.read_bytes()[:SEGMENT]
    header = layout.decode_image_header(frame)
    assert (header.magic, header.segment) == (layout.FRAME_MAGIC, slots[0].segment)
    assert [(slot.kind, slot.ordinal, slot.generation) for slot in slots[:4]] == [(2, n, 0) for n in range(4)]
    assert [entry.header.index for entry in layout.walk_frame(frame)] == [0, 1, 2, 3]
    key = struct.pack("<QII", pool, 4, 0x01020304)
    assert slots[4] == layout.Slot(1, check=crc32c(key) & 0x3FFFFFFF, pattern=0x01020304)


# --- sealing ---


def sealed(store: Store) -> tuple[int, dict[int, bytes], bytes]:
    """A pool with one shipped segment, pages by index, the image."""
    pool = store.create_pool(pages=100)
    contents = {index: noise(index) if index % 2 else text(index) for index in range(20)}
    for index, page in contents.items():
        store.put(pool, index, page)
    store.seal_open()
    for index in (3, 8):
        store.flush_page(pool, index)
        del contents[index]
    segment, generation, *_ = store.coldest(1)[0]
    image = _stress.ship(store, segment, generation, peer=7, handle=9)
    assert image is not None
    return pool, contents, image


def entry_bytes(image: bytes, ordinal: int) -> bytes:
    header = layout.decode_image_header(image)
    base = layout.align(layout.IMAGE_HEADER.size + 2 * header.entries)
    at = layout.IMAGE_HEADER.size + 2 * ordinal
    begin = base + int.from_bytes(image[at : at + 2], "little") * 8
    length = layout.decode_entry_header(image, begin).length
    return image[begin : begin + layout.ENTRY_HEADER.size + length]


def test_a_sealed_image_opens_with_the_documented_key_nonce_and_data(make_store: Factory) -> None:
    store = make_store(node_key=KEY)
    pool, contents, image = sealed(store)
    header = layout.decode_image_header(image)
    key = HKDFExpand(SHA256(), 32, layout.seal_info(header.seal_id)).derive(KEY)
    found = {}
    for entry in layout.walk_image(image):
        data = layout.seal_associated_data(header.seal_id, entry.ordinal, entry.header, (0, 0, 0))
        assert len(data) == 76
        plain = AESGCM(key).decrypt(layout.seal_nonce(entry.ordinal), entry.body + entry.header.check, data)
        found[entry.header.index] = payload_page(entry.header, plain)
    assert {index: page for index, page in contents.items() if index in found} == found
    assert found
    reference = _stress.reference(store, pool, next(iter(found)))
    assert (reference["peer"], reference["handle"], reference["seal_id"]) == (7, 9, header.seal_id)
    assert all(page[:64] not in image for page in found.values())
    with pytest.raises(InvalidTag):
        AESGCM(bytes(32)).decrypt(bytes(12), entry.body + entry.header.check, data)


def test_object_ids_leave_encrypted(make_store: Factory) -> None:
    store = make_store(node_key=KEY)
    pool = store.create_pool()
    oid = (0x1122334455667788, 0x99AABBCCDDEEFF00, 0x0F1E2D3C4B5A6978)
    store.put(pool, 5, text(5), oid)
    store.seal_open()
    segment, generation, *_ = store.coldest(1)[0]
    image = _stress.ship(store, segment, generation, peer=1)
    assert image is not None
    assert oid[0].to_bytes(8, "little") not in image
    header = layout.decode_image_header(image)
    (entry,) = layout.walk_image(image)
    key = HKDFExpand(SHA256(), 32, layout.seal_info(header.seal_id)).derive(KEY)
    data = layout.seal_associated_data(header.seal_id, 0, entry.header, oid)
    plain = AESGCM(key).decrypt(layout.seal_nonce(0), entry.body + entry.header.check, data)
    assert plain[:24] == b"".join(word.to_bytes(8, "little") for word in oid)
    assert _stress.unseal(store, pool, 5, entry_bytes(image, 0), oid) == text(5)


def test_what_comes_back_is_used_only_if_it_is_what_was_sent(store: Store) -> None:
    pool, contents, image = sealed(store)
    remote = {
        index: int(reference["ordinal"])
        for index in contents
        if (reference := _stress.reference(store, pool, index))["remote"]
    }
    assert len(remote) > 5
    for index, ordinal in remote.items():
        entry = entry_bytes(image, ordinal)
        assert _stress.unseal(store, pool, index, entry) == contents[index]
        for other in remote:
            if other != index:
                with pytest.raises(PageLost):
                    _stress.unseal(store, pool, other, entry)
    for cut in (0, 39, 40, len(entry) - 1):
        with pytest.raises(PageLost):
            _stress.unseal(store, pool, index, entry[:cut])


@given(bit=st.integers(0, 8 * 4136 - 1))
def test_any_bit_flipped_away_is_a_lost_page(bit: int) -> None:
    store, pool, image = _sealed_once()
    entry = bytearray(entry_bytes(image, 1))
    bit %= 8 * len(entry)
    entry[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PageLost):
        _stress.unseal(store, pool, 1, bytes(entry))


_once: list[tuple[Store, int, bytes]] = []


def _sealed_once() -> tuple[Store, int, bytes]:
    if not _once:
        store = Store(8 * SEGMENT, segment_bytes=SEGMENT, lock=False)
        pool, _, image = sealed(store)
        _once.append((store, pool, image))
    return _once[0]


def test_every_sealing_has_an_id_of_its_own(store: Store) -> None:
    pool = store.create_pool(pages=4)
    store.put(pool, 0, text(1))
    store.seal_open()
    segment, generation, *_ = store.coldest(1)[0]
    images = [_stress.ship(store, segment, generation, peer=1, commit=False) for _ in range(3)]
    assert len({layout.decode_image_header(image).seal_id for image in images if image is not None}) == 3
    assert store.get(pool, 0) == text(1), "taken back"


@pytest.mark.parametrize("bit", [0, 3, 15, 16, 40, 130, 165, 200, 1000])
def test_damage_is_not_sealed_into_a_valid_entry(store: Store, bit: int) -> None:
    pool = store.create_pool(pages=4)
    for index in range(3):
        store.put(pool, index, text(index))
    store.corrupt(pool, 1, bit)
    store.seal_open()
    segment, generation, *_ = store.coldest(1)[0]
    image = _stress.ship(store, segment, generation, peer=1)
    assert image is not None
    store.verify()
    assert _stress.unseal(store, pool, 0, entry_bytes(image, 0)) == text(0)
    assert _stress.unseal(store, pool, 2, entry_bytes(image, 2)) == text(2)
    with pytest.raises(PageLost):
        _stress.unseal(store, pool, 1, entry_bytes(image, 1))
    assert store.flush_page(pool, 1)
    assert store.get(pool, 1) is None
