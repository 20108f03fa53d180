"""The real control server and the real client over a Unix socket, on a node view made of plain data."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ramster.cli import main
from ramster.cli.control_client import ControlClient
from ramster.errors import NodeUnreachable, PortTaken, ProtocolError, RamsterError, Refused, UsageError
from ramster.node.control import REQUESTS_MAX, WAITING_MAX, WAITING_OF_ONE_MAX, ControlServer

STATUS: dict[str, Any] = {
    "name": "alpha",
    "number": 1,
    "version": "0.1.0",
    "pid": 0,
    "uptime_s": 3700,
    "generation": 7,
    "state": "running",
    "arena": {
        "arena_bytes": 64 << 20,
        "segment_bytes": 256 << 10,
        "frames_total": 256,
        "frames_free": 64,
        "segments_local": 192,
        "segments_remote": 300,
        "pages_local": 20000,
        "pages_remote": 40000,
        "pages_filled": 100,
        "bytes_in": 200,
        "bytes_compressed": 100,
        "locked": True,
    },
    "lend": {"bytes": 1 << 20, "frames_total": 4, "frames_used": 2, "bytes_used": 1 << 19, "owners": {"beta": 2}},
    "peers": [
        {"name": "beta", "number": 2, "address": "192.0.2.2:7777", "state": "up", "reason": "", "credit": 12,
         "bytes_sent": 5 << 20, "bytes_received": 100, "gets": 3, "round_trip_p50_us": 88},
        {"name": "gamma", "number": 3, "address": "192.0.2.3:7777", "state": "down", "reason": "connection refused",
         "credit": 0, "bytes_sent": 0, "bytes_received": 0, "gets": 0, "round_trip_p50_us": 0},
    ],
    "regions": [{"id": 1, "name": "big", "pid": 42, "pages": 131072, "resident_pages": 16384, "local_pages": 20000,
                 "remote_pages": 40000, "lost_pages": 0, "faults": 99, "fault_local_p50_us": 20,
                 "attached_processes": 37}],
    "exports": [{"name": "swap", "size_bytes": 8 << 30, "pages_here": 256, "pages_away": 512, "pages_gone": 0,
                 "connections": 2, "reads": 11, "writes": 12, "errors": 0, "read_only": False}],
    "counters": {"puts": 5, "local_gets": 6, "remote_gets": 7},
    "remotify": {},
}  # fmt: skip


class View:
    """A node made of plain data."""

    def __init__(self) -> None:
        self.data = dict(STATUS)
        self.losses: dict[str, Any] = {}
        self.stopped: list[bool] = []
        self.ordered: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None

    async def status(self) -> dict[str, Any]:
        if self.failure:
            raise self.failure
        return self.data

    async def regions(self) -> list[dict[str, Any]]:
        regions: list[dict[str, Any]] = self.data["regions"]
        return regions

    async def would_lose(self) -> dict[str, Any]:
        return self.losses

    async def exports(self) -> list[dict[str, Any]]:
        exports: list[dict[str, Any]] = self.data["exports"]
        return exports

    async def create_export(
        self, name: str, size_bytes: int, max_bytes: int | None, read_only: bool, swap: bool, allow: Sequence[str]
    ) -> dict[str, Any]:
        if any(each["name"] == name for each in self.data["exports"]):
            raise Refused(f"there is an export {name} already")
        self.ordered.append(("create", name, size_bytes, max_bytes, read_only, swap, *allow))
        return {"name": name, "notes": []}

    async def change_export(
        self,
        name: str,
        size_bytes: int | None,
        read_only: bool | None,
        allow: Sequence[str] | None,
        swap: bool | None,
    ) -> dict[str, Any]:
        self.ordered.append(("change", name, size_bytes, read_only, allow, swap))
        return {"name": name, "size_bytes": size_bytes}

    async def remove_export(self, name: str, force: bool) -> None:
        if name == "swap" and not force:
            raise Refused("export swap is in use by 2 connections")
        self.ordered.append(("remove", name, force))

    def request_stop(self, force: bool) -> None:
        self.stopped.append(force)


class Node:
    """The server on its own event loop in its own thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.view = View()
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(self.view, path)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        try:
            self.call(self.server.start())
        except BaseException:
            self.close()
            raise
        self.client = ControlClient(path, timeout_s=10)

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def close(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        self.loop.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "run" / "control.sock")
    yield made
    made.close()


