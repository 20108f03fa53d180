"""The NBD server where rows, room or time run out: nobody slow holds up the others, and nothing turns into zeros."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.links.conftest import LENDER, MakePair, Pair

from ramster.cluster import identity
from ramster.constants import PAGE_BYTES
from ramster.engine.links import Links, TlsContext
from ramster.engine.store import Store
from ramster.errors import UsageError
from ramster.testing.nbd import NbdClient, ServedExport
from ramster.testing.proxy import wait_until
from ramster.wire.nbd import Command, Errno

ROWS = 32  # of ServedExport
PAGES = 512
SIZE = PAGES * PAGE_BYTES


def content(seed: int, pages: int) -> bytes:
    return b"".join(random.Random(seed + n).randbytes(2048) + b"\x11" * 2048 for n in range(pages))


@pytest.fixture
def export(pair: Pair) -> Iterator[ServedExport]:
    """128 of its pages are away."""
    with ServedExport(pair.a.links, PAGES) as export:
        client = export.connect()
        client.write(0, content(0, 128))
        client.close()
        pair.ship()
        assert {pair.a.store.where(export.pool, page) for page in range(128)} == {LENDER}
        yield export


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[TlsContext, ssl.SSLContext]:
    """The server's side and a client's, of one cluster."""
    server, client = identity.create_cluster(Path(tmp_path_factory.mktemp("cluster")), "nbd", ["server", "client"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(server.ca)
    context.load_cert_chain(client.cert, client.key)
    return TlsContext(str(server.ca), str(server.cert), str(server.key)), context


@pytest.mark.parametrize("encrypted", [False, True])
def test_answers_go_out_while_a_request_waits_for_a_row(
    export: ServedExport, pair: Pair, tls: tuple[TlsContext, ssl.SSLContext], encrypted: bool
) -> None:
    client = export.connect(tls=tls if encrypted else None)
    with pair.get.up.held():
        asked = [client.send(Command.READ, n * PAGE_BYTES, PAGE_BYTES) for n in range(ROWS + 8)]
        wait_until(lambda: export.statistics()["reads"] == ROWS // 4 + 1, "it wants one more than it may")
    for n, cookie in enumerate(asked):
        answer = client.wait(cookie)
        assert answer.error == 0
        assert answer.data == content(n, 1)


def test_a_client_that_takes_nothing_leaves_rows_to_others(export: ServedExport, pair: Pair) -> None:
    greedy, other = export.connect(), export.connect()
    with pair.get.up.held():
        for n in range(ROWS + 8):
            greedy.send(Command.READ, n % 8 * PAGE_BYTES, 8 * PAGE_BYTES)
        wait_until(lambda: export.statistics()["reads"] > ROWS // 4, "it has as many rows as it may")
        # Its connection waits; this one's requests are under way beside it.
        asked = [other.send(Command.READ, 100 * PAGE_BYTES, PAGE_BYTES) for _ in range(ROWS // 4)]
        wait_until(lambda: export.statistics()["reads"] == ROWS // 2 + 1, "the other one has its rows")
    for cookie in asked:
        assert other.wait(cookie).data == content(100, 1)
    for n in range(20):
        assert other.read(n * PAGE_BYTES, 16 * PAGE_BYTES) == content(n, 16)


def test_stopping_does_not_wait_for_every_page_that_is_asked_for(make_pair: MakePair) -> None:
    pair = make_pair(request_deadline_ms=500, give_up_ms=1000)
    with ServedExport(pair.a.links, PAGES) as export:
        clients = [export.connect() for _ in range(4)]
        clients[0].write(0, content(0, 128))
        pair.ship()
        with pair.get.up.held():
            for n in range(ROWS):  # two parts of pages each, and each would be waited for in turn
                clients[n % 4].send(Command.WRITE, (4 * n + 1) * PAGE_BYTES - 10, 20, payload=bytes(20))
            wait_until(lambda: export.statistics()["writes"] == ROWS + 1, "all of them are parked")
            export.server.stop()
        assert len(export.ended) == 4


# --- room ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tight() -> Iterator[ServedExport]:
    """An arena that soon has no room for what does not compress."""
    links = Links(Store(1 << 20, segment_bytes=65536, lock=False, full_wait_ms=0), 9)
    with ServedExport(links, PAGES) as export:
        yield export
    links.stop()
    links.store.verify()
    links.store.close()


def test_a_page_never_reads_as_zeros_while_a_write_to_it_is_refused(tight: ServedExport) -> None:
    pages = 8
    writer, readers = tight.connect(), [tight.connect() for _ in range(2)]
    for page in range(300):  # more than the arena has room for
        writer.ask(Command.WRITE, page * PAGE_BYTES, PAGE_BYTES, payload=random.Random(page).randbytes(PAGE_BYTES))
    done = threading.Event()
    zeros: list[int] = []

    def read(reader: NbdClient) -> None:
        while not done.is_set():
            asked = [reader.send(Command.READ, n % pages * PAGE_BYTES, PAGE_BYTES) for n in range(64)]
            answers = [reader.wait(cookie) for cookie in asked]
            zeros.extend(n % pages for n, a in enumerate(answers) if a.error == 0 and a.data == bytes(PAGE_BYTES))

    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    refused = 0
    filled = b"\x11" * PAGE_BYTES  # needs no room
    for turn in range(60):
        asked = [
            writer.send(
                Command.WRITE,
                n // 2 % pages * PAGE_BYTES,
                PAGE_BYTES,
                payload=random.Random(turn + n).randbytes(PAGE_BYTES) if n % 2 else filled,
            )
            for n in range(64)
        ]
        refused += sum(writer.wait(cookie).error != 0 for cookie in asked)
    done.set()
    for thread in threads:
        thread.join()
    assert refused > 0
    assert zeros == []


FULL_WAIT_S = 1.0


@pytest.fixture
def patient() -> Iterator[ServedExport]:
    """As `tight`, but a write waits for room."""
    links = Links(Store(1 << 20, segment_bytes=65536, lock=False, full_wait_ms=round(FULL_WAIT_S * 1000)), 9)
    with ServedExport(links, PAGES) as export:
        yield export
    links.stop()
    links.store.verify()
    links.store.close()


def write_noise(client: NbdClient, page: int) -> int:
    """Write a page that does not compress; the error of the answer."""
    payload = random.Random(page).randbytes(PAGE_BYTES)
    return client.ask(Command.WRITE, page * PAGE_BYTES, PAGE_BYTES, payload=payload).error


def fill_up(client: NbdClient, first: int = 0) -> tuple[int, float]:
    """Write pages until one is refused: its number, and how many seconds that took."""
    for page in range(first, PAGES):
        begin = time.monotonic()
        if error := write_noise(client, page):
            assert error == Errno.ENOSPC
            return page, time.monotonic() - begin
    raise AssertionError("never full")


def test_a_full_arena_keeps_one_write_waiting_and_refuses_the_next_ones_quickly(patient: ServedExport) -> None:
    client, other = patient.connect(), patient.connect()
    refused, waited = fill_up(client)
    assert waited >= FULL_WAIT_S
    begin = time.monotonic()
    for page in range(refused + 1, refused + 31):
        assert write_noise(client, page) == Errno.ENOSPC
        assert write_noise(other, page + 100) == Errno.ENOSPC
    assert time.monotonic() - begin < 10 * FULL_WAIT_S, "60 of them"


def test_writes_find_room_as_soon_as_there_is_some_and_wait_for_more_again(patient: ServedExport) -> None:
    client = patient.connect()
    full, _ = fill_up(client)
    client.trim(0, 4 * PAGE_BYTES)
    again, _ = fill_up(client, full)
    assert again - full >= 3, "where the trimmed ones were"
    client.trim(0, SIZE)
    _, waited = fill_up(client)
    assert waited >= FULL_WAIT_S, "room came, so it is worth waiting for"


def test_a_failed_write_is_counted_once(tight: ServedExport) -> None:
    client = tight.connect()
    failed = 0
    for page in range(300):
        payload = random.Random(page).randbytes(PAGE_BYTES)
        failed += client.ask(Command.WRITE, page * PAGE_BYTES, PAGE_BYTES, payload=payload).error == Errno.ENOSPC
    assert failed > 0
    assert tight.statistics()["errors"] == failed


def test_asking_for_pages_to_be_near_never_costs_them(make_pair: MakePair) -> None:
    pair = make_pair(segments=8, full_wait_ms=0)
    with ServedExport(pair.a.links, PAGES) as export:
        client = export.connect()
        client.write(0, content(0, 128))
        pair.ship()
        for page in range(200, 330):  # until there is no room
            payload = random.Random(page).randbytes(PAGE_BYTES)
            if client.ask(Command.WRITE, page * PAGE_BYTES, PAGE_BYTES, payload=payload).error:
                break
        client.trim(200 * PAGE_BYTES, 60 * PAGE_BYTES)
        assert client.ask(Command.CACHE, 0, 128 * PAGE_BYTES).error == 0
        assert client.read(0, 128 * PAGE_BYTES) == content(0, 128)
        client.close()


# --- how it ends ---------------------------------------------------------------------------------------------------


def test_what_came_before_noise_is_answered(export: ServedExport) -> None:
    client = export.connect()
    here = client.send(Command.FLUSH)
    away = client.send(Command.READ, 0, PAGE_BYTES)
    client.send(Command.FLUSH, magic=0x12345678)
    assert client.wait(here).error == 0
    assert client.wait(away).data == content(0, 1)
    with pytest.raises(ConnectionError):
        client.answer()
    wait_until(lambda: export.ended[-1] == "the client sent something that is not a request", "it says why")


def test_an_export_has_no_more_pages_than_page_numbers(export: ServedExport) -> None:
    with pytest.raises(UsageError):
        export.server.add_export(export.pool, PAGE_BYTES, PAGE_BYTES << 32)
