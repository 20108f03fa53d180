"""NBD clients that have gone, beside those that only send no more, and what connections share."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import pytest
from tests.links.conftest import LENDER, MakePair, Pair
from tests.links.test_nbd_limits import PAGES, content, tls

from ramster.constants import PAGE_BYTES
from ramster.engine.links import TlsContext
from ramster.engine.nbd import LENGTH_MAX
from ramster.testing.nbd import ServedExport
from ramster.testing.proxy import wait_until
from ramster.wire.nbd import Command, Errno

__all__ = ["tls"]


@pytest.fixture
def export(pair: Pair) -> Iterator[ServedExport]:
    """With 128 pages, all of them on the lender. One slow thread, so that the order of its work shows."""
    with ServedExport(pair.a.links, PAGES, slow_threads=1) as export:
        client = export.connect()
        client.write(0, content(0, 128))
        pair.ship()
        assert {pair.a.store.where(export.pool, page) for page in range(128)} == {LENDER}
        client.close()
        wait_until(lambda: len(export.ended) == 1, "nobody is connected")
        yield export


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("tcp", [False, True])
def test_reads_of_a_client_that_has_gone_are_dropped_before_they_cost_a_page(
    export: ServedExport, pair: Pair, tcp: bool, structured: bool
) -> None:
    client = export.connect(tcp=tcp, structured=structured)
    with pair.get.up.held():
        for _ in range(8):  # more than it may have under way
            client.send(Command.READ, 0, 128 * PAGE_BYTES)
        wait_until(lambda: export.statistics()["reads"] >= 5, "as many are under way as may be")
        client.close()
        wait_until(lambda: export.statistics()["abandoned"] > 0, "it is noticed while they are under way")
    wait_until(lambda: len(export.ended) == 2, "the connection has ended")
    found = export.statistics()
    assert (found["abandoned"], found["pages_remote"], found["bytes_read"], found["errors"]) == (8, 0, 0, 0)


@pytest.mark.parametrize("tcp", [False, True])
def test_a_client_that_has_gone_does_not_wait_for_a_silent_lender(make_pair: MakePair, tcp: bool) -> None:
    """Its connection ends, the lender's answer comes later and finds nobody; its memory is used again."""
    pair = make_pair(give_up_ms=60_000, request_deadline_ms=60_000)
    with ServedExport(pair.a.links, PAGES, slow_threads=1) as export:
        stays = export.connect()
        stays.write(0, content(0, 128))
        pair.ship()
        with pair.get.up.held():
            asked = stays.send(Command.READ, 0, 4 * PAGE_BYTES)
            for n in range(3):
                client = export.connect(tcp=tcp)
                client.send(Command.READ, 8 * n * PAGE_BYTES, 4 * PAGE_BYTES)
                wait_until(lambda n=n: export.statistics()["reads"] == n + 2, "it is under way")  # type: ignore[misc]
                client.close()
                wait_until(lambda n=n: len(export.ended) == n + 1, "its connection ends")  # type: ignore[misc]
            assert (export.statistics()["abandoned"], export.statistics()["pages_remote"]) == (3, 0)
        assert stays.wait(asked).data == content(0, 4)
        assert stays.read(0, 128 * PAGE_BYTES) == content(0, 128)


def test_what_clients_that_have_gone_leave_to_the_links_is_bounded(make_pair: MakePair) -> None:
    """32 rows, 8 of them for one connection: those that come, ask and go keep at most half of them from others."""
    pair = make_pair(give_up_ms=60_000, request_deadline_ms=60_000)
    with ServedExport(pair.a.links, PAGES, slow_threads=1) as export:
        stays = export.connect()
        stays.write(0, content(0, 128))
        pair.ship()
        with pair.get.up.held():
            for n in range(3):
                client = export.connect()
                for page in range(8):
                    client.send(Command.READ, page * PAGE_BYTES, PAGE_BYTES)
                wait_until(lambda n=n: export.statistics()["reads"] == 8 * n + 8, "under way")  # type: ignore[misc]
                client.close()
                if n < 2:
                    wait_until(lambda n=n: len(export.ended) == n + 1, "it ends")  # type: ignore[misc]
            asked = stays.send(Command.READ, 0, PAGE_BYTES)
            wait_until(lambda: export.statistics()["reads"] == 25, "there is a row for it")
            assert len(export.ended) == 2, "the third waits for its answers"
        assert stays.wait(asked).data == content(0, 1)
        wait_until(lambda: len(export.ended) == 3, "and has them")
        assert export.statistics()["abandoned"] == 24


