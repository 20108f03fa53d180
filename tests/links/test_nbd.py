"""The NBD server's transmission phase, request by request: what a client may see, wherever pages are.

Clients that others wrote are in tests/frontswap/test_nbd_clients.py.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.links.conftest import LENDER, MakePair, Pair

from ramster.cluster import identity
from ramster.constants import PAGE_BYTES
from ramster.engine.links import Links, TlsContext
from ramster.engine.nbd import LENGTH_MAX, NbdConnection, NbdServer
from ramster.engine.store import Store
from ramster.errors import Refused, UsageError
from ramster.testing.nbd import NbdClient, ServedExport
from ramster.testing.proxy import wait_until
from ramster.wire.nbd import Command, CommandFlag, Errno, ExtentState, ReplyType

PAGES = 512
PAGE_LOCKS = 256  # pages so far apart have the same lock
SIZE = PAGES * PAGE_BYTES
HOLE = int(ExtentState.HOLE | ExtentState.ZERO)

Serve = Callable[..., ServedExport]


@pytest.fixture
def serve() -> Iterator[Serve]:
    served: list[ServedExport] = []
    engines: list[Links] = []

    def make(
        pair: Pair | None = None, *, arena: int = 4 << 20, full_wait_ms: int = 50, **options: object
    ) -> ServedExport:
        if pair is None:
            links = Links(Store(arena, segment_bytes=65536, lock=False, full_wait_ms=full_wait_ms), 9)
            engines.append(links)
        else:
            links = pair.a.links
        served.append(ServedExport(links, PAGES, **options))  # type: ignore[arg-type]
        return served[-1]

    yield make
    for each in served:
        each.close()
    for links in engines:
        links.stop()
        links.store.verify()
        links.store.close()


def content(seed: int, length: int) -> bytes:
    """Bytes of which about half is left after compression."""
    r = random.Random(seed)
    return b"".join(r.randbytes(1024) + bytes([seed % 255 + 1]) * 1024 for _ in range(-(-length // 2048)))[:length]


def away(pair: Pair, export: ServedExport, pages: range) -> None:
    """Ship everything that is stored, and make sure that these pages are gone with it."""
    pair.ship()
    assert {pair.a.store.where(export.pool, page) for page in pages} == {LENDER}


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_what_was_written_is_read_at_any_offset_and_length(serve: Serve, structured: bool) -> None:
    client = serve().connect(structured=structured)
    data = content(1, 300_000)
    client.write(12_345, data)
    assert client.read(12_345, len(data)) == data
    assert client.read(12_000, 1000) == bytes(345) + data[:655]
    assert client.read(0, SIZE) == bytes(12_345) + data + bytes(SIZE - 12_345 - len(data))


@pytest.mark.parametrize("structured", [False, True])
def test_a_page_that_was_never_written_reads_as_zeros(serve: Serve, structured: bool) -> None:
    client = serve().connect(structured=structured)
    found = client.ask(Command.READ, 100, 10_000)
    assert found.data == bytes(10_000)
    assert found.kinds == ([ReplyType.OFFSET_HOLE] if structured else [])


_OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "zero", "trim", "ship", "cache"]),
        st.integers(0, 24 * PAGE_BYTES - 1),
        st.one_of(st.integers(1, 9000), st.just(PAGE_BYTES), st.integers(1, 12).map(lambda n: n * PAGE_BYTES)),
        st.booleans(),
    ),
    max_size=24,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=_OPERATIONS, structured=st.booleans(), seed=st.integers(0, 1000))
def test_any_sequence_reads_as_a_byte_array_would(
    pair: Pair, operations: list[tuple[str, int, int, bool]], structured: bool, seed: int
) -> None:
    with ServedExport(pair.a.links, 24) as export:
        model = bytearray(24 * PAGE_BYTES)
        client = export.connect(structured=structured)
        for number, (what, offset, length, aligned) in enumerate(operations):
            if aligned:
                offset -= offset % PAGE_BYTES
            length = min(length, len(model) - offset)
            if what == "write":
                data = content(seed + number, length)
                client.write(offset, data)
                model[offset : offset + length] = data
            elif what == "read":
                assert client.read(offset, length) == model[offset : offset + length]
            elif what == "zero":
                client.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            elif what == "trim":  # whole pages go, the rest of the range stays as it is
                client.trim(offset, length)
                first, last = -(-offset // PAGE_BYTES), (offset + length) // PAGE_BYTES
                if first < last:
                    model[first * PAGE_BYTES : last * PAGE_BYTES] = bytes((last - first) * PAGE_BYTES)
            elif what == "cache":
                assert client.ask(Command.CACHE, offset, length).error == 0
            else:
                pair.ship()
        assert client.read(0, len(model)) == model
        client.trim(0, len(model))
        assert pair.a.store.counters()["pages_stored"] == 0
        client.close()
    pair.a.store.destroy_pool(export.pool)


def test_a_payload_may_arrive_in_any_pieces(serve: Serve) -> None:
    client = serve().connect()
    data = content(3, 3 * PAGE_BYTES + 17)
    client.send(Command.WRITE, 1000, len(data))
    for at in range(0, len(data), 777):
        client.socket.sendall(data[at : at + 777])
    assert client.answer().error == 0
    assert client.read(1000, len(data)) == data


def test_many_requests_in_one_packet_are_all_answered(serve: Serve) -> None:
    client = serve().connect()
    cookies = [
        client.send(Command.WRITE, n * PAGE_BYTES, PAGE_BYTES, payload=content(n, PAGE_BYTES)) for n in range(200)
    ]
    reads = [client.send(Command.READ, n * PAGE_BYTES, PAGE_BYTES) for n in range(100)]
    for cookie in cookies:
        assert client.wait(cookie).error == 0
    for n, cookie in enumerate(reads):
        assert client.wait(cookie).data == content(n, PAGE_BYTES)


def test_the_largest_read_and_write(serve: Serve) -> None:
    links = Links(Store(80 << 20, lock=False), 9)
    with ServedExport(links, 2 * LENGTH_MAX // PAGE_BYTES) as export:
        client = export.connect()
        data = random.Random(5).randbytes(LENGTH_MAX)
        client.write(4096, data)
        assert client.read(4096, LENGTH_MAX) == data
        client.close()
    links.stop()
    links.store.close()


def test_a_client_that_takes_nothing_holds_up_no_other(serve: Serve) -> None:
    export = serve()
    slow, other = export.connect(), export.connect()
    slow.write(0, content(1, 200_000))
    asked = [slow.send(Command.READ, 0, 200_000) for _ in range(100)]
    for n in range(50):
        other.write(300_000, content(n, 5000))
        assert other.read(300_000, 5000) == content(n, 5000)
    for cookie in asked:
        assert slow.wait(cookie).data == content(1, 200_000)


def test_writers_of_parts_of_the_same_pages_lose_nothing_of_each_other(serve: Serve) -> None:
    export = serve()
    part = 512

    def write(lane: int) -> None:
        client = export.connect()
        for turn in range(30):
            for page in range(4):
                client.write(page * PAGE_BYTES + lane * part, bytes([lane * 30 + turn + 1]) * part)
        client.close()

    threads = [threading.Thread(target=write, args=(lane,)) for lane in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = export.connect()
    for page in range(4):
        assert client.read(page * PAGE_BYTES, PAGE_BYTES) == b"".join(
            bytes([lane * 30 + 30]) * part for lane in range(8)
        )


# --- freeing, status -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES])
def test_trim_and_write_zeroes_free_pages_here_and_away(serve: Serve, pair: Pair, command: Command) -> None:
    export = serve(pair)
    client = export.connect()
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    client.write(200 * PAGE_BYTES, content(2, 10 * PAGE_BYTES))
    assert client.ask(command, 0, SIZE).error == 0
    assert pair.a.store.counters()["pages_stored"] == 0
    pair.wait_for_frees(0)
    assert client.read(0, SIZE) == bytes(SIZE)
    assert export.statistics()["pages_freed"] == 138


def test_a_long_trim_is_done_by_a_slow_thread(serve: Serve) -> None:
    export = serve(max_pages=1 << 20)
    export.grow(1 << 32)
    client = export.connect()
    client.write((1 << 32) - 8192, content(1, 8192))
    assert client.ask(Command.TRIM, 0, 0xFFFFF000).error == 0
    assert client.read((1 << 32) - 4096, 4096) == content(1, 8192)[4096:]
    assert export.statistics()["pages_freed"] == 1


def test_block_status_tells_what_is_stored(serve: Serve) -> None:
    client = serve().connect()
    client.write(4 * PAGE_BYTES, content(1, 2 * PAGE_BYTES))
    client.write(9 * PAGE_BYTES, content(2, 100))
    found = client.ask(Command.BLOCK_STATUS, 100, 12 * PAGE_BYTES)
    assert found.runs == [
        (4 * PAGE_BYTES - 100, HOLE),
        (2 * PAGE_BYTES, 0),
        (3 * PAGE_BYTES, HOLE),
        (PAGE_BYTES, 0),
        (2 * PAGE_BYTES + 100, HOLE),
    ]
    one = client.ask(Command.BLOCK_STATUS, 100, 12 * PAGE_BYTES, flags=CommandFlag.REQ_ONE)
    assert one.runs == found.runs[:1]


def test_cache_brings_pages_back(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client = export.connect()
    client.write(0, content(1, 64 * PAGE_BYTES))
    away(pair, export, range(64))
    assert client.ask(Command.CACHE, 0, 64 * PAGE_BYTES).error == 0
    assert {pair.a.store.where(export.pool, page) for page in range(64)} == {"here"}
    pair.wait_for_frees(0)


def test_an_export_grows(serve: Serve) -> None:
    export = serve(max_pages=2 * PAGES)
    client = export.connect()
    assert client.ask(Command.WRITE, SIZE, 4096, payload=bytes(4096)).error == Errno.ENOSPC
    export.grow(2 * SIZE)
    new = export.connect()
    new.write(2 * SIZE - 4096, content(1, 4096))
    assert new.read(2 * SIZE - 4096, 4096) == content(1, 4096)
    for size in (SIZE, 3 * SIZE, 2 * SIZE + 1):
        with pytest.raises(UsageError):
            export.server.resize(export.number, size)


@pytest.mark.parametrize("offset", [SIZE - 4096, SIZE, 2 * SIZE - 4096])
def test_a_client_keeps_to_the_size_that_it_was_told_when_the_export_grows(serve: Serve, offset: int) -> None:
    export = serve(max_pages=2 * PAGES)
    old = export.connect()
    export.grow(2 * SIZE)
    new = export.connect()
    new.write(0, content(1, 2 * SIZE))
    assert old.ask(Command.WRITE, offset, 8192, payload=bytes(8192)).error == Errno.ENOSPC
    assert old.ask(Command.WRITE_ZEROES, offset, 8192).error == Errno.ENOSPC
    for command in (Command.READ, Command.TRIM, Command.CACHE, Command.BLOCK_STATUS):
        assert old.ask(command, offset, 8192).error == Errno.EINVAL
    assert new.read(0, 2 * SIZE) == content(1, 2 * SIZE), "nothing beyond was touched"
    assert old.read(SIZE - 4096, 4096) == content(1, 2 * SIZE)[SIZE - 4096 : SIZE]


def test_no_client_is_told_more_than_there_is(serve: Serve) -> None:
    export = serve()
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(UsageError, match="the export has"):
        NbdConnection(theirs.detach()).serve(export.server, export.number, True, None, SIZE + 1)


# --- pages that are away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_a_read_of_pages_that_are_away_parks_that_request_only(serve: Serve, pair: Pair, structured: bool) -> None:
    export = serve(pair)
    client = export.connect(structured=structured)
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    client.write(200 * PAGE_BYTES, content(2, PAGE_BYTES))
    with pair.get.up.held():
        parked = client.send(Command.READ, 0, 100 * PAGE_BYTES)
        single = client.send(Command.READ, 126 * PAGE_BYTES, PAGE_BYTES)
        assert client.read(200 * PAGE_BYTES, PAGE_BYTES) == content(2, PAGE_BYTES)
        client.write(201 * PAGE_BYTES, content(3, 100))
    assert client.wait(parked).data == content(1, 128 * PAGE_BYTES)[: 100 * PAGE_BYTES]
    assert client.wait(single).data == content(1, 128 * PAGE_BYTES)[126 * PAGE_BYTES : 127 * PAGE_BYTES]
    assert export.statistics()["pages_remote"] == 101


def test_a_part_of_a_page_that_is_away_is_written_while_others_go_on(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client = export.connect()
    before = content(1, 128 * PAGE_BYTES)
    client.write(0, before)
    away(pair, export, range(128))
    with pair.get.up.held():
        parked = client.send(Command.WRITE, 100, 2 * PAGE_BYTES, payload=b"\x11" * (2 * PAGE_BYTES))
        zeroed = client.send(Command.WRITE_ZEROES, 5 * PAGE_BYTES + 5, 10)
        client.write(200 * PAGE_BYTES, content(3, 4096))
        assert client.read(200 * PAGE_BYTES, 4096) == content(3, 4096)
    assert client.wait(parked).error == 0
    assert client.wait(zeroed).error == 0
    expected = bytearray(before)
    expected[100 : 100 + 2 * PAGE_BYTES] = b"\x11" * (2 * PAGE_BYTES)
    expected[5 * PAGE_BYTES + 5 : 5 * PAGE_BYTES + 15] = bytes(10)
    assert client.read(0, 128 * PAGE_BYTES) == expected


@pytest.mark.parametrize("whole", [False, True])
def test_a_page_that_is_fetched_to_be_changed_can_be_written_meanwhile(serve: Serve, pair: Pair, whole: bool) -> None:
    export = serve(pair)
    client, other = export.connect(), export.connect()
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    with pair.get.up.held():
        parked = client.send(Command.WRITE, 3 * PAGE_BYTES + 100, 50, payload=b"\x11" * 50)
        wait_until(lambda: pair.pending() > 0, "the page is asked for")
        other.write((3 + PAGE_LOCKS) * PAGE_BYTES, content(2, PAGE_BYTES))  # has the same lock
        if whole:
            other.write(3 * PAGE_BYTES, content(7, PAGE_BYTES))
        assert pair.pending() > 0
    assert client.wait(parked).error == 0
    expected = bytearray(content(7, PAGE_BYTES) if whole else content(1, 4 * PAGE_BYTES)[3 * PAGE_BYTES :])
    expected[100:150] = b"\x11" * 50
    assert client.read(3 * PAGE_BYTES, PAGE_BYTES) == expected
    assert client.read((3 + PAGE_LOCKS) * PAGE_BYTES, PAGE_BYTES) == content(2, PAGE_BYTES)


def test_a_page_that_is_brought_near_can_be_written_meanwhile(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client, other = export.connect(), export.connect()
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    with pair.get.up.held():
        parked = [client.send(Command.CACHE, page * PAGE_BYTES, PAGE_BYTES) for page in (0, 1)]
        wait_until(lambda: pair.pending() == 2, "both are asked for")
        other.write(0, content(7, PAGE_BYTES))
        other.trim(PAGE_BYTES, PAGE_BYTES)
        assert pair.pending() == 2
    assert [client.wait(cookie).error for cookie in parked] == [0, 0]
    assert client.read(0, 2 * PAGE_BYTES) == content(7, PAGE_BYTES) + bytes(PAGE_BYTES)


def test_cache_asks_for_all_pages_at_once(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client = export.connect()
    client.write(0, content(1, 64 * PAGE_BYTES))
    away(pair, export, range(64))
    with pair.get.down.held():
        near = client.send(Command.CACHE, 0, 64 * PAGE_BYTES)
        wait_until(lambda: pair.pending() > 1, "several segments are asked for at once")
    assert client.wait(near).error == 0
    assert export.statistics()["pages_remote"] == 64
    assert client.read(0, 64 * PAGE_BYTES) == content(1, 64 * PAGE_BYTES)


def test_a_page_that_is_brought_near_never_takes_the_place_of_a_later_one(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client, other = export.connect(), export.connect()
    for turn in range(20):
        client.write(0, content(turn, 32 * PAGE_BYTES))
        away(pair, export, range(32))
        for page in range(32):
            near = client.send(Command.CACHE, page * PAGE_BYTES, PAGE_BYTES)
            for _ in range(page % 8):  # so that the write falls into every moment of the other
                other.ask(Command.FLUSH)
            other.write(page * PAGE_BYTES, content(100 + turn + page, PAGE_BYTES))
            assert client.wait(near).error == 0
            assert other.read(page * PAGE_BYTES, PAGE_BYTES) == content(100 + turn + page, PAGE_BYTES)


def test_a_page_overwritten_while_it_is_asked_for_reads_as_either(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client, other = export.connect(), export.connect()
    before = content(1, 128 * PAGE_BYTES)
    client.write(0, before)
    away(pair, export, range(128))
    with pair.get.down.held():
        parked = client.send(Command.READ, 0, 16 * PAGE_BYTES)
        wait_until(lambda: pair.pending() > 0, "the page is asked for")
        other.write(3 * PAGE_BYTES, content(7, PAGE_BYTES))
        other.trim(5 * PAGE_BYTES, PAGE_BYTES)
    data = client.wait(parked).data
    assert data[3 * PAGE_BYTES : 4 * PAGE_BYTES] == content(7, PAGE_BYTES)
    assert data[5 * PAGE_BYTES : 6 * PAGE_BYTES] == bytes(PAGE_BYTES)
    assert data[6 * PAGE_BYTES :] == before[6 * PAGE_BYTES : 16 * PAGE_BYTES]


def test_more_parked_reads_than_there_are_rows_wait_their_turn(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client = export.connect()
    before = content(1, 128 * PAGE_BYTES)
    client.write(0, before)
    away(pair, export, range(128))
    asked = [(n * 37 % 120, client.send(Command.READ, n * 37 % 120 * PAGE_BYTES, 8 * PAGE_BYTES)) for n in range(300)]
    for page, cookie in asked:
        assert client.wait(cookie).data == before[page * PAGE_BYTES : (page + 8) * PAGE_BYTES]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[TlsContext, ssl.SSLContext]:
    """The server's side and a client's, of one cluster."""
    server, client = identity.create_cluster(tmp_path_factory.mktemp("cluster"), "nbd", ["server", "client"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(server.ca)
    context.load_cert_chain(client.cert, client.key)
    return TlsContext(str(server.ca), str(server.cert), str(server.key)), context


def test_the_same_over_tls(serve: Serve, pair: Pair, tls: tuple[TlsContext, ssl.SSLContext]) -> None:
    export = serve(pair)
    client = export.connect(tls=tls)
    before = content(1, 128 * PAGE_BYTES)
    client.write(0, before)
    away(pair, export, range(128))
    with pair.get.up.held():
        parked = client.send(Command.READ, 100, 64 * PAGE_BYTES)
        client.write(200 * PAGE_BYTES, content(2, 300_000))
        assert client.read(200 * PAGE_BYTES, 300_000) == content(2, 300_000)
    assert client.wait(parked).data == before[100 : 100 + 64 * PAGE_BYTES]
    cookies = [client.send(Command.READ, n * PAGE_BYTES, 20 * PAGE_BYTES) for n in range(100)]
    for n, cookie in enumerate(cookies):
        assert client.wait(cookie).data == before[n * PAGE_BYTES : (n + 20) * PAGE_BYTES]


# --- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_a_lost_page_is_an_error_named_and_counted_never_zeros(
    serve: Serve, make_pair: MakePair, structured: bool
) -> None:
    pair = make_pair(request_deadline_ms=50, give_up_ms=200)
    export = serve(pair)
    client = export.connect(structured=structured)
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    client.write(200 * PAGE_BYTES, content(2, PAGE_BYTES))
    pair.cut()
    found = client.ask(Command.READ, 3 * PAGE_BYTES, PAGE_BYTES)
    assert (found.error, bytes(found.data)) == (Errno.EIO, b"")
    if structured:
        assert found.error_offset == 3 * PAGE_BYTES
    assert client.ask(Command.READ, 0, 16 * PAGE_BYTES).error == Errno.EIO
    assert client.ask(Command.WRITE, 4 * PAGE_BYTES + 1, 1, payload=b"x").error == Errno.EIO
    assert (export.number, 3, "unreachable") in export.server.events()
    assert export.statistics()["pages_lost"] >= 3
    assert client.read(200 * PAGE_BYTES, PAGE_BYTES) == content(2, PAGE_BYTES)
    client.write(3 * PAGE_BYTES, content(3, PAGE_BYTES))
    assert client.read(3 * PAGE_BYTES, PAGE_BYTES) == content(3, PAGE_BYTES)


def test_a_damaged_page_is_an_error(serve: Serve) -> None:
    export = serve()
    client = export.connect()
    client.write(0, content(1, 2 * PAGE_BYTES))
    export.store.corrupt(export.pool, 1, 700)
    assert client.read(0, PAGE_BYTES) == content(1, PAGE_BYTES)
    assert client.ask(Command.READ, PAGE_BYTES, PAGE_BYTES).error == Errno.EIO
    assert export.server.events() == [(export.number, 1, "corrupt")]
    assert export.server.events() == []


def test_a_write_that_a_full_arena_refuses_leaves_the_page_as_it_was(serve: Serve) -> None:
    export = serve(arena=1 << 20, full_wait_ms=1)
    client = export.connect()
    held = {}
    for version in range(3):  # the first round fills the arena, the others write over what is there
        for page in range(PAGES):
            payload = random.Random(f"{page} {version}").randbytes(PAGE_BYTES)
            answer = client.ask(Command.WRITE, page * PAGE_BYTES, PAGE_BYTES, payload=payload)
            assert answer.error in (0, Errno.ENOSPC)
            if not answer.error:
                held[page] = payload
    assert 0 < len(held) < PAGES
    part = random.Random(0).randbytes(512)
    for page in range(PAGES):
        if not client.ask(Command.WRITE, page * PAGE_BYTES + 512, 512, payload=part).error:
            before = held.get(page, bytes(PAGE_BYTES))
            held[page] = before[:512] + part + before[1024:]
    for page in range(PAGES):
        assert client.read(page * PAGE_BYTES, PAGE_BYTES) == held.get(page, bytes(PAGE_BYTES))
    never = next(page for page in range(PAGES) if page not in held)
    assert client.ask(Command.BLOCK_STATUS, never * PAGE_BYTES, PAGE_BYTES).runs == [(PAGE_BYTES, 3)]
    # Nothing of it is a loss, and nobody is told of one.
    assert export.server.events() == [] and export.statistics()["pages_lost"] == 0
    # A page of one word takes no room, and gives some back.
    for page in held:
        client.write(page * PAGE_BYTES, bytes(PAGE_BYTES))
    assert client.read(0, SIZE) == bytes(SIZE)
    client.write(never * PAGE_BYTES, content(never, PAGE_BYTES))


# --- bad requests --------------------------------------------------------------------------------------------------

BAD = [
    (Command.READ, SIZE, 1, 0, Errno.EINVAL),
    (Command.READ, SIZE - 1, 2, 0, Errno.EINVAL),
    (Command.READ, (1 << 64) - 1, 2, 0, Errno.EINVAL),
    (Command.READ, 0, 0, 0, Errno.EINVAL),
    (Command.READ, 0, LENGTH_MAX + 1, 0, Errno.EINVAL),
    (Command.READ, 0, 1, CommandFlag.NO_HOLE, Errno.EINVAL),
    (Command.READ, 0, 1, 1 << 15, Errno.EINVAL),
    (Command.WRITE, SIZE, 1, 0, Errno.ENOSPC),
    (Command.WRITE, SIZE - 5, 6, 0, Errno.ENOSPC),
    (Command.WRITE, 0, 0, 0, Errno.EINVAL),
    (Command.WRITE, 0, 1, CommandFlag.DF, Errno.EINVAL),
    (Command.TRIM, SIZE, 1, 0, Errno.EINVAL),
    (Command.TRIM, 0, 0, 0, Errno.EINVAL),
    (Command.WRITE_ZEROES, SIZE - 1, 4, 0, Errno.ENOSPC),
    (Command.WRITE_ZEROES, 0, 1, CommandFlag.REQ_ONE, Errno.EINVAL),
    (Command.CACHE, SIZE, 1, 0, Errno.EINVAL),
    (Command.FLUSH, 1, 0, 0, Errno.EINVAL),
    (Command.FLUSH, 0, 1, 0, Errno.EINVAL),
    (Command.BLOCK_STATUS, SIZE, 1, 0, Errno.EINVAL),
    (Command.BLOCK_STATUS, 0, 0, 0, Errno.EINVAL),
    (8, 0, 1, 0, Errno.EINVAL),
    (0xFFFF, 0, 1, 0, Errno.EINVAL),
]


@pytest.mark.parametrize("structured", [False, True])
def test_a_malformed_request_gets_its_error_and_the_connection_goes_on(serve: Serve, structured: bool) -> None:
    export = serve()
    client = export.connect(structured=structured)
    client.write(0, content(1, 100))
    for command, offset, length, flags, error in BAD:
        payload = bytes(length) if command == Command.WRITE else b""
        assert client.ask(command, offset, length, flags=flags, payload=payload).error == error, (
            command,
            offset,
            length,
        )
    if not structured:
        assert client.ask(Command.READ, 0, 1, flags=CommandFlag.DF).error == Errno.EINVAL
        assert client.ask(Command.BLOCK_STATUS, 0, 4096).error == Errno.EINVAL
    assert client.read(0, 100) == content(1, 100)
    assert export.statistics()["refused"] == len(BAD) + (0 if structured else 2)


def test_a_write_of_more_than_the_limit_is_read_and_refused(serve: Serve) -> None:
    client = serve(max_pages=4 * LENGTH_MAX // PAGE_BYTES).connect()
    length = LENGTH_MAX + 4096
    assert client.ask(Command.WRITE, 0, length, payload=bytes(length)).error == Errno.ENOSPC
    assert client.read(0, 10) == bytes(10)


@pytest.mark.parametrize(
    "send",
    [
        lambda client: client.send(Command.READ, 0, 1, magic=0x12345678),
        lambda client: client.send(Command.WRITE, 0, 0xFFFFFFFF),
        lambda client: client.send(Command.DISC),
        lambda client: client.close(),
        lambda client: client.send(Command.WRITE, 0, 5000, payload=bytes(4999)) and client.close(),
    ],
)
def test_what_ends_the_connection_ends_it_alone(serve: Serve, send: Callable[[NbdClient], object]) -> None:
    export = serve()
    client, other = export.connect(), export.connect()
    send(client)
    wait_until(lambda: len(export.ended) == 1, "the connection has ended")
    other.write(0, content(1, 10))
    assert other.read(0, 10) == content(1, 10)


def test_a_goodbye_is_answered_after_what_came_before_it(serve: Serve, pair: Pair) -> None:
    export = serve(pair)
    client = export.connect()
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    with pair.get.up.held():
        parked = client.send(Command.READ, 0, 4 * PAGE_BYTES)
        client.send(Command.DISC)
    assert client.wait(parked).data == content(1, 128 * PAGE_BYTES)[: 4 * PAGE_BYTES]
    with pytest.raises(ConnectionError):
        client.answer()


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_client_that_sends_no_more_gets_the_answers_that_are_on_their_way(
    serve: Serve, pair: Pair, tls: tuple[TlsContext, ssl.SSLContext], encrypted: bool
) -> None:
    export = serve(pair)
    client = export.connect(tls=tls if encrypted else None)
    before = content(1, 128 * PAGE_BYTES)
    client.write(0, before)
    away(pair, export, range(128))
    with pair.get.up.held():
        read = client.send(Command.READ, 0, 64 * PAGE_BYTES)
        written = client.send(Command.WRITE, 100 * PAGE_BYTES + 10, 100, payload=bytes(100))
        client.send(Command.WRITE, 101 * PAGE_BYTES + 10, 5000, payload=bytes(4999))
        client.end_sending()
        wait_until(lambda: pair.pending() > 0, "the pages are asked for")
        assert export.ended == []
    assert client.wait(read).data == before[: 64 * PAGE_BYTES]
    assert client.wait(written).error == 0
    with pytest.raises(ConnectionError):  # a part of a request has no answer
        client.answer()
    wait_until(lambda: export.ended == ["the client went away"], "the connection has ended")


def test_a_read_only_export_refuses_to_change(serve: Serve) -> None:
    client = serve(read_only=True).connect()
    assert client.ask(Command.WRITE, 0, 4, payload=b"abcd").error == Errno.EPERM
    assert client.ask(Command.TRIM, 0, 4096).error == Errno.EPERM
    assert client.ask(Command.WRITE_ZEROES, 0, 4096).error == Errno.EPERM
    assert client.read(0, 4) == bytes(4)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=200),
    requests=st.lists(st.tuples(*[st.integers(0, (1 << n) - 1) for n in (16, 16, 64, 64, 32)]), max_size=6),
)
def test_no_bytes_of_a_client_reach_another_export(
    noise: tuple[ServedExport, int], data: bytes, requests: list[tuple[int, int, int, int, int]]
) -> None:
    export, secret = noise
    client = export.connect()
    received = bytearray()
    with contextlib.suppress(ConnectionError):  # noise that is no request ends the connection
        for flags, command, _, offset, length in requests:
            client.send(command % 9, offset % (2 * SIZE), length % 70_000, flags=flags % 32)
        client.socket.sendall(data)
        client.socket.shutdown(1)
        while more := client.socket.recv(1 << 20):
            received += more
    assert content(77, 64) not in received
    client.close()
    assert export.store.get(secret, 0) == content(77, PAGE_BYTES)


@pytest.fixture
def noise(serve: Serve) -> tuple[ServedExport, int]:
    """An export to be shouted at, beside the pool of another one."""
    export = serve()
    secret = export.store.create_pool(pages=PAGES)
    export.store.put(secret, 0, content(77, PAGE_BYTES))
    return export, secret


# --- the server ----------------------------------------------------------------------------------------------------


def test_an_export_in_use_cannot_be_removed(serve: Serve) -> None:
    export = serve()
    client = export.connect()
    with pytest.raises(Refused):
        export.server.remove_export(export.number)
    client.close()
    wait_until(lambda: export.statistics()["connections"] == 0, "the connection has ended")
    export.server.remove_export(export.number)
    with pytest.raises(UsageError):
        export.server.statistics(export.number)


def test_stopping_ends_connections_with_parked_reads(serve: Serve, make_pair: MakePair) -> None:
    pair = make_pair(request_deadline_ms=100, give_up_ms=500)
    export = serve(pair)
    client = export.connect()
    client.write(0, content(1, 128 * PAGE_BYTES))
    away(pair, export, range(128))
    with pair.get.up.held():
        client.send(Command.READ, 0, PAGE_BYTES)
        wait_until(lambda: pair.pending() > 0, "the page is asked for")
        export.server.stop()
    assert len(export.ended) == 1


@pytest.mark.parametrize(("size", "most"), [(0, 4096), (8192, 4096), (100, 4096), (4096, 5000)])
def test_sizes_of_exports_are_whole_pages(serve: Serve, size: int, most: int) -> None:
    export = serve()
    with pytest.raises(UsageError):
        export.server.add_export(export.pool, size, most)


@pytest.mark.parametrize(("threads", "requests"), [(0, 1), (17, 1), (1, 0), (1, 5000)])
def test_limits_of_the_server_are_checked(serve: Serve, threads: int, requests: int) -> None:
    with pytest.raises(UsageError):
        NbdServer(serve().links, slow_threads=threads, requests_max=requests)
