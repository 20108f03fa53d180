"""The command line's side of the control API: blocking HTTP over the node's Unix socket, standard library only.

A command that asks one question should not load an event loop first: this keeps `ramster status` quick.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from ramster import limits
from ramster.errors import NodeAbsent, NodeUnreachable, PermissionMissing, ProtocolError, RamsterError, from_code
from ramster.frontswap import trust

TIMEOUT_S = 10.0
SAY_AFTER_S = 1.0  # nobody wonders earlier
_POLL_S = 0.05  # a socket that is not there yet tells nobody when it comes
_ANSWER_BYTES_MAX = 64 << 20  # a status with thousands of regions stays far below


@dataclass(frozen=True, slots=True)
class StopAnswer:
    """The node's answer to a stop request. A refusal lists what would be lost; the node then runs on unchanged."""

    accepted: bool
    would_lose: dict[str, Any]


class Patience:
    """The bound of one wait, and the word about it when it gets long."""

    def __init__(self, wait_s: float, say: Callable[[str], None]) -> None:
        began = time.monotonic()
        self._until, self._say_from = began + wait_s, began + SAY_AFTER_S
        self.wait_s, self._say = wait_s, say
        self._said: set[str] = set()

    def left(self, what: str) -> bool:
        """Sleeps a moment and is true, until the time is over. what: is waited for, in words."""
        now = time.monotonic()
        if now >= self._until:
            return False
        if now >= self._say_from and what not in self._said:
            self._said.add(what)
            self._say(f"{what} (up to {self.wait_s:g} s; --wait sets it)")
        time.sleep(min(_POLL_S, self._until - now))
        return True


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float, strict: bool) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path, self._strict = path, strict

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A connect() with Python's timeout fails at once where the node's queue is full; this one waits its turn.
        self.sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", max(1, int(self.timeout or 0)), 0)
        )
        self.sock.connect(str(self._path))
        self.sock.settimeout(self.timeout)
        # Root may ask anybody's node how it is; other users' commands name exports that data then goes to.
        if self._strict or os.geteuid() != 0:
            trust.check(self.sock, self._path)


class ControlClient:
    """Asks the node behind `path`. Each call makes its own connection and waits at most `timeout_s` seconds a step.

    strict: root, too, asks only a node that it may trust with its data; others always do (UntrustedNode).
    """

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S, *, strict: bool = False) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._strict = strict

    def await_node(self, patience: Patience) -> Self:
        """Returns itself once a node answers that may just have been started. NodeAbsent when the time is over."""
        while True:
            try:
                self.status()
                return self
            except NodeAbsent:
                if not patience.left(f"waiting for a node on {self.path}"):
                    raise

    def status(self) -> dict[str, Any]:
        """The node's status object. Raises NodeUnreachable, PermissionMissing, ProtocolError, the node's own error."""
        return self._ask("GET", "/v1/status")

    def regions(self) -> list[dict[str, Any]]:
        """The regions that the node serves. Raises as `status` does."""
        regions = self._ask("GET", "/v1/regions").get("regions")
        if not isinstance(regions, list):
            raise ProtocolError(f"the answer on {self.path} is not a list of regions")
        return regions

    def exports(self) -> list[dict[str, Any]]:
        """The exports that the node serves. Raises as `status` does."""
        exports = self._ask("GET", "/v1/exports").get("exports")
        if not isinstance(exports, list):
            raise ProtocolError(f"the answer on {self.path} is not a list of exports")
        return exports

    def create_export(
        self,
        name: str,
        size_bytes: int,
        *,
        max_bytes: int | None = None,
        read_only: bool = False,
        swap: bool = False,
        allow: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Makes an export and returns it, with "notes". swap: this machine will swap on it. allow: names of the
        certificates that may use it. Raises as `status` does, Refused where it exists.
        """
        order = {"name": name, "size_bytes": size_bytes, "max_bytes": max_bytes, "read_only": read_only, "swap": swap}
        if allow:  # a node from before does not know it
            order["allow"] = list(allow)
        return self._ask("POST", "/v1/exports", order)

    def change_export(
        self,
        name: str,
        *,
        size_bytes: int | None = None,
        read_only: bool | None = None,
        allow: Sequence[str] | None = None,
        swap: bool | None = None,
    ) -> dict[str, Any]:
        """Lets an export grow, makes it read-only or writable, gives it another allow list or tells whether this
        machine swaps on it, and returns it, with "notes"; None changes nothing.
        Raises as `status` does, Refused where read_only would change while it is in use.
        """
        order: dict[str, Any] = {"size_bytes": size_bytes, "read_only": read_only}
        more = {"allow": None if allow is None else list(allow), "swap": swap}
        order |= {key: value for key, value in more.items() if value is not None}  # an older node knows neither
        return self._ask("PATCH", f"/v1/exports/{quote(name, safe='')}", order)

    def remove_export(self, name: str, *, force: bool = False) -> None:
        """Removes an export with its pages. Raises as `status` does, Refused while it is in use and not forced."""
        self._ask("DELETE", f"/v1/exports/{quote(name, safe='')}?force={int(force)}")

    def stop(self, *, force: bool) -> StopAnswer:
        """Asks the node to stop; returns at once, while an accepting node still stops. Raises as `status` does."""
        status, answer = self._request("POST", "/v1/stop", {"force": force})
        if status == 409:
            return StopAnswer(accepted=False, would_lose=dict(answer.get("would_lose") or {}))
        self._raise_for(status, answer)
        return StopAnswer(accepted=True, would_lose=dict(answer.get("would_lose") or {}))

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, answer = self._request(method, path, body)
        self._raise_for(status, answer)
        return answer

    def _raise_for(self, status: int, answer: dict[str, Any]) -> None:
        if status == 200:
            return
        message = str(answer.get("message") or f"HTTP status {status}")
        error: RamsterError = from_code(
            str(answer.get("error") or "protocol"), f"the node on {self.path} says: {message}"
        )
        raise error

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        connection = _UnixConnection(self.path, self._timeout_s, self._strict)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body),
                headers={"Content-Type": "application/json", "Connection": "close"},
            )
            answer = connection.getresponse()
            data = answer.read(_ANSWER_BYTES_MAX)
        except FileNotFoundError:
            raise NodeAbsent(
                f"no node answers on {self.path}: there is no such socket; "
                "start one with `ramster node --config FILE`, or name another with --socket or --config"
            ) from None
        except ConnectionRefusedError:
            raise NodeAbsent(
                f"no node answers on {self.path}: the socket is left over from a node that is gone; "
                "start it again with `ramster node --config FILE`"
            ) from None
        except PermissionError:
            raise PermissionMissing(
                f"this user may not use {self.path}; "
                "run the command as the node's user or as a member of the socket's group"
            ) from None
        except (TimeoutError, BlockingIOError):
            raise NodeUnreachable(
                f"the node on {self.path} gave no answer within {self._timeout_s:g} s; "
                "it may be overloaded or suspended, try again"
            ) from None
        except (OSError, http.client.HTTPException, MemoryError) as error:
            if (limit := limits.reached(error, f"ask the node on {self.path}")) is not None:
                raise limit from None
            raise NodeUnreachable(
                f"the connection to {self.path} failed ({str(error) or type(error).__name__}); "
                "see the node's log, then try again"
            ) from None
        finally:
            connection.close()
        try:
            decoded = json.loads(data)
        except ValueError:
            decoded = None
        if not isinstance(decoded, dict):
            raise ProtocolError(f"what answers on {self.path} is not a RAMster node")
        return answer.status, decoded