def test_what_a_client_that_has_gone_wrote_is_written(export: ServedExport, pair: Pair) -> None:
    client = export.connect()
    with pair.get.up.held():
        client.send(Command.READ, 0, 128 * PAGE_BYTES)
        client.send(Command.WRITE, 10, 100, payload=b"w" * 100)  # a part of a page that is away
        client.send(Command.WRITE_ZEROES, PAGE_BYTES, PAGE_BYTES)
        client.send(Command.WRITE, 2 * PAGE_BYTES, PAGE_BYTES, payload=b"p" * PAGE_BYTES)
        # An answer that nobody takes ends the connection: what has not been received by then is not written.
        wait_until(lambda: export.statistics()["writes"] == 3, "all of it has arrived")
        client.close()
    wait_until(lambda: len(export.ended) == 2, "the connection has ended")
    other = export.connect()
    first = bytearray(content(0, 1))
    first[10:110] = b"w" * 100
    assert other.read(0, 4 * PAGE_BYTES) == bytes(first) + bytes(PAGE_BYTES) + b"p" * PAGE_BYTES + content(3, 1)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_client_on_tcp_that_sends_no_more_gets_every_answer(
    export: ServedExport, pair: Pair, tls: tuple[TlsContext, ssl.SSLContext], encrypted: bool, structured: bool
) -> None:
    client = export.connect(tcp=True, structured=structured, tls=tls if encrypted else None)
    with pair.get.up.held():
        reads = [client.send(Command.READ, n * PAGE_BYTES, 4 * PAGE_BYTES) for n in range(4)]
        part = client.send(Command.WRITE, 100 * PAGE_BYTES + 10, 100, payload=bytes(100))
        wait_until(lambda: export.statistics()["writes"] == 2, "they are under way")
        client.end_sending()
    for n, cookie in enumerate(reads):
        assert client.wait(cookie).data == content(n, 4)
    assert client.wait(part).error == 0
    with pytest.raises(ConnectionError):
        client.answer()
    assert export.statistics()["abandoned"] == 0


@pytest.mark.parametrize("structured", [False, True])
def test_every_kind_of_answer_may_follow_the_first_bytes_that_went_ahead(
    export: ServedExport, pair: Pair, structured: bool
) -> None:
    client = export.connect(tcp=True, structured=structured)
    with pair.get.up.held():
        # More than it may have under way: it waits, and looks whether its client is there, before it goes on.
        reads = [client.send(Command.READ, 0, 128 * PAGE_BYTES) for _ in range(6)]
        others = [
            client.send(Command.FLUSH),
            client.send(Command.TRIM, 200 * PAGE_BYTES, PAGE_BYTES),
            client.send(Command.WRITE, 201 * PAGE_BYTES, PAGE_BYTES, payload=content(7, 1)),
            client.send(Command.CACHE, 0, PAGE_BYTES),
        ]
        wrong = client.send(Command.TRIM, PAGES * PAGE_BYTES, 1)
        client.socket.shutdown(socket.SHUT_WR)
        # Nothing else is answered as long as the link is held: these are the bytes that went ahead.
        assert len(client.socket.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)) == 4
    for cookie in reads:
        assert client.wait(cookie).data == content(0, 128)
    assert [client.wait(cookie).error for cookie in others] == [0, 0, 0, 0]
    assert client.wait(wrong).error == Errno.EINVAL
    with pytest.raises(ConnectionError):
        client.answer()


def test_slow_threads_turn_to_each_connection_in_turn(export: ServedExport, pair: Pair) -> None:
    many, one = export.connect(), export.connect()
    with pair.get.up.held():
        asked = [many.send(Command.WRITE, 10, 100, payload=bytes([n]) * 100) for n in range(8)]
        wait_until(lambda: export.statistics()["writes"] == 9, "its writes wait for the page")
        single = one.send(Command.WRITE, 10, 100, payload=b"x" * 100)
        wait_until(lambda: export.statistics()["writes"] == 10, "and so does one of another client")
    assert one.wait(single).error == 0
    assert [many.wait(cookie).error for cookie in asked] == [0] * 8
    assert one.read(10, 100) == bytes([7]) * 100, "the single one was not last"


def test_large_reads_of_some_leave_memory_to_smaller_ones(pair: Pair) -> None:
    with ServedExport(pair.a.links, LENGTH_MAX // PAGE_BYTES) as export:
        client = export.connect()
        client.write(0, content(0, 128))
        for each in [export.connect() for _ in range(5)]:  # nobody takes the answers
            each.send(Command.READ, 0, LENGTH_MAX)
        wait_until(lambda: export.statistics()["reads"] == 5, "all are asked for")
        assert client.read(0, 128 * PAGE_BYTES) == content(0, 128)
