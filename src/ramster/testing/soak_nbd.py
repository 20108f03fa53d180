"""A client of the soak's exports: every byte of a device is verified whenever it is read, until stdin is closed.

`python -m ramster.testing.soak_nbd SOCKET EXPORT SEED CONNECTIONS`. Each connection has a stretch of the device of its
own; the stretches meet inside pages, so that two connections write parts of one page. Reads, writes, zeroes and trims
of any length at any offset, several in flight at a time, against a byte array. One line of JSON on stdout now and then.
Exit status 0: every byte was right to the end; 3: a wrong byte, or a request failed, and the last line says which.
"""

from __future__ import annotations

import json
import random
import resource
import select
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Final

from ramster.constants import PAGE_BYTES
from ramster.testing.nbd import NbdClient
from ramster.testing.nbd_handshake import Dialled
from ramster.wire.nbd import Command

IN_FLIGHT: Final = 12
TURNS_PER_LINE: Final = 50
_lock = threading.Lock()


class WrongBytes(Exception):
    """Bytes that are not those written last."""


def say(**what: Any) -> None:
    with _lock:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


class Stretch(threading.Thread):
    """One connection and the bytes `first` to `end` of the device, which are its own."""

    def __init__(self, client: NbdClient, first: int, end: int, seed: int) -> None:
        super().__init__()
        self._client = client
        self._first = first
        self._model = bytearray(end - first)
        self._dice = random.Random(seed)
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self._requests = 0
        self._bytes = 0

    def run(self) -> None:
        try:
            self._client.zero(self._first, len(self._model))  # whoever was here before was killed
            turns = 0
            while not self.stop.is_set():
                self._dice.choice([self._reads, self._reads, self._writes, self._writes, self._clear])()
                turns += 1
                if turns % TURNS_PER_LINE == 0:
                    self._report()
            for at in range(0, len(self._model), 1 << 18):
                self._compare(at, self._client.read(self._first + at, min(1 << 18, len(self._model) - at)))
            self._report()
            self._client.send(Command.DISC)
        except BaseException as error:
            self.failure = error
            say(failed=f"{type(error).__name__}: {error}", trace=traceback.format_exc())

    def _report(self) -> None:
        say(requests=self._requests, device_bytes=self._bytes)
        self._requests = self._bytes = 0

    def _range(self) -> tuple[int, int]:
        """(offset in the stretch, length): whole pages as a rule, as a kernel asks."""
        dice = self._dice
        length = dice.choice([PAGE_BYTES, PAGE_BYTES, dice.randrange(1, 9) * PAGE_BYTES, dice.randrange(1, 70_000)])
        at = dice.randrange(max(1, len(self._model) - length))
        if length % PAGE_BYTES == 0:
            at -= (self._first + at) % PAGE_BYTES
        at = max(0, at)
        return at, min(length, len(self._model) - at)

    def _compare(self, at: int, data: bytes | bytearray) -> None:
        self._requests += 1
        self._bytes += len(data)
        if data != self._model[at : at + len(data)]:
            wrong = next(n for n, (a, b) in enumerate(zip(data, self._model[at:], strict=False)) if a != b)
            raise WrongBytes(f"byte {self._first + at + wrong} of a read of {len(data)} at {self._first + at}")

    def _reads(self) -> None:
        asked = [(*self._range(), 0) for _ in range(self._dice.randrange(1, IN_FLIGHT))]
        asked = [(at, length, self._client.send(Command.READ, self._first + at, length)) for at, length, _ in asked]
        for at, length, cookie in asked:
            found = self._client.wait(cookie)
            if found.error:
                raise OSError(found.error, f"read of {length} at {self._first + at}")
            self._compare(at, found.data)

    def _writes(self) -> None:
        """Several in flight, none of which overlaps another: their order would be anybody's guess."""
        taken: list[tuple[int, int]] = []
        cookies = []
        for _ in range(self._dice.randrange(1, IN_FLIGHT)):
            at, length = self._range()
            if any(at < end and begin < at + length for begin, end in taken):
                continue
            taken.append((at, at + length))
            half = (length + 1) // 2  # that much of it does not compress
            data = (self._dice.randbytes(half) + bytes([self._dice.randrange(256)]) * half)[:length]
            self._model[at : at + length] = data
            cookies.append(self._client.send(Command.WRITE, self._first + at, length, payload=data))
        for cookie in cookies:
            self._finish(cookie, "write")

    def _clear(self) -> None:
        at, length = self._range()
        if self._dice.random() < 0.5:
            self._model[at : at + length] = bytes(length)
            self._finish(self._client.send(Command.WRITE_ZEROES, self._first + at, length), "write zeroes")
            return
        first = -(-(self._first + at) // PAGE_BYTES) * PAGE_BYTES - self._first
        end = (self._first + at + length) // PAGE_BYTES * PAGE_BYTES - self._first
        if first < end:  # whole pages go, their neighbours' bytes stay
            self._model[first:end] = bytes(end - first)
        self._finish(self._client.send(Command.TRIM, self._first + at, length), "trim")

    def _finish(self, cookie: int, what: str) -> None:
        self._requests += 1
        if error := self._client.wait(cookie).error:
            raise OSError(error, f"{what} failed")


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    socket, export, (seed, connections) = Path(sys.argv[1]), sys.argv[2], map(int, sys.argv[3:5])
    dialled = [Dialled(socket) for _ in range(connections)]
    clients = [each.go(export) for each in dialled]
    size = dialled[0].size
    dice = random.Random(seed)
    # Between pages' ends, so that neighbours share the page where they meet.
    cuts = [0, *(size * n // connections + dice.randrange(1, PAGE_BYTES) for n in range(1, connections)), size]
    stretches = [Stretch(client, cuts[n], cuts[n + 1], seed * 100 + n) for n, client in enumerate(clients)]
    for stretch in stretches:
        stretch.start()
    say(started=connections)
    while all(stretch.is_alive() for stretch in stretches):
        if select.select([sys.stdin], [], [], 0.1)[0]:
            break  # closed: time to end
    for stretch in stretches:
        stretch.stop.set()
    for stretch in stretches:
        stretch.join()
    if any(stretch.failure is not None for stretch in stretches):
        sys.exit(3)
    say(ended=True)


if __name__ == "__main__":
    main()