def raw(path: Path, data: bytes, *, end: bool = False) -> bytes:
    """The whole answer to `data`; `end` closes our direction, which aiohttp takes as a client that gave up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def test_status_and_regions_travel_unchanged(node: Node) -> None:
    assert node.client.status() == STATUS
    assert node.client.regions() == STATUS["regions"]


def test_socket_is_for_owner_and_group_alone_and_goes_with_the_server(node: Node) -> None:
    assert stat.S_IMODE(node.path.stat().st_mode) == 0o660
    assert [path.name for path in node.path.parent.iterdir()] == ["control.sock"]
    node.call(node.server.stop())
    assert list(node.path.parent.iterdir()) == []
    with pytest.raises(NodeUnreachable, match="ramster node --config"):
        node.client.status()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with pytest.raises(NodeUnreachable, match="left over"):
        ControlClient(path).status()
    node = Node(path)
    try:
        with pytest.raises(PortTaken, match="run_dir"):
            node.call(ControlServer(View(), path).start())
        assert node.client.status() == STATUS
    finally:
        node.close()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    server = ControlServer(View(), tmp_path / ("x" * 100) / "control.sock")
    with pytest.raises(UsageError, match="run_dir"):
        asyncio.run(server.start())


def test_stop_is_refused_while_something_would_be_lost(node: Node) -> None:
    node.view.losses = {"foreign": {"beta": 4096}, "regions": []}
    answer = node.client.stop(force=False)
    assert not answer.accepted and answer.would_lose == {"foreign": {"beta": 4096}}
    assert node.view.stopped == []
    answer = node.client.stop(force=True)
    assert answer.accepted and answer.would_lose == {"foreign": {"beta": 4096}}
    assert node.view.stopped == [True]


def test_stop_with_nothing_to_lose(node: Node) -> None:
    assert node.client.stop(force=False).accepted
    assert node.view.stopped == [False]


def test_orders_about_exports_reach_the_node(node: Node) -> None:
    assert node.client.exports() == STATUS["exports"]
    assert node.client.create_export("vm", 5000, max_bytes=1 << 40, swap=True)["name"] == "vm"
    node.client.create_export("old", 1, read_only=True)
    node.client.create_export("for", 1, allow=["web", "backup"])
    assert node.client.change_export("vm", size_bytes=1 << 20)["size_bytes"] == 1 << 20
    node.client.change_export("vm", read_only=False)
    node.client.change_export("for", allow=["web"])
    node.client.change_export("for", allow=[])
    node.client.change_export("vm", swap=False)
    node.client.remove_export("vm")
    node.client.remove_export("swap", force=True)
    assert node.view.ordered == [
        ("create", "vm", 5000, 1 << 40, False, True),
        ("create", "old", 1, None, True, False),
        ("create", "for", 1, None, False, False, "web", "backup"),
        ("change", "vm", 1 << 20, None, None, None),
        ("change", "vm", None, False, None, None),
        ("change", "for", None, None, ("web",), None),
        ("change", "for", None, None, (), None),
        ("change", "vm", None, None, None, False),
        ("remove", "vm", False),
        ("remove", "swap", True),
    ]


def test_what_a_node_refuses_is_409_and_refused(node: Node) -> None:
    for order in (lambda: node.client.create_export("swap", 1), lambda: node.client.remove_export("swap")):
        with pytest.raises(Refused, match="export swap"):
            order()
    answer = raw(node.path, b"DELETE /v1/exports/swap HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] == b"409" and json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "refused"
    assert node.view.ordered == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/exports", b""),
        ("POST", "/v1/exports", b'{"name": "x"}'),
        ("POST", "/v1/exports", b'{"name": "x", "size_bytes": "1GiB"}'),
        ("POST", "/v1/exports", b'{"name": "x", "size_bytes": 1.5}'),
        ("POST", "/v1/exports", b'{"name": "x", "size_bytes": 1, "sise": 2}'),
        ("POST", "/v1/exports", b'{"name": "\xff", "size_bytes": 1}'),
        ("PATCH", "/v1/exports/x", b'{"size": 1}'),
        ("PATCH", "/v1/exports/x", b'{"size_bytes": 1e999}'),
        ("PATCH", "/v1/exports/x", b'{"read_only": "no"}'),
        ("PATCH", "/v1/exports/x", b"{}"),
        ("DELETE", "/v1/exports/x?force=yes", b""),
        ("DELETE", "/v1/exports/x?forse=1", b""),
    ],
)
def test_bad_orders_about_exports_change_nothing(node: Node, method: str, path: str, body: bytes) -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = raw(node.path, head.encode() + body)
    assert answer.split()[1] == b"400"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "usage"
    assert node.view.ordered == []


@pytest.mark.parametrize("body", [b"[", b"[]", b'{"force": 1}', b'{"forse": true}', b"\xff", b" " * 5000])
def test_a_bad_stop_body_changes_nothing(node: Node, body: bytes) -> None:
    head = f"POST /v1/stop HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = raw(node.path, head.encode() + body)
    assert answer.split()[1] in (b"400", b"413")
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error", "message"}
    assert node.view.stopped == []
    assert node.client.status() == STATUS


@pytest.mark.parametrize(
    ("request_line", "status", "code"),
    [
        ("GET /nothing HTTP/1.1", b"404", "not-found"),
        ("GET /v1/stop HTTP/1.1", b"405", "method-not-allowed"),
    ],
)
def test_wrong_routes_get_json_errors(node: Node, request_line: str, status: bytes, code: str) -> None:
    answer = raw(node.path, f"{request_line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] == status
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == code


def test_garbage_harms_nobody(node: Node) -> None:
    for data in (b"\0" * 1000, b"GET " + b"a" * 100_000, b"\x16\x03\x01\x02\x00"):
        raw(node.path, data, end=True)
    assert node.client.status() == STATUS


def test_errors_of_the_node_keep_their_identity(node: Node) -> None:
    node.view.failure = ProtocolError("odd")
    with pytest.raises(ProtocolError, match="odd"):
        node.client.status()


def test_a_bug_in_the_node_is_told_without_details(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.view.failure = ZeroDivisionError("secret")
    with pytest.raises(RamsterError, match="log") as caught:
        node.client.status()
    assert "secret" not in str(caught.value) and "secret" in caplog.text


def test_many_clients_at_once_are_all_answered(node: Node) -> None:
    def ask(_: int) -> bool:
        try:
            return node.client.status() == STATUS
        except RamsterError as error:
            return "overloaded" in str(error) or "at a time" in str(error)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(4 * REQUESTS_MAX)))


@pytest.mark.parametrize(
    "half", [b"", b"GET /v1/sta", b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"]
)
def test_half_requests_keep_nobody_out(node: Node, half: bytes) -> None:
    idle = []
    for _ in range(2 * WAITING_MAX):
        idle.append(socket.socket(socket.AF_UNIX))
        idle[-1].connect(str(node.path))
        idle[-1].sendall(half)
    assert node.client.status()["name"] == "alpha"
    idle[0].settimeout(20)
    said = b""
    with contextlib.suppress(ConnectionError):
        while part := idle[0].recv(65536):
            said += part
    assert b"503" in said and b"try again" in said, "the oldest made room, and is told"
    assert len(node.server._waiting) <= WAITING_OF_ONE_MAX
    for each in idle:
        each.close()
    assert node.view.stopped == []


def test_a_half_request_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramster.node.control.REQUEST_S", 0.2)
    assert b"408" in raw(node.path, b"GET /v1/status HTTP/1.1\r\nHo")


def test_something_else_on_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(answer)
            with pytest.raises(ProtocolError, match="not a RAMster node"):
                ControlClient(path).status()
            done.result(20)


def test_a_node_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(NodeUnreachable, match=r"within 0\.2 s"):
            ControlClient(path, timeout_s=0.2).status()


def test_status_command_shows_everything(node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["status", "--socket", str(node.path)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "alpha", "1 h 1 min", "48 MiB of 64 MiB", "192 / 300", "2.00 : 1", "beta", "up", "88 us",
        "gamma", "down (connection refused)", "big", "37", "512 MiB", "512 KiB of 1 MiB", "swap", "8 GiB", "2 MiB",
    ):  # fmt: skip
        assert text in shown, text


def test_status_command_as_json(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--socket", str(node.path)]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_of_an_older_node_is_shown_as_far_as_it_goes(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.view.data = {"name": "alpha"}
    assert main(["status", "--socket", str(node.path)]) == 0
    assert "alpha" in capsys.readouterr().out


def test_stop_command_prints_what_would_be_lost(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.view.losses = {
        "foreign": {"beta": 3 << 20},
        "regions": [{"id": 1, "name": "big", "pid": 42, "pages": 256}],
        "exports": [{"name": "vm", "pages": 512, "connections": 0}, {"name": "swap", "pages": 1, "connections": 1}],
    }
    assert main(["stop", "--socket", str(node.path)]) == 5
    printed = capsys.readouterr()
    assert printed.out == ""
    for text in (
        "3 MiB kept for node beta", "1 MiB of big of process 42", "--force",
        "2 MiB stored in export vm\n", "4 KiB stored in export swap, which 1 connection uses",
    ):  # fmt: skip
        assert text in printed.err
    assert node.view.stopped == []


def test_stop_command_waits_until_the_node_is_gone(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    order = node.view.request_stop

    def request_stop(force: bool) -> None:
        order(force)
        # Without a pid in the status the command asks until nobody answers.
        node.loop.call_soon(lambda: asyncio.ensure_future(node.server.stop()))

    node.view.request_stop = request_stop  # type: ignore[method-assign]
    assert main(["stop", "--socket", str(node.path)]) == 0
    assert "alpha has stopped" in capsys.readouterr().out
    assert node.view.stopped == [False]
