"""The holder: a process that keeps a node's arena in RAM while no node runs.

Started by the node as `python -I -S holder_main.py LISTENER ARENA_BYTES SEGMENT_BYTES LOCK KEEP_S`, with the listening
socket as an inherited descriptor; `holder.py` beside it is the node's side. It makes the arena, touches and locks it,
and hands its descriptor to whoever asks; then it waits. It ends when it is told to, when nobody has used the arena for
KEEP_S seconds, or when it cannot make the arena. Only the standard library, and little of it, for the sake of its size.

Messages are one packet each. Asked "take", it says {"arena_bytes", "segment_bytes", "locked", "spared", "pid"} and
hands over the descriptor, or says {"error"}; the connection counts as the node's life: while it is open, others are
told {"busy": pid}. Asked "end", it ends, and with it the connection.
"""

import contextlib
import ctypes
import json
import mmap
import os
import select
import socket
import struct
import sys
import time

PACKET_BYTES = 4096
MCL_CURRENT, MCL_ONFAULT = 1, 4
ASKED_S = 5.0  # for a visitor to say what it wants
VISITORS_MAX = 16


class Holder:
    def __init__(
        self, listener: socket.socket, arena_bytes: int, segment_bytes: int, lock: bool, keep_s: float
    ) -> None:
        self.listener = listener
        self.keep_s = keep_s
        self.about: dict[str, object] = {
            "arena_bytes": arena_bytes,
            "segment_bytes": segment_bytes,
            "pid": os.getpid(),
            "spared": spare_from_oom(),
        }
        self.arena = os.memfd_create("ramster-arena", os.MFD_CLOEXEC)
        os.posix_fallocate(self.arena, 0, arena_bytes)
        self.mapping = mmap.mmap(self.arena, arena_bytes)
        self.mapping.madvise(mmap.MADV_DONTDUMP)
        self.about["locked"] = lock and lock_mapping(self.mapping, arena_bytes)
        self.node: socket.socket | None = None
        self.node_pid = 0
        self.visitors: dict[socket.socket, float] = {}

    def run(self) -> None:
        """Until "end", or KEEP_S seconds without a node."""
        alone_since = time.monotonic()
        while True:
            now = time.monotonic()
            for late in [each for each, until in self.visitors.items() if until <= now]:
                self.forget(late)
            if self.node is not None:
                alone_since = now
            elif now - alone_since >= self.keep_s:
                return
            until = min([ASKED_S, *([] if self.node else [alone_since + self.keep_s - now])])
            # The node first: its end is seen before the order of the next one, which came later.
            watched = [*([self.node] if self.node else []), *self.visitors, self.listener]
            for ready in select.select(watched, [], [], max(until, 0.01))[0]:
                if ready is self.listener:
                    self.welcome()
                elif not self.answer(ready):
                    return

    def welcome(self) -> None:
        visitor, _ = self.listener.accept()
        uid = struct.unpack("3i", visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in (0, os.geteuid()) or len(self.visitors) >= VISITORS_MAX:
            visitor.close()
            return
        visitor.setblocking(False)
        self.visitors[visitor] = time.monotonic() + ASKED_S

    def answer(self, asker: socket.socket) -> bool:
        """False once this process is to end."""
        try:
            order = asker.recv(PACKET_BYTES)
            if order == b"end":
                return False
            if order == b"take" and asker is not self.node:
                if self.node is not None:
                    self.say(asker, {"busy": self.node_pid})
                    self.forget(asker)
                    return True
                self.say(asker, self.about, self.arena)
                self.visitors.pop(asker)
                self.node = asker
                self.node_pid = struct.unpack("3i", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                return True
        except OSError:
            pass
        self.forget(asker)
        return True

    def forget(self, asker: socket.socket) -> None:
        if asker is self.node:
            self.node = None
        self.visitors.pop(asker, None)
        asker.close()

    @staticmethod
    def say(asker: socket.socket, what: dict[str, object], descriptor: int | None = None) -> None:
        socket.send_fds(asker, [json.dumps(what).encode()], [] if descriptor is None else [descriptor])


def spare_from_oom() -> bool:
    """The whole arena counts as this process's memory, and killing it would free none of it."""
    try:
        score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(score, b"-1000")
    except OSError:
        return False
    finally:
        os.close(score)
    return True


def lock_mapping(mapping: mmap.mmap, size: int) -> bool:
    libc = ctypes.CDLL(None)
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    locked = libc.mlock(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), size) == 0
    libc.mlockall(MCL_CURRENT | MCL_ONFAULT)  # this process's own few pages, where the limit has room for them
    return bool(locked)


def main(arguments: list[str]) -> int:
    descriptor, arena_bytes, segment_bytes, lock = (int(each) for each in arguments[:4])
    listener = socket.socket(fileno=descriptor)
    path = listener.getsockname()
    try:
        holder = Holder(listener, arena_bytes, segment_bytes, bool(lock), float(arguments[4]))
    except OSError as error:
        asker, _ = listener.accept()  # the node that started it asks at once
        remove(path)
        asker.recv(PACKET_BYTES)
        Holder.say(asker, {"error": error.strerror or str(error)})
        return 1
    try:
        holder.run()
    finally:
        remove(path)
        holder.mapping.close()
        os.close(holder.arena)  # all is given back before the asker sees the end of its connection
    return 0


def remove(path: str) -> None:
    with contextlib.suppress(OSError):  # its directory is gone
        os.unlink(path)  # noqa: PTH108 - pathlib would be a tenth of this process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
