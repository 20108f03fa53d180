"""The node's side of the holder: the process that keeps the arena in RAM when the node has died.

When a node is killed and its arena goes with it, the next node needs as much memory again, of a machine that has just
lost its swap device. So a small process (`holder_main.py`) makes, touches and locks the arena, and lends it to one node
after the other. What a node had stored is not read again by the next one: its tables died with it. What is kept is the
memory.

The holder ends with an orderly stop of the node, on `end`, and when no node has used it for `[arena] keep`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ramster.config.units import show_size
from ramster.engine._store import memory_available
from ramster.errors import PermissionMissing, PortTaken, RamsterError, StoreFull
from ramster.frontswap import trust
from ramster.node import holder_main
from ramster.node.privileges import Check

log = logging.getLogger(__name__)

HOLDER_SOCKET: Final = "arena.sock"
ANSWER_S: Final = 10.0  # a holder does nothing but answer
BYTES_PER_S: Final = 100 << 20  # a slow machine that finds, clears and locks memory
PACKET_BYTES: Final = holder_main.PACKET_BYTES


@dataclass
class KeptArena:
    """An arena that outlives this process.

    A context manager around the node's life: an orderly end ends the holder too; a start that fails does so only if it
    was this start that brought the holder up.
    """

    descriptor: int
    connection: socket.socket
    pid: int
    arena_bytes: int
    segment_bytes: int
    locked: bool
    spared: bool
    reused: bool

    def check(self) -> Check:
        """For the guard's report."""
        held = f"process {self.pid} keeps {show_size(self.arena_bytes)}"
        if not self.locked:
            return Check(
                "holder",
                "refused",
                f"{held}, but not locked: they may be swapped out while no node runs",
                "LimitMEMLOCK=infinity or AmbientCapabilities=CAP_IPC_LOCK in the node's unit, and [arena] lock",
            )
        return Check("holder", "ok", f"{held} locked" + ("" if self.spared else "; the OOM killer may take it"))

    def release(self, end: bool) -> None:
        """Let go of the arena: it stays for the next node, or ends now, which is waited for."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)
        if end:
            _end(self.connection)
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(end=error is None or not self.reused)


def take(run_dir: Path, arena_bytes: int, segment_bytes: int, lock: bool, keep_ms: int) -> KeptArena:
    """The arena of the holder that runs for this directory, if it fits; else of a new one.

    PortTaken: another node uses it. StoreFull: there is not that much memory.
    """
    path = (run_dir / HOLDER_SOCKET).absolute()
    trust.require_own_folder(path.parent)
    found = _ask(path, ANSWER_S)
    if found is not None:
        if (found.arena_bytes, found.segment_bytes) == (arena_bytes, segment_bytes):
            log.info("the arena of %s is the one that process %d has kept", show_size(arena_bytes), found.pid)
            return found
        log.info(
            "process %d has kept an arena of %s for this directory, which is not what [arena] says now: it goes",
            found.pid,
            show_size(found.arena_bytes),
        )
        found.release(end=True)
    if arena_bytes > (available := memory_available()):
        raise StoreFull(
            f"cannot reserve an arena of {arena_bytes >> 20} MiB: {available >> 20} MiB of memory are available"
        )
    _start(path, arena_bytes, segment_bytes, lock, keep_ms)
    made = _ask(path, ANSWER_S + arena_bytes / BYTES_PER_S)
    if made is None:
        raise RamsterError("the holder of the arena ended as soon as it was started")
    made.reused = False
    return made


def end(run_dir: Path) -> bool:
    """End the holder of this directory and wait for it. False: there is none. PortTaken: a node uses it."""
    found = _ask((run_dir / HOLDER_SOCKET).absolute(), ANSWER_S)
    if found is None:
        return False
    found.release(end=True)
    return True


def _ask(path: Path, wait_s: float) -> KeptArena | None:
    """The arena of the holder behind `path`; None where there is no holder."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(wait_s)
        try:
            connection.connect(str(path))
            trust.check(connection, path)  # what it lends becomes our arena
            connection.send(b"take")
            packet, descriptors, _, _ = socket.recv_fds(connection, PACKET_BYTES, 1)
        except (FileNotFoundError, ConnectionError):
            packet = b""
        except TimeoutError:
            raise RamsterError(
                f"the holder of the arena does not answer at {path}; end the process that listens there"
            ) from None
        except PermissionError:
            raise PermissionMissing(f"{path} is another user's; set another run_dir in [node]") from None
        if not packet:
            connection.close()
            return None
        said: dict[str, Any] = json.loads(packet)
        if "busy" in said:
            raise PortTaken(
                f"another node, process {said['busy']}, already serves in {path.parent}; stop it or give this node its "
                "own run_dir in [node]"
            )
        if "error" in said:
            raise StoreFull(f"cannot reserve the arena ({said['error']}): make it smaller")
    except BaseException:
        connection.close()
        raise
    return KeptArena(descriptors[0], connection, reused=True, **said)


def _start(path: Path, arena_bytes: int, segment_bytes: int, lock: bool, keep_ms: int) -> None:
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        arguments = (listener.fileno(), arena_bytes, segment_bytes, int(lock), keep_ms / 1000)
        # Its own session, no terminal, no pipe of ours: it must outlive all of them. -I -S: the smallest interpreter.
        subprocess.Popen(
            [sys.executable, "-I", "-S", holder_main.__file__, *map(str, arguments)],
            pass_fds=(listener.fileno(),),
            start_new_session=True,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode = 0  # nobody waits for it


def _end(connection: socket.socket) -> None:
    """Tell it, and wait for the end of the connection."""
    with contextlib.suppress(OSError):
        connection.settimeout(ANSWER_S)
        connection.send(b"end")
        while connection.recv(PACKET_BYTES):
            pass
