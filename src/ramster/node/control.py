"""The node's control API: JSON over HTTP on a Unix socket that only the node's user and group may open.

Routes: GET /v1/status, GET /v1/regions, POST /v1/stop {"force": bool}. Errors are JSON objects {"error", "message"}.
The server knows the node only as a `NodeView`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from aiohttp import web

from ramster.constants import SOCKET_PATH_BYTES_MAX
from ramster.errors import PortTaken, RamsterError, UsageError

log = logging.getLogger(__name__)

SOCKET_MODE = 0o660
BODY_BYTES_MAX = 4096  # the largest request is {"force": false}
REQUESTS_MAX = 32  # at a time; people and scrapers, not a data path
BACKLOG = 64
SHUTDOWN_S = 2.0  # an answer under way may finish
_ACCEPT_TURNS = 5

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class NodeView(Protocol):
    """What the control API needs of a node. All methods are called on the event loop and must not block it."""

    async def status(self) -> dict[str, Any]:
        """The whole status, as JSON types."""

    async def regions(self) -> list[dict[str, Any]]:
        """One object per region: id, name, pid, pids (all processes that use it) and the region's statistics."""

    async def would_lose(self) -> dict[str, Any]:
        """What is lost if the node stops now: {"foreign": {owner: bytes}, "regions": [{"id", "name", "pid", "pages"}]}.

        Empty when nothing would be. Keys whose value is empty may be left out or empty.
        """

    def request_stop(self, force: bool) -> None:
        """Begins an orderly stop and returns at once. A second call changes nothing."""


class ControlServer:
    """Serves `view` on the Unix socket `path` from `start` until `stop`."""

    def __init__(self, view: NodeView, path: Path) -> None:
        self._view = view
        self._path = path
        self._runner: web.AppRunner | None = None
        self._listener: socket.socket | None = None
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
        app.router.add_post("/v1/stop", self._stop)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            self._listener = _bind(self._path)
            await web.SockSite(runner, self._listener, backlog=BACKLOG).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner

    async def stop(self) -> None:
        """Stops serving and removes the socket. Answers under way get up to SHUTDOWN_S seconds. Idempotent."""
        async with self._stopping:  # a second caller returns when all is done, not before
            runner, self._runner = self._runner, None
            if runner is not None:
                self._path.unlink(missing_ok=True)
                # A connection that was just accepted reaches aiohttp some turns of the loop later. Closing the listener
                # in between leaks it (asyncio asserts in its transport), so accepting ends first.
                assert self._listener is not None
                asyncio.get_running_loop().remove_reader(self._listener.fileno())
                for _ in range(_ACCEPT_TURNS):
                    await asyncio.sleep(0)
                await runner.cleanup()

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns every failure into a JSON answer and bounds the requests at a time."""
        if self._running >= REQUESTS_MAX:
            return _error(503, "overloaded", f"more than {REQUESTS_MAX} requests at a time; try again")
        self._running += 1
        try:
            return await handler(request)
        except web.HTTPException as error:
            code = {404: "not-found", 405: "method-not-allowed", 413: "too-large"}.get(error.status, "bad-request")
            return _error(error.status, code, f"{request.method} {request.path}: {error.reason}")
        except RamsterError as error:
            return _error(400 if error.blame == "caller" else 500, error.code, str(error))
        except Exception:
            log.exception("control request %s %s failed", request.method, request.path)
            return _error(500, "internal", "the node failed to answer; its log has the details")
        finally:
            self._running -= 1

    async def _status(self, request: web.Request) -> web.Response:
        return _answer(await self._view.status())

    async def _regions(self, request: web.Request) -> web.Response:
        return _answer({"regions": await self._view.regions()})

    async def _stop(self, request: web.Request) -> web.Response:
        force = _read_force(await request.read())
        would_lose = {key: value for key, value in (await self._view.would_lose()).items() if value}
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


def _read_force(body: bytes) -> bool:
    try:
        order = msgspec.json.decode(body) if body else {}
    except msgspec.DecodeError:
        raise UsageError('the body is not JSON; send {"force": false}') from None
    if not isinstance(order, dict) or not isinstance(order.get("force", False), bool) or order.keys() - {"force"}:
        raise UsageError('the body must be {"force": true} or {"force": false}')
    return bool(order.get("force", False))


def _answer(data: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), status=status, content_type="application/json")


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


def _bind(path: Path) -> socket.socket:
    """A listening socket at `path` with its final mode from the first moment on.

    Bound under another name, then renamed: bind() applies the umask, and a chmod afterwards would leave a gap.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    staging = path.with_name(f".{os.getpid()}")  # not longer than control.sock, so the checked length holds
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        staging.unlink(missing_ok=True)
        sock.bind(str(staging))
        staging.chmod(SOCKET_MODE)
        sock.listen(BACKLOG)
        staging.rename(path)
    except BaseException:
        sock.close()
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise
    return sock
