"""The node's control API: JSON over HTTP on a Unix socket that only the node's user and group may open.

Routes: GET /v1/status, GET /v1/regions, POST /v1/stop {"force": bool}; GET and POST /v1/exports, PATCH and DELETE
/v1/exports/NAME. Errors are JSON objects {"error", "message"}. The server knows the node only as a `NodeView`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from ramster import limits
from ramster.admission import Limits, Table
from ramster.constants import SOCKET_PATH_BYTES_MAX
from ramster.errors import PortTaken, RamsterError, Refused, UsageError
from ramster.frontswap.sockets import Acceptor, is_own, listen_unix, peer_of

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 8192  # the largest request makes an export with 64 names
REQUESTS_MAX = 32  # at a time; people and scrapers, not a data path
SHUTDOWN_S = 2.0  # an answer under way may finish
# Connections whose request has not arrived whole. Beyond, one of them has to go; of one process at most so many, and a
# part is kept for root and the node's user.
WAITING_MAX = 32
WAITING_OF_ONE_MAX = 24
WAITING_KEPT = 8
REQUEST_S = 5.0  # for a request to arrive; callers are on this machine
ANSWER_S = 60.0  # for an answer to be made and taken: to forget a large export takes a while
# Descriptors that are kept, so that a node that has run out of them still tells what it is about.
SPARES = 4

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class NodeView(Protocol):
    """What the control API needs of a node. All methods are called on the event loop and must not block it."""

    async def status(self) -> dict[str, Any]:
        """The whole status, as JSON types."""

    async def regions(self) -> list[dict[str, Any]]:
        """One object per region: id, name, pid, pids (all processes that use it) and the region's statistics."""

    async def would_lose(self) -> dict[str, Any]:
        """What is lost if the node stops now: {"foreign": {owner: bytes}, "regions": [{"id", "name", "pid", "pages"}],
        "exports": [{"name", "pages", "connections"}]}.

        Empty when nothing would be. Keys whose value is empty may be left out or empty.
        """

    async def exports(self) -> list[dict[str, Any]]:
        """One object per export: what `create_export` returns."""

    async def create_export(
        self, name: str, size_bytes: int, max_bytes: int | None, read_only: bool, swap: bool, allow: Sequence[str]
    ) -> dict[str, Any]:
        """Makes an empty export and describes it. UsageError, Refused."""

    async def change_export(
        self,
        name: str,
        size_bytes: int | None,
        read_only: bool | None,
        allow: Sequence[str] | None,
        swap: bool | None,
    ) -> dict[str, Any]:
        """Lets it grow, be read-only or not, be for others, and describes it; None changes nothing. UsageError,
        Refused.
        """

    async def remove_export(self, name: str, force: bool) -> None:
        """Forgets it and its pages, here and away. Refused while it is in use, unless forced. UsageError."""

    def request_stop(self, force: bool) -> None:
        """Begins an orderly stop and returns at once. A second call changes nothing."""


