"""The node's side of the region socket: what it refuses, what it survives, what it gives back."""

import array
import asyncio
import contextlib
import gc
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from tests.frontswap.conftest import DEADLINE, Engines, Node, finish, run_script, start_script

from ramster.config.knobs import Region as Settings
from ramster.constants import REGION_MESSAGE_BYTES_MAX
from ramster.errors import RegionFull
from ramster.frontswap import messages, region_connection, region_service
from ramster.frontswap.region_connection import CHECK_PAGES, Connection
from ramster.frontswap.region_service import (
    LOOKERS,
    PROCESS_WORKERS,
    WAITING_MAX,
    WAITING_OF_ONE_MAX,
    WORKERS,
    RegionService,
)
from ramster.frontswap.shares import REGIONS_OF_A_PROCESS_MAX
from ramster.testing.proxy import wait_until

StartNode = Callable[..., Node]


class Talker:
    """Speaks the protocol by hand."""

    def __init__(self, node: Node | Engines) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(node.socket))  # waits its turn; with a timeout it would not
        self.socket.settimeout(DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        socket.send_fds(self.socket, [json.dumps(message).encode()], fds)
        data, received, _, _ = socket.recv_fds(self.socket, REGION_MESSAGE_BYTES_MAX, 4)
        for fd in received:
            os.close(fd)
        answer: dict[str, Any] = json.loads(data)
        return answer

    def create(self, **more: Any) -> dict[str, Any]:
        return self.say({"op": "create", "version": messages.VERSION, "pages": 8, **more})

    def ended(self) -> bool:
        """The node closed the connection."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True


def test_garbage_ends_that_connection_only(start_node: StartNode) -> None:
    node = start_node()
    with Talker(node) as good:
        assert good.create(name="good")["ok"]
        for garbage in (
            b"\0",
            b"\xff\xfe\xfd",
            b"{}",
            b"[]",
            b'{"op":"create"}',
            b'{"op":"create","version":2,"pages":0}',
            b'{"op":"create","version":2,"pages":-1}',
            b'{"op":"create","version":2,"pages":99999999999}',
            b'{"op":"create","version":2,"pages":1,"name":"' + b"n" * 49 + b'"}',
            b'{"op":"dance"}',
            b'{"op":"pin","first":"0","count":1}',
            b'{"op":"pin","first":0,"count":0}',
            b'{"op":"undo","group":' + b"9" * 4000 + b"}",
            b"[" * 5000,
            b'{"op":"create","version":1,"x":' + b"[" * 5000,
            b"x" * (REGION_MESSAGE_BYTES_MAX + 1),
        ):
            with Talker(node) as bad:
                bad.socket.send(garbage)
                assert bad.ended(), garbage[:60]
        # Descriptors where none belong, too many, and none where one belongs.
        for message, count in (
            (b'{"op":"close"}', 1),
            (b'{"op":"close"}', 20),
            (b'{"op":"attach","base":4096,"features":0}', 0),
        ):
            with Talker(node) as bad:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1] * count))] if count else []
                bad.socket.sendmsg([message], rights)
                assert bad.ended()
        assert good.say({"op": "statistics"})["error"] == "usage"
        assert good.say({"op": "close", "id": 7}) == {"ok": True, "id": 7}
    node.wait_for("gone good")
    assert "garbage=19" in node.stop()


def test_refusals(start_node: StartNode) -> None:
    node = start_node("--resident-max", str(10 * 4096))
    with Talker(node) as first, Talker(node) as second, Talker(node) as third:
        answer = first.create(version=99)
        assert answer["error"] == "protocol" and "version 99" in answer["message"]
        assert first.say({"op": "pin", "first": 0, "count": 1})["error"] == "usage"
        assert first.create(resident_pages=6)["resident_pages"] == 6
        assert first.create()["error"] == "usage"
        answer = second.create(resident_pages=5)
        assert (
            answer["error"] == "refused"
            and "resident_max" in answer["message"]
            and "16 KiB is free" in answer["message"]
        )
        assert second.create(resident_pages=4)["ok"]
        # What is no userfaultfd is not attached; the region goes on.
        for base in (4096, 4097, 2**63 - 4096):
            answer = first.say({"op": "attach", "base": base, "features": 0}, (first.socket.fileno(),))
            assert answer["error"] == "usage"
        assert second.say({"op": "close", "why": "a field of a later version"})["ok"]
        assert second.ended()
        assert third.create(resident_pages=4)["ok"]
    assert "regions_made=3, regions_closed=3, refused=1" in node.stop()


def test_a_look_at_a_huge_region_comes_in_parts(start_node: StartNode) -> None:
    """Eight of them at once held every thread that serves applications, for minutes."""
    out = run_script(
        """
        from ramster.frontswap import messages
        region = ramster.connect(sys.argv[1]).region((1 << 20) * PAGE, resident=64 * PAGE)
        reply = region._control.ask(messages.Check(first=0, count=1 << 20))
        print(reply.runs, reply.next_page)
        region.check()
        """,
        start_node("--engine").socket,
    )
    assert out.split("\n")[0] == f"[] {CHECK_PAGES}"


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "[red]", "a\u202eb"])
def test_a_name_that_would_do_something_where_it_is_shown_is_refused(start_node: StartNode, name: str) -> None:
    """Also of a client that does not look at it itself."""
    with Talker(start_node()) as talker:
        answer = talker.create(name=name)
        assert answer["error"] == "usage", answer
        assert answer["message"].startswith(f"name: {name!r}, must be 1 to 48 printable characters"), answer
        assert talker.create(name="good")["name"] == "good"


def test_a_budget_that_is_too_small_names_the_argument(start_node: StartNode) -> None:
    out = run_script(
        """
        try: ramster.connect(sys.argv[1]).region("1MiB", resident=4096)
        except ramster.UsageError as error: print(error)
        """,
        start_node("--engine").socket,
    )
    words = "resident: 4096 bytes, must be at least 65536 (16 pages), or as much as the region (1048576)\n"
    assert out == words


def test_what_the_node_remembers_of_pins_is_bounded(start_node: StartNode) -> None:
    """Each pin of the same page under one group was one more entry, up to 65535 for each page."""
    out = run_script(
        """
        from ramster.frontswap import messages
        region = ramster.connect(sys.argv[1]).region(64 * PAGE, resident=64 * PAGE)
        pin = messages.Pin(first=3, count=1, group=9)
        for n in range(100):
            try: region._control.ask(pin)
            except ramster.UsageError as error: print(n, error); break
        region._control.ask(messages.Pin(first=4, count=2, group=9))       # adjoins
        print(region._control.ask(messages.Undo(group=9)).pages, region.statistics().pinned_pages)
        """,
        start_node("--engine").socket,
    )
    first, second = out.splitlines()
    assert first.startswith("16 group: 9 has 16 separate ranges"), first
    assert second == "18 0"


def test_one_process_leaves_threads_to_others(directory: Path) -> None:
    """What waits for a lender is bounded in number for each process, not only in time."""
    service = RegionService(directory / "run", lambda *_: pytest.fail("no region"), Settings())
    over, running = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        running.release()
        over.wait(DEADLINE)

    async def scene() -> None:
        ends = [socket.socketpair() for _ in range(2)]
        connections = []
        for ours, _ in ends:
            connections.append(Connection(service, ours))
            service._connections[connections[-1]] = asyncio.current_task()  # type: ignore[assignment]
        waiting = [asyncio.create_task(each.run(wait)) for each in connections for _ in range(WORKERS)]
        for _ in range(PROCESS_WORKERS):
            assert await asyncio.to_thread(running.acquire, timeout=DEADLINE)
        # As another process would have it: there is a thread, and none of the others has begun meanwhile.
        assert not await asyncio.wait_for(service.run(lambda: running.acquire(blocking=False)), DEADLINE)
        over.set()
        await asyncio.gather(*waiting)
        service._connections.clear()
        for connection in connections:
            connection.leave()
        for ours, theirs in ends:
            ours.close()
            theirs.close()

    asyncio.run(scene())
    for pool in (service._pool, service._lookers, service.leavers):
        pool.shutdown()


def test_spans_are_checked(start_node: StartNode) -> None:
    node = start_node()
    run_script(
        """
        from ramster.frontswap import messages
        region = ramster.connect(sys.argv[1]).region(8192 * PAGE, resident=8192 * PAGE)
        for wrong in (messages.Pin(first=0, count=messages.SPAN_MAX + 1), messages.Evict(first=8191, count=2),
                      messages.Check(first=8192, count=1), messages.Unpin(first=0, count=1)):
            try: region._control.ask(wrong)
            except ramster.UsageError: pass
            else: raise AssertionError(wrong)
        # The API splits what is longer.
        with region.pin():
            assert region.statistics().pinned_pages == 8192
        assert region.statistics().pinned_pages == 0
        """,
        node.socket,
    )


def test_many_lost_runs_come_in_parts(start_node: StartNode) -> None:
    node = start_node("--lost", "0:2500")
    run_script(
        """
        region = ramster.connect(sys.argv[1]).region(3000 * PAGE, resident=3000 * PAGE)
        region.prefetch()
        region.evict()
        try: region.check()
        except ramster.RegionLost as error: assert error.runs == [(page, 1) for page in range(2500)]
        else: raise AssertionError
        """,
        node.socket,
    )
    assert messages.RUNS_MAX < 2500


def test_application_killed(start_node: StartNode) -> None:
    node = start_node("--pattern", "--stalled", "5:1")
    script = start_script(
        """
        a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64, name="victim")
        print("value", a[5, 0], flush=True)
        """,
        node.socket,
    )
    assert node.line() == "stalled 5"
    script.kill()
    assert node.line() == "gone victim"
    assert finish(script)[1] == ""


def test_idle_connections_keep_nobody_out(start_node: StartNode) -> None:
    node = start_node()
    idle = [Talker(node) for _ in range(2 * WAITING_MAX)]
    said = json.loads(idle[0].socket.recv(REGION_MESSAGE_BYTES_MAX))
    assert (said["error"], said["id"]) == ("refused", messages.ANY_ID) and "make room" in said["message"]
    assert idle[0].ended()
    with Talker(node) as talker:
        assert talker.create()["ok"]
    for each in idle:
        each.socket.close()


def test_who_was_refused_a_place_in_a_region_does_not_stay_connected(start_node: StartNode) -> None:
    """It had left the table of those that wait, so it was counted nowhere, and what it asked next kept it there."""
    node = start_node()
    with Talker(node) as first, Talker(node) as second:
        number = first.create()["region"]
        answer = second.say({"op": "join", "version": messages.VERSION, "region": number})
        assert answer["error"] == "refused" and "one process" in answer["message"]
        with contextlib.suppress(OSError):
            second.socket.send(b'{"op":"capacity","version":2}')
        assert second.ended()


def _service(directory: Path, tiers: Callable[[], dict[str, int]] = dict) -> RegionService:
    return RegionService(directory / "run", lambda *_: pytest.fail("no region"), Settings(), tiers)


def test_who_has_no_region_goes_whatever_else_it_asks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_connection, "HANDSHAKE_DEADLINE_S", 0.1)

    def ask(path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client, contextlib.suppress(OSError):
            client.connect(str(path))
            client.settimeout(DEADLINE)
            end = time.monotonic() + DEADLINE
            while client.send(b'{"op":"capacity","version":2}') and client.recv(REGION_MESSAGE_BYTES_MAX):
                assert time.monotonic() < end, "it may ask for ever"

    async def scene() -> None:
        service = _service(directory)
        await service.start()
        try:
            await asyncio.to_thread(ask, service.path)
        finally:
            await service.close()

    asyncio.run(scene())


def test_who_had_to_make_room_does_not_wait_for_an_answer(directory: Path) -> None:
    """Where looks take long, each further connection stayed for as long, beside all that the table has room for."""
    over = threading.Event()
    service = _service(directory, lambda: {} if over.wait(DEADLINE) else pytest.fail("deadline"))

    def flood(clients: list[socket.socket]) -> None:
        for client in clients:
            client.settimeout(DEADLINE)
            client.connect(str(service.path))
            client.send(b'{"op":"capacity","version":2}')
        wait_until(lambda: service.counters.connections == len(clients), "they have come")
        wait_until(lambda: len(service._connections) <= WAITING_OF_ONE_MAX, "those that were too many have gone")
        assert b"make room" in clients[0].recv(REGION_MESSAGE_BYTES_MAX)
        over.set()
        assert b'"ok":true' in clients[-1].recv(REGION_MESSAGE_BYTES_MAX)

    async def scene() -> None:
        await service.start()
        clients = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2 * WAITING_OF_ONE_MAX)]
        try:
            await asyncio.to_thread(flood, clients)
        finally:
            over.set()
            for client in clients:
                client.close()
            await service.close()

    asyncio.run(scene())


def test_one_user_leaves_a_thread_that_looks_to_others(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_service, "is_own", lambda uid: False)
    over, running = threading.Event(), threading.Semaphore(0)

    class Slow:
        def look(self) -> dict[str, int]:
            running.release()
            assert over.wait(DEADLINE)
            return {}

    async def scene() -> None:
        service = _service(directory)
        ends = [socket.socketpair() for _ in range(LOOKERS + 1)]
        connections = []
        for ours, _ in ends:
            connections.append(Connection(service, ours))
            service._connections[connections[-1]] = asyncio.current_task()  # type: ignore[assignment]
            monkeypatch.setattr(connections[-1], "_ready", lambda: None)
            connections[-1].shared = Slow()  # type: ignore[assignment]
        asked = [asyncio.create_task(each._statistics()) for each in connections]
        assert await asyncio.to_thread(running.acquire, timeout=DEADLINE)
        # As another user would have it.
        assert not await asyncio.wait_for(service.look(lambda: running.acquire(blocking=False)), DEADLINE)
        over.set()
        await asyncio.gather(*asked)
        service._connections.clear()
        for connection in connections:
            connection.leave()
        for ours, theirs in ends:
            ours.close()
            theirs.close()
        await service.close()

    asyncio.run(scene())


def test_one_process_does_not_get_every_region(start_node: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = start_node()
    held = []
    for _ in range(REGIONS_OF_A_PROCESS_MAX):
        held.append(Talker(node))
        assert held[-1].create(pages=1)["ok"]
    with Talker(node) as late:
        answer = late.create(pages=1)
        assert not answer["ok"] and "this process has 128 regions" in answer["message"]
    run_script("ramster.connect(sys.argv[1]).region(4096).close()", node.socket)
    for each in held:
        each.socket.close()


def test_second_node_is_refused_and_a_dead_ones_socket_replaced(start_node: StartNode, directory: Path) -> None:
    node = start_node()
    assert stat.S_IMODE((directory / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o660
    server = str(Path(__file__).with_name("_server.py"))
    command = [sys.executable, server, str(directory / "run")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    assert second.returncode != 0 and "PortTaken" in second.stderr and "another node serves it" in second.stderr
    with Talker(node) as talker:
        assert talker.create()["ok"]
    node.kill()
    assert node.socket.exists()
    successor = start_node()
    with Talker(successor) as talker:
        assert talker.create()["ok"]
    successor.stop()
    assert not successor.socket.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_directory_that_others_can_write(directory: Path, mode: int) -> None:
    (directory / "run").mkdir()
    (directory / "run").chmod(mode)
    command = [sys.executable, str(Path(__file__).with_name("_server.py")), str(directory / "run")]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    assert refused.returncode != 0 and "PermissionMissing" in refused.stderr and "chmod go-w" in refused.stderr


def test_file_in_the_way(directory: Path) -> None:
    (directory / "run").mkdir(mode=0o700)
    (directory / "run" / "region.sock").write_text("mine")
    command = [sys.executable, str(Path(__file__).with_name("_server.py")), str(directory / "run")]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    assert refused.returncode != 0 and "is no socket" in refused.stderr
    assert (directory / "run" / "region.sock").read_text() == "mine"


def test_a_request_that_fails_holds_nothing_once_it_is_answered(tmp_path: Path) -> None:
    """Its region's memory would stay until the garbage collector runs, which on a quiet node is never."""

    class Region:
        def pin(self) -> None:
            raise RegionFull("no room")

    def never(*_: object) -> Any:
        raise AssertionError

    async def fail() -> weakref.ref[Region]:
        service = RegionService(tmp_path, never, Settings())
        region = Region()
        with contextlib.suppress(RegionFull):
            await service.run(lambda: region.pin())
        await service.close()
        return weakref.ref(region)

    gc.disable()
    try:
        assert asyncio.run(fail())() is None
    finally:
        gc.enable()
