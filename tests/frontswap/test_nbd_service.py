"""Exports and their connections: names, sizes, growth, removal, limits, TLS, losses. The engine is the real one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import re
import shutil
import socket
import ssl
import stat
import struct
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramster import logs
from ramster.cluster import identity
from ramster.config.knobs import Address
from ramster.config.knobs import Export as ExportKnobs
from ramster.config.knobs import Nbd as NbdKnobs
from ramster.constants import PAGE_BYTES, POOL_PAGES_MAX
from ramster.engine.links import Links, TlsContext
from ramster.engine.nbd import NbdServer
from ramster.engine.store import Store
from ramster.errors import CertificateError, PortTaken, Refused, UsageError
from ramster.frontswap.nbd import EXPORTS_MAX, HANDSHAKES_MAX, HANDSHAKES_OF_ONE_MAX, ExportService, objection
from ramster.frontswap.nbd_connections import end_all
from ramster.testing.nbd import NbdClient
from ramster.testing.nbd_handshake import Dialled
from ramster.testing.proxy import wait_until
from ramster.wire import nbd
from ramster.wire.nbd import Command, Errno, Option, OptionReply

T = TypeVar("T")
LOOPBACK = Address("127.0.0.1", 0)
WAIT_S = 30.0


class Certificate:
    """One that stays, and is said to be for these hosts."""

    def __init__(self, context: TlsContext, hosts: tuple[str, ...]) -> None:
        self._context, self._hosts = context, hosts

    def context(self) -> TlsContext:
        return self._context

    def client(self, certificate: bytes) -> str:
        described = identity.describe_der(certificate)
        if (reason := identity.objection(described, "farm", to="client")) is not None:
            raise CertificateError(reason)
        return described.subject

    def hosts(self) -> tuple[str, ...]:
        return self._hosts


class Served:
    """A service on a loop of its own, over a store of 4 MiB."""

    def __init__(
        self,
        run_dir: Path,
        knobs: NbdKnobs,
        context: TlsContext | None,
        exports: Any = (),
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        self.store = Store(4 << 20, segment_bytes=65536, lock=False, cleaner=False, full_wait_ms=0)
        self.links = Links(self.store, 1, lock=False)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        credentials = None if context is None else Certificate(context, hosts)
        self.service = ExportService(run_dir, self.store, lambda: NbdServer(self.links), knobs, credentials)
        try:
            self.call(self.service.start(exports))
        except BaseException:
            self.close()
            raise

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def create(self, name: str, pages: int = 16, **options: Any) -> dict[str, Any]:
        return self.call(self.service.create(name, pages * PAGE_BYTES, **options))

    def described(self, name: str) -> dict[str, Any]:
        return next(each for each in self.call(self.service.describe()) if each["name"] == name)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.service.addresses[0].rpartition(":")
        return host, int(port)

    def dial(self, flags: int = 3) -> Dialled:
        return Dialled(self.service.path, flags)

    def client(self, name: str) -> NbdClient:
        return self.dial().go(name)

    def close(self) -> None:
        self.call(self.service.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT_S)
        self.loop.close()
        self.links.stop()
        self.store.verify()
        self.store.close()
        names = [thread.name for thread in threading.enumerate()]
        assert "ramster-nbd" not in names, "a connection's thread outlives the service"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path / "run", NbdKnobs(), None)
    yield made
    made.close()


def page(number: int) -> bytes:
    """Of its own, and does not compress to nothing."""
    return struct.pack(">Q", number) * (PAGE_BYTES // 8)


def noise() -> bytes:
    """A page that does not compress."""
    return os.urandom(PAGE_BYTES)


# --- names and sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "A", "-a", "a/b", "..", "x" * 64, "\u00e4", "a\0"])
def test_names_that_would_need_quoting_are_refused(served: Served, name: str) -> None:
    with pytest.raises(UsageError, match="name is 1 to 63"):
        served.create(name)
    assert served.call(served.service.describe()) == []


@pytest.mark.parametrize(("asked", "given"), [(1, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (10_000, 12_288)])
def test_sizes_are_rounded_up_to_pages_and_the_answer_says_so(served: Served, asked: int, given: int) -> None:
    made = served.call(served.service.create("swap", asked))
    assert (made["size_bytes"], made["max_bytes"]) == (given, given)
    assert bool(made["notes"]) == (asked != given)
    if made["notes"]:
        assert str(asked) in made["notes"][0] and str(given) in made["notes"][0]


@pytest.mark.parametrize("size", [0, -1, POOL_PAGES_MAX * PAGE_BYTES + 1, 1 << 70])
def test_sizes_that_no_pool_can_have_are_refused_with_the_limit(served: Served, size: int) -> None:
    with pytest.raises(UsageError, match=rf"allowed are 1 to .*16TiB, {POOL_PAGES_MAX} pages"):
        served.call(served.service.create("swap", size))
    with pytest.raises(UsageError, match="max_bytes"):
        served.call(served.service.create("swap", 4096, POOL_PAGES_MAX * PAGE_BYTES + 1))
    with pytest.raises(UsageError, match="less than"):
        served.call(served.service.create("swap", 8192, 4096))


def test_the_largest_export_takes_address_space_and_no_memory(served: Served) -> None:
    made = served.create("huge", POOL_PAGES_MAX // 64)
    assert made["pages_stored"] == 0
    client = served.client("huge")
    last = made["size_bytes"] - PAGE_BYTES
    client.write(last, page(1))
    assert client.read(last, PAGE_BYTES) == page(1)
    client.close()


def test_a_name_is_taken_once(served: Served) -> None:
    served.create("swap")
    with pytest.raises(Refused, match="there is an export swap already"):
        served.create("swap")


def test_configured_exports_are_there_from_the_start(tmp_path: Path) -> None:
    exports = (
        ExportKnobs(name="one", size_bytes=4096),
        ExportKnobs(name="two", size_bytes=5000, max_size_bytes=1 << 20, read_only=True),
    )
    served = Served(tmp_path / "run", NbdKnobs(), None, exports)
    shown = [(each["name"], each["size_bytes"], each["max_bytes"], each["read_only"]) for each in
             served.call(served.service.describe())]  # fmt: skip
    assert shown == [("one", 4096, 4096, False), ("two", 8192, 1 << 20, True)]
    served.close()


def test_without_exports_the_engine_is_not_even_made(served: Served) -> None:
    assert served.service.server is None
    with served.dial() as client:
        assert client.option(Option.LIST) == [(OptionReply.ACK, b"")]
        [(reply, text)] = client.option(Option.GO, nbd.pack_info("swap"))
        assert reply == OptionReply.ERR_UNKNOWN and b"no export" in text


# --- use ----------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back_from_its_own_export_alone(served: Served) -> None:
    for name in ("one", "two"):
        served.create(name)
    one, two = served.client("one"), served.client("two")
    one.write(0, page(1))
    two.write(PAGE_BYTES, page(2))
    assert one.read(0, 2 * PAGE_BYTES) == page(1) + bytes(PAGE_BYTES)
    assert two.read(0, 2 * PAGE_BYTES) == bytes(PAGE_BYTES) + page(2)
    for name in ("one", "two"):
        shown = served.described(name)
        assert (shown["pages_stored"], shown["connections"], shown["writes"]) == (1, 1, 1)
    one.close()
    two.close()
    wait_until(lambda: served.described("one")["connections"] == 0, "it has left")


def test_there_is_no_default_export_even_with_a_single_one(served: Served) -> None:
    served.create("swap")
    with served.dial() as client:
        [(reply, text)] = client.option(Option.GO, nbd.pack_info(""))
        assert reply == OptionReply.ERR_UNKNOWN and b"default" in text


def test_list_shows_names_and_sizes(served: Served) -> None:
    served.create("one", 256)
    served.create("two", 1, read_only=True)
    with served.dial() as client:
        *shown, _ = client.option(Option.LIST)
    assert [body[4:] for _, body in shown] == [b"one1MiB", b"two4KiB, read-only"]


def test_a_read_only_export_refuses_writes(served: Served) -> None:
    served.create("old", read_only=True)
    dialled = served.dial()
    client = dialled.go("old")
    assert dialled.flags & nbd.TransmissionFlag.READ_ONLY
    assert client.ask(Command.WRITE, 0, PAGE_BYTES, payload=page(1)).error == Errno.EPERM
    assert client.read(0, PAGE_BYTES) == bytes(PAGE_BYTES)
    client.close()


def test_a_client_of_the_old_way_in_is_served(served: Served) -> None:
    served.create("swap")
    dialled = served.dial(flags=0)
    dialled.socket.sendall(nbd.pack_option(Option.EXPORT_NAME, b"swap"))
    size, _ = struct.unpack(">QH", dialled.receive(10))
    assert size == 16 * PAGE_BYTES and dialled.receive(124) == bytes(124)
    client = NbdClient(dialled.socket)
    client.write(100, b"some")
    assert client.read(98, 8) == b"\0\0some\0\0"
    client.close()


# --- growth -------------------------------------------------------------------------------------------------------


def test_an_export_grows_and_shows_it_to_clients_that_come_next(served: Served) -> None:
    served.create("swap", 2, max_bytes=8 * PAGE_BYTES)
    before = served.client("swap")
    before.write(0, page(1))
    grown = served.call(served.service.change("swap", 5 * PAGE_BYTES - 1))
    assert grown["size_bytes"] == 5 * PAGE_BYTES
    assert any("rounded" in note for note in grown["notes"]) and any("connect again" in note for note in grown["notes"])
    dialled = served.dial()
    after = dialled.go("swap")
    assert dialled.size == 5 * PAGE_BYTES
    after.write(4 * PAGE_BYTES, page(4))
    assert after.read(0, 5 * PAGE_BYTES) == page(1) + bytes(3 * PAGE_BYTES) + page(4)
    assert after.ask(Command.READ, 5 * PAGE_BYTES, 1).error == Errno.EINVAL
    before.close()
    after.close()


def test_an_export_neither_shrinks_nor_outgrows_its_limit(served: Served) -> None:
    served.create("swap", 2, max_bytes=4 * PAGE_BYTES)
    with pytest.raises(UsageError, match="cannot shrink"):
        served.call(served.service.change("swap", PAGE_BYTES))
    with pytest.raises(UsageError, match="may grow to 16 KiB, not to 20 KiB"):
        served.call(served.service.change("swap", 5 * PAGE_BYTES))
    with pytest.raises(UsageError, match=r"there is no export 'swab'; there are: swap"):
        served.call(served.service.change("swab", 5 * PAGE_BYTES))
    assert served.described("swap")["size_bytes"] == 2 * PAGE_BYTES


# --- read-only and back -------------------------------------------------------------------------------------------


def turn(served: Served, name: str, read_only: bool) -> dict[str, Any]:
    wait_until(lambda: served.described(name)["connections"] == 0, "every client has left")
    return served.call(served.service.change(name, read_only=read_only))


def test_what_was_written_stays_when_it_turns_read_only_and_back(served: Served) -> None:
    for name in ("first", "image", "last"):
        served.create(name)
    served.call(served.service.remove("first"))  # a number that is free now
    client = served.client("image")
    client.write(0, page(1) + page(2))
    client.close()
    assert turn(served, "image", True)["read_only"] is True
    dialled = served.dial()
    client = dialled.go("image")
    assert dialled.flags & nbd.TransmissionFlag.READ_ONLY
    for command, payload in ((Command.WRITE, page(3)), (Command.TRIM, b""), (Command.WRITE_ZEROES, b"")):
        assert client.ask(command, 0, PAGE_BYTES, payload=payload).error == Errno.EPERM
    assert client.read(0, 3 * PAGE_BYTES) == page(1) + page(2) + bytes(PAGE_BYTES)
    client.close()
    turn(served, "image", False)
    dialled = served.dial()
    client = dialled.go("image")
    assert not dialled.flags & nbd.TransmissionFlag.READ_ONLY
    client.write(PAGE_BYTES, page(4))
    assert client.read(0, 2 * PAGE_BYTES) == page(1) + page(4)
    client.close()
    shown = served.described("image")
    assert (shown["writes"], shown["reads"], shown["refused"], shown["pages_stored"]) == (2, 2, 3, 2)
    assert [each["name"] for each in served.call(served.service.describe())] == ["image", "last"]
    served.call(served.service.remove("image", force=True))
    assert served.store.statistics().pages_stored == 0


def test_it_does_not_turn_under_its_clients(served: Served) -> None:
    served.create("image", 2, max_bytes=4 * PAGE_BYTES)
    client = served.client("image")
    with pytest.raises(Refused, match=rf"in use by 1 connection \(process {os.getpid()} .*cannot turn read-only"):
        served.call(served.service.change("image", 4 * PAGE_BYTES, True))
    shown = served.described("image")
    assert (shown["size_bytes"], shown["read_only"]) == (2 * PAGE_BYTES, False)
    client.write(0, page(1))
    assert served.call(served.service.change("image", read_only=False))["read_only"] is False  # as it is
    client.close()
    found = [turn(served, "image", True), served.call(served.service.change("image", 4 * PAGE_BYTES))]
    assert [(each["size_bytes"], each["read_only"]) for each in found] == [
        (2 * PAGE_BYTES, True),
        (4 * PAGE_BYTES, True),
    ]


def test_a_page_whose_write_was_refused_is_what_it_was_when_it_has_turned(served: Served) -> None:
    pages = 4096
    served.create("image", pages)
    client = served.client("image")
    first = noise()
    client.write(0, first)
    full = next(
        n for n in range(1, pages) if client.ask(Command.WRITE, n * PAGE_BYTES, PAGE_BYTES, payload=noise()).error
    )
    assert client.ask(Command.WRITE, 0, PAGE_BYTES, payload=noise()).error == Errno.ENOSPC
    client.close()
    for read_only in (True, False):
        turn(served, "image", read_only)
        client = served.client("image")
        assert client.read(0, PAGE_BYTES) == first
        assert client.read(full * PAGE_BYTES, PAGE_BYTES) == bytes(PAGE_BYTES)
        client.close()


def test_it_turns_where_there_is_no_room_for_another_export(served: Served) -> None:
    for number in range(EXPORTS_MAX):
        served.create(f"e{number}", 1)
    with pytest.raises(Refused, match=f"{EXPORTS_MAX} exports already, its limit"):
        served.create("more", 1)
    assert [turn(served, "e7", on)["read_only"] for on in (True, False)] == [True, False]


# --- removal ------------------------------------------------------------------------------------------------------


def test_removal_frees_every_page_and_the_name_starts_anew_empty(served: Served) -> None:
    served.create("swap")
    with served.dial() as dialled:
        client = dialled.go("swap")
        client.write(0, page(1) + page(2))
        assert served.store.statistics().pages_stored == 2
        client.send(Command.DISC)
        assert dialled.closed() == b""
    wait_until(lambda: served.described("swap")["connections"] == 0, "it has left")
    served.call(served.service.remove("swap"))
    assert served.call(served.service.describe()) == []
    found = served.store.statistics()
    assert (found.pages_stored, found.live_bytes) == (0, 0)
    served.create("swap")
    client = served.client("swap")
    assert client.read(0, 2 * PAGE_BYTES) == bytes(2 * PAGE_BYTES)
    client.close()


def test_removal_is_refused_while_the_export_is_in_use(served: Served) -> None:
    served.create("swap")
    client = served.client("swap")
    client.write(0, page(1))
    with pytest.raises(Refused, match=rf"in use by 1 connection \(process {os.getpid()} of user {os.getuid()}\)"):
        served.call(served.service.remove("swap"))
    assert client.read(0, PAGE_BYTES) == page(1)
    client.close()


def test_while_connections_end_other_exports_come_and_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    released = asyncio.Event()

    async def end_late(connections: list[Any]) -> int:
        if connections:
            await released.wait()
        return await end_all(connections)

    monkeypatch.setattr("ramster.frontswap.nbd.end_all", end_late)
    served.create("slow")
    client = served.client("slow")
    removal = asyncio.run_coroutine_threadsafe(served.service.remove("slow", force=True), served.loop)
    wait_until(lambda: served.service.count() == 0, "it is being removed")
    served.create("other")
    served.call(served.service.change("other", 16 * PAGE_BYTES))
    served.call(served.service.remove("other"))
    for refused in (
        served.service.create("slow", PAGE_BYTES),
        served.service.change("slow", 16 * PAGE_BYTES),
        served.service.remove("slow", force=True),
    ):
        with pytest.raises(Refused, match="slow is being removed"):
            served.call(refused)
    served.loop.call_soon_threadsafe(released.set)
    removal.result(WAIT_S)
    served.create("slow")
    client.close()


def test_forced_removal_ends_the_connections_first(served: Served) -> None:
    served.create("swap")
    served.create("other")
    clients = [served.client("swap") for _ in range(3)]
    bystander = served.client("other")
    clients[0].write(0, page(1))
    served.call(served.service.remove("swap", force=True))
    for client in clients:
        with pytest.raises((ConnectionError, BrokenPipeError)):
            client.read(0, PAGE_BYTES)
        client.close()
    bystander.write(0, page(2))
    assert bystander.read(0, PAGE_BYTES) == page(2)
    assert served.store.statistics().pages_stored == 1
    bystander.close()


def test_removing_what_is_not_there(served: Served) -> None:
    with pytest.raises(UsageError, match="there are: none"):
        served.call(served.service.remove("swap"))


# --- limits -------------------------------------------------------------------------------------------------------


def test_one_connection_too_many_is_told_why_and_may_come_back(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(connections_max=2), None)
    served.create("swap")
    clients = [served.client("swap") for _ in range(2)]
    with served.dial() as late:
        [(reply, text)] = late.option(Option.GO, nbd.pack_info("swap"))
        assert reply == OptionReply.ERR_POLICY and b"2 connections already" in text
        clients.pop().close()
        wait_until(lambda: served.described("swap")["connections"] == 1, "one has left")
        clients.append(late.go("swap"))
        clients[-1].write(0, page(1))
    for client in clients:
        client.close()
    served.close()
    assert served.service.counters.refused == 1


def test_clients_that_never_choose_are_limited_in_number_and_time(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(handshake_timeout_ms=1500), None)
    served.create("swap")
    idle = [served.dial() for _ in range(HANDSHAKES_OF_ONE_MAX)]
    late = served.dial()
    idle[0].socket.settimeout(1.0)  # less than they have
    assert idle[0].closed() == b"", "the oldest one makes room"
    wait_until(lambda: served.service.counters.refused == 1, "it is counted")
    for client in [*idle, late]:
        assert client.closed() == b""
        client.close()
    wait_until(lambda: served.service.counters.unfinished == HANDSHAKES_OF_ONE_MAX, "all are counted")
    assert served.service.counters.refused == 1
    served.client("swap").close()
    served.close()


def test_idle_connections_by_tcp_shut_neither_the_unix_socket_nor_tcp(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(listen=(LOOPBACK,)), None)
    served.create("swap")
    idle = [Dialled(served.address) for _ in range(2 * HANDSHAKES_MAX)]
    for n in range(10):
        idle.append(Dialled(served.address))
        served.client("swap").close()
        with Dialled(served.address) as client:
            client.go("swap").write(0, page(n))
    for each in idle:
        each.close()
    served.close()
    assert served.service.counters.connections == 20


def test_an_export_in_demand_leaves_connections_to_others_and_the_last_to_swap(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(listen=(LOOPBACK,), connections_max=8), None)
    for name in ("vm", "db"):
        served.create(name)
    served.create("swap", swap=True)
    held = [Dialled(served.address).go("vm") for _ in range(4)]
    for name, why in (("vm", b"the export has 4"), ("db", b"127.0.0.1 has 4")):
        with Dialled(served.address) as client:
            [(reply, text)] = client.option(Option.GO, nbd.pack_info(name))
            assert reply == OptionReply.ERR_POLICY and why in text
    held += [served.client("db") for _ in range(3)]
    with served.dial() as client:
        [(reply, text)] = client.option(Option.GO, nbd.pack_info("db"))
        assert reply == OptionReply.ERR_POLICY and b"swaps on" in text
    held.append(served.client("swap"))
    for each in held:
        each.close()
    served.close()
    assert served.service.counters.refused == 3


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\0\0\0\3NBDMAGIC" + bytes(8)],
    ids=["nothing", "http", "noise", "another magic"],
)
def test_whoever_speaks_something_else_is_closed_and_counted(served: Served, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(served.service.path))
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # what was sent is not even read
            while part := sock.recv(4096):
                answer += part
    assert len(answer) == 18
    counters = served.service.counters
    wait_until(lambda: counters.broken + counters.unfinished == 1, "counted")


FEW = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
SECRET = b"another export's secret" * 179


@FEW
@given(data=st.binary(max_size=300), option=st.integers(0, 12), name=st.sampled_from(["mine", "none", ""]))
def test_noise_gets_no_byte_of_another_export(served: Served, data: bytes, option: int, name: str) -> None:
    if not served.call(served.service.describe()):
        served.create("mine")
        served.create("theirs")
        client = served.client("theirs")
        client.write(0, SECRET[:PAGE_BYTES])
        client.close()
    with served.dial() as dialled:
        dialled.socket.sendall(nbd.pack_option(option, nbd.pack_info(name)) + data)
        dialled.socket.shutdown(socket.SHUT_WR)
        assert b"secret" not in dialled.closed()


# --- sockets ------------------------------------------------------------------------------------------------------


def test_the_socket_is_for_owner_and_group_and_goes_with_the_service(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(), None)
    assert stat.S_IMODE(served.service.path.stat().st_mode) == 0o660
    served.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_socket_left_over_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "run" / "nbd.sock"))
    served = Served(tmp_path / "run", NbdKnobs(), None)
    served.create("swap")
    served.client("swap").close()
    served.close()


def test_the_end_of_the_service_ends_connections_of_every_kind(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(), None)
    served.create("swap")
    client, choosing = served.client("swap"), served.dial()
    client.write(0, page(1))
    served.close()
    assert choosing.closed() == b""
    with pytest.raises((ConnectionError, BrokenPipeError)):
        client.read(0, PAGE_BYTES)
    client.close()
    choosing.close()


def test_a_loopback_address_is_served_without_tls(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(listen=(LOOPBACK, Address("127.0.0.1", 0))), None)
    made = served.create("swap")
    host, port = served.address
    assert made["uris"][:2] == [f"nbd+unix:///swap?socket={served.service.path}", f"nbd://{host}:{port}/swap"]
    assert len(made["uris"]) == 3
    client = Dialled(served.address).go("swap")
    client.write(0, page(1))
    assert client.read(0, PAGE_BYTES) == page(1)
    client.close()
    served.close()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} .* \[nbd\] listen"):
            Served(tmp_path / "run", NbdKnobs(listen=(Address("127.0.0.1", port),)), None)
    assert list((tmp_path / "run").iterdir()) == []


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> list[identity.NodeFiles]:
    return identity.create_cluster(tmp_path_factory.mktemp("farm"), "farm", ["localhost", "client"])


def client_context(files: identity.NodeFiles, *, certificate: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca)
    if certificate:
        context.load_cert_chain(files.cert, files.key)
    return context


@pytest.fixture(params=["require", "every address"])
def encrypted(request: pytest.FixtureRequest, tmp_path: Path, farm: list[identity.NodeFiles]) -> Iterator[Served]:
    """TLS is required: on loopback by the knob, elsewhere in any case."""
    knobs = NbdKnobs(listen=(LOOPBACK,), tls="require")
    if request.param != "require":
        knobs = NbdKnobs(listen=(Address("0.0.0.0", 0),))
    server = farm[0]
    made = Served(tmp_path / "run", knobs, TlsContext(str(server.ca), str(server.cert), str(server.key)))
    made.create("swap")
    yield made
    made.close()


def tcp(served: Served) -> Dialled:
    return Dialled(("127.0.0.1", served.address[1]))


def test_without_tls_nothing_is_told(encrypted: Served) -> None:
    with tcp(encrypted) as client:
        for option in (Option.LIST, Option.GO, Option.INFO, Option.STRUCTURED_REPLY):
            assert [kind for kind, _ in client.option(option, nbd.pack_info("swap"))] == [OptionReply.ERR_TLS_REQD]
    with tcp(encrypted) as client:
        client.socket.sendall(nbd.pack_option(Option.EXPORT_NAME, b"swap"))
        assert client.closed() == b""
    assert encrypted.described("swap")["uris"][1].startswith("nbds://")


def test_with_a_certificate_of_the_cluster_an_export_is_served(
    encrypted: Served, farm: list[identity.NodeFiles]
) -> None:
    with tcp(encrypted) as dialled:
        dialled.start_tls(client_context(farm[1]), "localhost")
        client = dialled.go("swap")
        data = os.urandom(16 * PAGE_BYTES)
        client.write(0, data)
        assert client.read(0, len(data)) == data
        assert client.read(100, 5000) == data[100:5100]


@pytest.mark.parametrize(
    ("tls_min", "suites", "served"),
    [
        ("1.3", "ECDHE", False),
        ("1.2", "ECDHE+AESGCM", True),
        ("1.2", "ECDHE+CHACHA20", True),
        ("1.2", "ECDHE:!AESGCM:!CHACHA20", False),  # CBC
        ("1.2", "AESGCM:!ECDHE:!DHE", False),  # no forward secrecy
    ],
)
def test_tls_1_2_is_served_where_the_knob_says_so_with_good_suites_alone(
    tmp_path: Path, farm: list[identity.NodeFiles], tls_min: str, suites: str, served: bool
) -> None:
    server = farm[0]
    knobs = NbdKnobs(listen=(LOOPBACK,), tls="require", tls_min=tls_min)
    made = Served(tmp_path / "run", knobs, TlsContext(str(server.ca), str(server.cert), str(server.key)))
    made.create("swap")
    old = client_context(farm[1])
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers(suites)
    with Dialled(made.address) as client:
        if served:
            client.start_tls(old, "localhost")
            assert isinstance(client.socket, ssl.SSLSocket) and client.socket.version() == "TLSv1.2"
            nbd_client = client.go("swap")
            nbd_client.write(0, page(1))
            assert nbd_client.read(0, PAGE_BYTES) == page(1)
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                client.start_tls(old, "localhost")
    with Dialled(made.address) as client:
        client.start_tls(client_context(farm[1]), "localhost")
        assert isinstance(client.socket, ssl.SSLSocket) and client.socket.version() == "TLSv1.3"
        client.go("swap").write(0, page(1))
    made.close()


def test_without_a_certificate_nobody_gets_further_than_the_tls_handshake(
    encrypted: Served, farm: list[identity.NodeFiles], tmp_path: Path
) -> None:
    strangers = identity.create_cluster(tmp_path / "others", "farm", ["client"])
    foreign = client_context(farm[1], certificate=False)
    foreign.load_cert_chain(strangers[0].cert, strangers[0].key)
    for context in (client_context(farm[1], certificate=False), foreign):
        with tcp(encrypted) as client, pytest.raises((ssl.SSLError, ConnectionError)):
            client.start_tls(context, "localhost")
            client.option(Option.LIST)  # TLS 1.3: the client learns of it with its first read
    assert encrypted.described("swap")["reads"] == 0


def test_what_is_slipped_in_before_tls_is_not_taken_for_what_comes_after(
    encrypted: Served, farm: list[identity.NodeFiles]
) -> None:
    with tcp(encrypted) as client:
        client.socket.sendall(nbd.pack_option(Option.STARTTLS) + nbd.pack_option(Option.LIST))
        answer = client.closed()
        assert [kind for _, kind, _ in nbd.unpack_replies(answer[:20])] == [OptionReply.ACK]
        assert b"swap" not in answer


def test_on_the_unix_socket_tls_is_offered_and_not_required(encrypted: Served, farm: list[identity.NodeFiles]) -> None:
    encrypted.client("swap").close()
    with encrypted.dial() as dialled:
        dialled.start_tls(client_context(farm[1]), "localhost")
        client = dialled.go("swap")
        client.write(0, page(3))
        assert client.read(0, PAGE_BYTES) == page(3)


@pytest.mark.parametrize(
    ("hosts", "shown", "warned"),
    [
        (("alpha", "192.0.2.1"), "192.0.2.1", False),
        (("alpha", "2001:db8::1", "192.0.2.1"), "192.0.2.1", False),
        (("alpha", "storage.example.org", "192.0.2.1"), "storage.example.org", False),
        (("alpha", "192.0.2.1", socket.gethostname()), socket.gethostname(), False),
        (("alpha", "127.0.0.1"), socket.gethostname(), True),
    ],
)
def test_a_socket_on_every_address_is_shown_as_what_its_certificate_is_for(
    hosts: tuple[str, ...],
    shown: str,
    warned: bool,
    tmp_path: Path,
    farm: list[identity.NodeFiles],
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = TlsContext(*map(str, (farm[0].ca, farm[0].cert, farm[0].key)))
    served = Served(tmp_path / "run", NbdKnobs(listen=(Address("0.0.0.0", 0),)), context, hosts=hosts)
    assert served.create("swap")["uris"][1] == f"nbds://{shown}:{served.address[1]}/swap"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    wrong = f"not for {socket.gethostname()}: clients refuse nbds://{socket.gethostname()}:{served.address[1]}"
    assert [wrong in text for text in said] == [True] * warned
    served.close()


def test_without_certificates_only_loopback_is_served(tmp_path: Path) -> None:
    for knobs in (NbdKnobs(listen=(Address("0.0.0.0", 0),)), NbdKnobs(listen=(LOOPBACK,), tls="require")):
        with pytest.raises(UsageError, match=r"TLS only, which needs a \[cluster\]"):
            Served(tmp_path / "run", knobs, None)
    served = Served(tmp_path / "run", NbdKnobs(), None)
    with served.dial() as client:
        assert [kind for kind, _ in client.option(Option.STARTTLS)] == [OptionReply.ERR_POLICY]
    served.close()


# --- who may use an export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "name", "local", "refused"),
    [
        ((), None, False, None),
        ((), "web", False, None),
        (("web",), "web", False, None),
        (("web",), None, True, None),
        (("web",), "backup", True, None),
        (("web", "backup"), "backup", False, None),
        (("web",), "backup", False, OptionReply.ERR_POLICY),
        (("web",), "web2", False, OptionReply.ERR_POLICY),
        (("web",), None, False, OptionReply.ERR_TLS_REQD),
    ],
)
def test_an_allow_list(allow: tuple[str, ...], name: str | None, local: bool, refused: OptionReply | None) -> None:
    found = objection(allow, name, local=local)
    assert (None if found is None else found.reply) == refused


@pytest.fixture(scope="module")
def clients(farm: list[identity.NodeFiles]) -> dict[str, identity.NodeFiles]:
    return {name: identity.add_client(farm[0].ca.parent, name) for name in ("web", "backup")}


def listed(client: Dialled) -> set[bytes]:
    return {data[4:8] for kind, data in client.option(Option.LIST) if kind == OptionReply.SERVER}


def test_each_client_finds_and_uses_what_is_for_it(
    encrypted: Served, farm: list[identity.NodeFiles], clients: dict[str, identity.NodeFiles]
) -> None:
    encrypted.create("webs", allow=["web"])
    assert encrypted.described("webs")["allow"] == ["web"] and encrypted.described("swap")["allow"] == []
    with tcp(encrypted) as dialled:
        dialled.start_tls(client_context(clients["web"]), "localhost")
        assert listed(dialled) == {b"swap", b"webs"}
        client = dialled.go("webs")
        client.write(0, page(1))
        assert client.read(0, PAGE_BYTES) == page(1)
    for files in (clients["backup"], farm[1]):  # a node's name is not on the list either
        with tcp(encrypted) as dialled:
            dialled.start_tls(client_context(files), "localhost")
            assert listed(dialled) == {b"swap"}
            for option in (Option.INFO, Option.GO):
                kinds = [kind for kind, _ in dialled.option(option, nbd.pack_info("webs"))]
                assert kinds == [OptionReply.ERR_POLICY]
            dialled.go("swap")
    with encrypted.dial() as dialled:
        assert listed(dialled) == {b"swap", b"webs"}
        dialled.go("webs")


def test_in_the_clear_nobody_is_anybody(tmp_path: Path, farm: list[identity.NodeFiles]) -> None:
    """On a loopback address, which every user of the machine reaches."""
    context = TlsContext(*map(str, (farm[0].ca, farm[0].cert, farm[0].key)))
    served = Served(tmp_path / "run", NbdKnobs(listen=(LOOPBACK,)), context)
    host, port = served.address
    assert served.create("swap")["uris"][1] == f"nbd://{host}:{port}/swap"
    assert served.create("webs", allow=["web"])["uris"][1] == f"nbds://{host}:{port}/webs"
    assert served.call(served.service.change("webs", allow=[]))["uris"][1] == f"nbd://{host}:{port}/webs"
    assert served.call(served.service.change("webs", allow=["web"]))["uris"][1] == f"nbds://{host}:{port}/webs"
    assert served.described("webs")["uris"][1] == f"nbds://{host}:{port}/webs"
    served.call(served.service.remove("swap"))
    with tcp(served) as client:
        assert listed(client) == set()
        assert [kind for kind, _ in client.option(Option.GO, nbd.pack_info("webs"))] == [OptionReply.ERR_TLS_REQD]
    with tcp(served) as client:
        client.socket.sendall(nbd.pack_option(Option.EXPORT_NAME, b"webs"))
        assert client.closed() == b""
    served.close()


def test_a_certificate_for_another_cluster_of_the_same_authority_is_refused(
    encrypted: Served, farm: list[identity.NodeFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (identity.CA_CERTIFICATE, identity.CA_KEY):
        shutil.copy(farm[0].ca.parent / name, tmp_path / name)
    made = identity._name
    monkeypatch.setattr(identity, "_name", lambda common, _: made(common, "other"))
    other = identity.add_client(tmp_path, "web")
    before = encrypted.service.counters.refused
    with tcp(encrypted) as client:
        client.start_tls(client_context(other), "localhost")
        client.socket.sendall(nbd.pack_option(Option.LIST))
        assert client.closed() == b""
    wait_until(lambda: encrypted.service.counters.refused == before + 1, "counted")


@pytest.mark.parametrize(
    ("allow", "says"),
    [(["We b"], "'We b' is no name"), (["web"] * 65, "65 names, at most 64"), ([""], "'' is no name")],
)
def test_an_allow_list_that_makes_no_sense(served: Served, allow: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        served.create("webs", allow=allow)
    assert served.call(served.service.describe()) == []


def test_a_new_allow_list_counts_at_once_and_ends_who_is_not_on_it(
    encrypted: Served, clients: dict[str, identity.NodeFiles]
) -> None:
    encrypted.create("webs")

    def connect(name: str) -> NbdClient:
        dialled = tcp(encrypted)
        dialled.start_tls(client_context(clients[name]), "localhost")
        return dialled.go("webs")

    web, backup, local = connect("web"), connect("backup"), encrypted.client("webs")
    with contextlib.closing(web), contextlib.closing(backup), contextlib.closing(local):
        changed = encrypted.call(encrypted.service.change("webs", allow=["web"]))
        assert changed["allow"] == ["web"] and changed["connections"] == 2
        (note,) = changed["notes"]
        assert note.startswith("closed 1 connection of clients that may not use it any more: backup (")
        with pytest.raises(ConnectionError):
            backup.read(0, PAGE_BYTES)
        for each in (web, local):
            each.write(0, page(1))
            assert each.read(0, PAGE_BYTES) == page(1)
        with tcp(encrypted) as dialled:
            dialled.start_tls(client_context(clients["backup"]), "localhost")
            assert listed(dialled) == {b"swap"}
            assert [kind for kind, _ in dialled.option(Option.GO, nbd.pack_info("webs"))] == [OptionReply.ERR_POLICY]
        unchanged = encrypted.call(encrypted.service.change("webs", read_only=None))
        assert unchanged["allow"] == ["web"] and unchanged["notes"] == []
        opened = encrypted.call(encrypted.service.change("webs", allow=[]))
        assert opened["allow"] == [] and opened["notes"] == [] and opened["connections"] == 2
    with contextlib.closing(connect("backup")) as backup:
        assert backup.read(0, PAGE_BYTES) == page(1)


def test_a_new_allow_list_that_makes_no_sense_changes_nothing(encrypted: Served) -> None:
    encrypted.create("webs", allow=["web"])
    with pytest.raises(UsageError, match="is no name"):
        encrypted.call(encrypted.service.change("webs", allow=["backup", "We b"]))
    with pytest.raises(UsageError, match="cannot shrink"):
        encrypted.call(encrypted.service.change("webs", PAGE_BYTES, allow=["backup"]))
    assert encrypted.described("webs")["allow"] == ["web"]


def test_an_allow_list_needs_certificates(tmp_path: Path) -> None:
    served = Served(tmp_path / "run", NbdKnobs(), None)
    with pytest.raises(UsageError, match=r"only a node with a \[cluster\] section can check"):
        served.create("webs", allow=["web"])
    served.close()


# --- losses -------------------------------------------------------------------------------------------------------


def test_a_lost_page_is_an_error_counted_and_named_in_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.create("other")
    served.create("swap")
    client = served.client("swap")
    for number in (3, 5):
        client.write(number * PAGE_BYTES, os.urandom(PAGE_BYTES))
    pool = served.service._exports["swap"].pool
    served.store.corrupt(pool, 5, 9)
    with caplog.at_level(logging.ERROR, "ramster.nbd"):
        assert client.ask(Command.READ, 5 * PAGE_BYTES, PAGE_BYTES).error == Errno.EIO
        wait_until(lambda: served.service.counters.pages_lost == 1, "the service has heard of it")
    assert [record.getMessage() for record in caplog.records] == [
        "export swap: page 5 (byte 20480) is damaged, its bytes fail their check; reads of it fail with EIO"
    ]
    assert served.described("swap")["pages_lost"] == 1 and served.described("other")["pages_lost"] == 0
    client.write(5 * PAGE_BYTES, page(1))
    assert client.read(5 * PAGE_BYTES, PAGE_BYTES) == page(1)
    client.close()


def test_thousands_of_lost_pages_do_not_fill_the_log(served: Served) -> None:
    pages = 200
    served.create("swap", pages)
    client = served.client("swap")
    pool = served.service._exports["swap"].pool
    for number in range(pages):
        client.write(number * PAGE_BYTES, os.urandom(PAGE_BYTES))
        served.store.corrupt(pool, number, 9)
    stream = io.StringIO()
    handler = logs.Handler(stream)
    logging.getLogger("ramster.nbd").addHandler(handler)
    try:
        for number in range(pages):
            assert client.ask(Command.READ, number * PAGE_BYTES, PAGE_BYTES).error == Errno.EIO
        wait_until(lambda: served.service.counters.pages_lost == pages, "all are counted")
    finally:
        logging.getLogger("ramster.nbd").removeHandler(handler)
        handler.close()
    lines = stream.getvalue().splitlines()
    named = sum(" ERROR ramster.nbd: export swap: page " in line for line in lines)
    held_back = sum(int(found[1]) for line in lines if (found := re.search(r"(\d+) more like this", line)))
    assert named + held_back == pages and named >= logs.LINES and len(lines) < 60
    client.close()


# --- all at once --------------------------------------------------------------------------------------------------


def test_exports_come_and_go_while_clients_come_and_go_and_somebody_looks(served: Served) -> None:
    served.create("stays", 64)
    stop = threading.Event()
    wrong: list[str] = []

    def use(number: int) -> None:
        while not stop.is_set():
            client = served.client("stays")
            try:
                for at in range(number, 64, 4):
                    client.write(at * PAGE_BYTES, page(at))
                    if client.read(at * PAGE_BYTES, PAGE_BYTES) != page(at):
                        wrong.append(f"page {at}")
            finally:
                client.close()

    def look() -> None:
        while not stop.is_set():
            seen = served.call(served.service.describe())
            wrong.extend(f"{each['name']} holds too much" for each in seen if each["pages_stored"] > 64)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    try:
        for turn in range(40):
            served.create("comes", 8)
            client = served.client("comes")
            try:
                if client.read(0, 8 * PAGE_BYTES) != bytes(8 * PAGE_BYTES):
                    wrong.append("what was removed is readable")
                client.write(0, page(turn) * 8)
                served.call(served.service.remove("comes", force=True))
            finally:
                client.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert wrong == []
    assert [each["name"] for each in served.call(served.service.describe())] == ["stays"]