class ControlServer:
    """Serves `view` on the Unix socket `path` from `start` until `stop`."""

    def __init__(self, view: NodeView, path: Path) -> None:
        self._view = view
        self._path = path
        self._runner: web.AppRunner | None = None
        self._acceptor: Acceptor | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = Table(Limits(WAITING_MAX, WAITING_OF_ONE_MAX, WAITING_KEPT))
        self._server: web.Server | None = None
        self._running = 0
        self._stopping = asyncio.Lock()

    async def start(self) -> None:
        """Binds and serves. UsageError for a path that is too long, PortTaken when another node serves on it."""
        if len(os.fsencode(self._path)) > SOCKET_PATH_BYTES_MAX:
            raise UsageError(
                f"{self._path} is longer than {SOCKET_PATH_BYTES_MAX} bytes, the limit for a socket; "
                "set a shorter run_dir in [node]"
            )
        if await asyncio.to_thread(_answers, self._path):
            raise PortTaken(
                f"another node already serves on {self._path}; stop it with `ramster stop --socket {self._path}` "
                "or give this node its own run_dir in [node]"
            )

        # aiohttp marks middlewares by an attribute, which a bound method cannot carry.
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guard(request, handler)

        app = web.Application(middlewares=[guard], client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/regions", self._regions)
        app.router.add_get("/v1/exports", self._exports)
        app.router.add_post("/v1/exports", self._create_export)
        app.router.add_patch("/v1/exports/{name}", self._change_export)
        app.router.add_delete("/v1/exports/{name}", self._remove_export)
        app.router.add_post("/v1/stop", self._stop)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            listener = listen_unix(self._path)
        except BaseException:
            await runner.cleanup()
            raise
        self._runner, self._server = runner, runner.server
        self._acceptor = Acceptor(
            listener, str(self._path), self._accept, short=lambda sock, _: self._accept(sock), spares=SPARES
        )

    def _accept(self, sock: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """One connection, which brings one request."""
        assert self._server is not None
        sock.setblocking(False)
        pid, uid = peer_of(sock)
        who = f"process {pid} of user {uid}"
        caller = _Caller(self._server)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: caller, sock)
        key = self._waiting.enter(who, is_own(uid), caller.displace)
        assert isinstance(key, int), "nobody proves a name here, so somebody always makes room"
        try:
            async with asyncio.timeout(REQUEST_S):
                await caller.asked.wait()
            self._waiting.leave(key)
            async with asyncio.timeout(ANSWER_S):
                await caller.ended.wait()
        except TimeoutError:
            if caller.asked.is_set():
                log.warning("%s: %s did not take its answer, closed its connection", self._path, who)
                caller.abort()
            else:
                log.warning("%s: %s did not send its whole request, closed its connection", self._path, who)
                caller.refuse(408, "too-slow", f"the request did not arrive within {REQUEST_S:g} s")
        finally:
            self._waiting.leave(key)
            if caller.displaced:
                log.warning("%s: %s had to make room: %d others were waiting", self._path, who, WAITING_MAX)

    async def stop(self) -> None:
        """Stops serving and removes the socket. Answers under way get up to SHUTDOWN_S seconds. Idempotent."""
        async with self._stopping:  # a second caller returns when all is done, not before
            runner, self._runner = self._runner, None
            if runner is not None:
                self._path.unlink(missing_ok=True)
                assert self._acceptor is not None
                self._acceptor.close()
                await asyncio.sleep(0)  # those that were accepted just now are aiohttp's from here on
                await runner.cleanup()
                if self._tasks:
                    await asyncio.wait(list(self._tasks))

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns every failure into a JSON answer and bounds the requests at a time."""
        try:
            await request.read()  # all of it, before it counts as one that is served
        except web.HTTPException as error:
            response: web.StreamResponse = _http_error(request, error)
        else:
            response = await self._guarded(request, handler)
        response.force_close()
        return response

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if isinstance(request.protocol, _Caller):
            request.protocol.asked.set()
        if self._running >= REQUESTS_MAX:
            return _error(503, "overloaded", f"more than {REQUESTS_MAX} requests at a time; try again")
        self._running += 1
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _http_error(request, error)
        except Refused as error:
            return _error(409, error.code, str(error))
        except RamsterError as error:
            return _error(400 if error.blame == "caller" else 500, error.code, str(error))
        except Exception as error:
            limit = limits.reached(error, f"answer {request.method} {request.path}", "the node")
            if limit is not None:
                log.error("control request: %s", limit)
                return _error(500, limit.code, str(limit))
            log.exception("control request %s %s failed", request.method, request.path)
            return _error(500, "internal", "the node failed to answer; its log has the details")
        finally:
            self._running -= 1

    async def _status(self, request: web.Request) -> web.Response:
        return _answer(await self._view.status())

    async def _regions(self, request: web.Request) -> web.Response:
        return _answer({"regions": await self._view.regions()})

    async def _exports(self, request: web.Request) -> web.Response:
        return _answer({"exports": await self._view.exports()})

    async def _create_export(self, request: web.Request) -> web.Response:
        order = _read(await request.read(), NewExport)
        return _answer(
            await self._view.create_export(
                order.name, order.size_bytes, order.max_bytes, order.read_only, order.swap, order.allow
            )
        )

    async def _change_export(self, request: web.Request) -> web.Response:
        order = _read(await request.read(), ExportChange)
        if order == ExportChange():
            raise UsageError("the body must have size_bytes, read_only, allow or swap, or several of them")
        return _answer(
            await self._view.change_export(
                request.match_info["name"], order.size_bytes, order.read_only, order.allow, order.swap
            )
        )

    async def _remove_export(self, request: web.Request) -> web.Response:
        name, force = request.match_info["name"], request.query.get("force", "0")
        if force not in ("0", "1") or request.query.keys() - {"force"}:
            raise UsageError("the query may be force=0 or force=1")
        await self._view.remove_export(name, force == "1")
        return _answer({"removed": name})

    async def _stop(self, request: web.Request) -> web.Response:
        force = _read(await request.read() or b"{}", StopOrder).force
        try:
            would_lose = {key: value for key, value in (await self._view.would_lose()).items() if value}
        except Exception:
            if not force:
                raise
            log.exception("cannot tell what a stop would lose; stopping all the same")
            would_lose = {}
        if would_lose and not force:
            return _answer(
                {
                    "error": "refused",
                    "message": "data would be lost; nothing was stopped",
                    "would_lose": would_lose,
                },
                409,
            )
        self._view.request_stop(force)
        return _answer({"stopping": True, "would_lose": would_lose})


class _Caller(RequestHandler):
    """aiohttp's side of one connection, and what becomes of it."""

    __slots__ = ("asked", "displaced", "ended")

    def __init__(self, server: web.Server) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), access_log=None)  # type: ignore[arg-type]
        self.asked = asyncio.Event()
        self.ended = asyncio.Event()
        self.displaced = False

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.asked.set()
        self.ended.set()

    def log_exception(self, *args: Any, **options: Any) -> None:
        """What a caller does wrong on the way is a line and no traceback; the guard says what is our fault."""
        error = sys.exc_info()[1]
        log.info("control socket: a request broke: %s", error or "it ended early")

    def displace(self) -> None:
        """Another one needs its place."""
        self.displaced = True
        self.refuse(503, "overloaded", f"{WAITING_MAX} others wait; send the request at once, or try again")

    def abort(self) -> None:
        """End it as it is."""
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()

    def refuse(self, status: int, code: str, message: str) -> None:
        """End it with an answer to a request that has not come."""
        if self.transport is not None:
            body = msgspec.json.encode({"error": code, "message": message})
            head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: "
            self.transport.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
            self.force_close()


