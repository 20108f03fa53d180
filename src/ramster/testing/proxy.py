"""A TCP proxy on loopback that does to a link what cables, switches and hostile middlemen do.

Covers cutting, holding (a half-open link), delay, throttling, corruption and refusal, separately for each direction.
Does not look into what it forwards: with TLS it could not.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

CHUNK_BYTES: Final = 65536
CONNECT_S: Final = 5.0


class Direction:
    """What happens to bytes of all connections in one direction. `bytes` counts those that were passed on."""

    def __init__(self) -> None:
        self.bytes = 0
        self._changed = threading.Condition()
        self._held = False
        self._delay_s = 0.0
        self._rate: float | None = None
        self._corrupt_after: int | None = None

    def hold(self) -> None:
        """From now on nothing is passed on and nothing closed: a link that is half open. Bytes wait, none is lost."""
        self._held = True

    def release(self) -> None:
        """Pass on what waited and what comes."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold inside the block, release after it."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def delay(self, seconds: float) -> None:
        """Each chunk is passed on so much later; 0 ends it."""
        self._delay_s = seconds

    def throttle(self, bytes_per_second: float | None) -> None:
        """At most so many bytes a second for each connection; None ends it."""
        self._rate = bytes_per_second

    def corrupt(self, after: int = 0) -> None:
        """Flip one bit, once: in the byte that comes after so many."""
        with self._changed:
            self._corrupt_after = after

    def _pass(self, data: bytearray, link: _Link) -> bool:
        """Wait as told and spoil what is to be spoiled; False once the link was cut meanwhile."""
        pause = self._delay_s + (len(data) / self._rate if self._rate else 0.0)
        if pause and link.cut.wait(pause):
            return False
        with self._changed:
            while (self._held or link.frozen) and not link.cut.is_set():
                self._changed.wait()
            if self._corrupt_after is not None:
                if self._corrupt_after < len(data):
                    data[self._corrupt_after] ^= 0x10
                    self._corrupt_after = None
                else:
                    self._corrupt_after -= len(data)
            self.bytes += len(data)
        return not link.cut.is_set()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Link:
    """One forwarded connection: two sockets, two threads."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.cut = threading.Event()
        self.frozen = False
        self.threads: list[threading.Thread] = []

    def shut(self) -> None:
        self.cut.set()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Listens on a free port of 127.0.0.1 and forwards each connection to `target`, from the start until `close`.

    `up` is the direction from whoever connects to the target, `down` the other one. `accepted` counts connections.
    back: where whoever connects can be connected to itself, by way of `back_address`. That is the same cable: what is
    done to one is done to both, and `up` is the same direction. Not counted.
    """

    def __init__(self, target: tuple[str, int], back: tuple[str, int] | None = None) -> None:
        self.target = target
        self.up = Direction()
        self.down = Direction()
        self.accepted = 0
        self.refused = 0
        self._refusing = False
        self._closed = False
        self._links: list[_Link] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        ways = [(self._listener, target, self.up, self.down)]
        if back is not None:
            listener = socket.create_server(("127.0.0.1", 0))
            self.back_address: tuple[str, int] = listener.getsockname()[:2]
            ways.append((listener, back, self.down, self.up))
        self._listeners = [way[0] for way in ways]
        self._threads = [threading.Thread(target=self._accept, args=way, name="proxy", daemon=True) for way in ways]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        """Close every connection that there is now; new ones are served."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.shut()
        self.up._wake()
        self.down._wake()
        for link in links:
            for thread in link.threads:
                thread.join()

    def freeze(self) -> None:
        """Nothing passes any more on the connections that there are now, nor closes them; new ones are served."""
        with self._lock:
            for link in self._links:
                link.frozen = True

    def refuse(self, refusing: bool = True) -> None:
        """Close new connections at once, until told otherwise. Those that exist stay."""
        self._refusing = refusing

    def hold(self) -> None:
        """Both directions: see Direction.hold."""
        self.up.hold()
        self.down.hold()

    def release(self) -> None:
        """Both directions: see Direction.release."""
        self.up.release()
        self.down.release()

    def close(self) -> None:
        """Cut everything and stop listening; returns when no thread is left. Again: does nothing."""
        if self._closed:
            return
        self._closed = True
        for listener, thread in zip(self._listeners, self._threads, strict=True):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()
        self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, listener: socket.socket, target: tuple[str, int], forth: Direction, back: Direction) -> None:
        counted = listener is self._listener
        while not self._closed:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if self._refusing:
                self.refused += counted
                client.close()
                continue
            try:
                server = socket.create_connection(target, CONNECT_S)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server)
            link.threads = [
                threading.Thread(target=self._pump, args=(link, client, server, forth), daemon=True),
                threading.Thread(target=self._pump, args=(link, server, client, back), daemon=True),
            ]
            with self._lock:
                self._links.append(link)
                self.accepted += counted
            for thread in link.threads:
                thread.start()
            threading.Thread(target=self._reap, args=(link,), daemon=True).start()

    def _pump(self, link: _Link, source: socket.socket, sink: socket.socket, way: Direction) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(CHUNK_BYTES):
                data = bytearray(received)
                if not way._pass(data, link):
                    break
                sink.sendall(data)
        # What the other direction still carries may arrive: a refusal, for example.
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _reap(self, link: _Link) -> None:
        for thread in link.threads:
            thread.join()
        for sock in link.sockets:
            sock.close()
        with self._lock, contextlib.suppress(ValueError):
            self._links.remove(link)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = 20.0) -> None:
    """Look again and again until `condition()` is true; AssertionError names `what` once the deadline has passed."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.002)