class NewExport(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/exports."""

    name: str
    size_bytes: int
    max_bytes: int | None = None
    read_only: bool = False
    swap: bool = False  # by the kernel of this machine: see docs/guard.md
    allow: tuple[str, ...] = ()  # names of certificates; none for all of the cluster


class ExportChange(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PATCH /v1/exports/NAME. What is left out stays as it is."""

    size_bytes: int | None = None
    read_only: bool | None = None
    allow: tuple[str, ...] | None = None  # as of NewExport
    swap: bool | None = None


class StopOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/stop."""

    force: bool = False


_Order = TypeVar("_Order", NewExport, ExportChange, StopOrder)


# Made at import, as in wire/hello.py.
_DECODERS: Final[dict[type[msgspec.Struct], msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind) for kind in (NewExport, ExportChange, StopOrder)
}


def _read(body: bytes, kind: type[_Order]) -> _Order:
    try:
        return _DECODERS[kind].decode(body)  # type: ignore[no-any-return]
    except msgspec.DecodeError as error:
        keys = ", ".join(kind.__struct_fields__)
        raise UsageError(f"the body must be a JSON object with {keys}: {error}") from None
    except UnicodeDecodeError:
        raise UsageError("the body is not UTF-8") from None


def _answer(data: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), status=status, content_type="application/json")


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    code = {404: "not-found", 405: "method-not-allowed", 413: "too-large"}.get(error.status, "bad-request")
    return _error(error.status, code, f"{request.method} {request.path}: {error.reason}")


def _error(status: int, code: str, message: str) -> web.Response:
    return _answer({"error": code, "message": message}, status)


def _answers(path: Path) -> bool:
    """True if something accepts connections on `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return path.is_socket()  # a listener that is too busy to accept is alive all the same
        return True
