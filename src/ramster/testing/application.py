"""A program with one region that does what it is told on stdin.

`python -m ramster.testing.application SOCKET PAGES RESIDENT`: each line is a JSON list of a command and its arguments,
ranges in pages; the answer is one line of JSON on stdout. Every page holds bytes that follow from its number and
version, so that a wrong, old or empty one is found by looking.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

import ramster
from ramster.constants import PAGE_BYTES
from ramster.errors import RamsterError, RegionLost


def content(page: int, version: int) -> bytes:
    """Half of it compresses; no two are equal, and none is zeros."""
    return random.Random(page * 1000 + version).randbytes(PAGE_BYTES // 2) + bytes([1 + page % 255]) * (PAGE_BYTES // 2)


class Program:
    """The commands."""

    def __init__(self, socket: str, pages: int, resident: int) -> None:
        self.region = ramster.connect(socket).region(pages * PAGE_BYTES, resident=resident * PAGE_BYTES, name="program")
        self.view = memoryview(self.region)
        self.versions = dict.fromkeys(range(pages), -1)

    def write(self, first: int, count: int, version: int = 0) -> int:
        for page in range(first, first + count):
            self.view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = content(page, version)
            self.versions[page] = version
        return count

    def wrong(self, first: int, count: int) -> list[int]:
        """Pages that do not hold what was written last, zeros where nothing was."""
        return [
            page
            for page in range(first, first + count)
            if self.view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] != self._expected(page)
        ]

    def _expected(self, page: int) -> bytes:
        version = self.versions[page]
        return content(page, version) if version >= 0 else bytes(PAGE_BYTES)

    def wrong_in_threads(self, first: int, count: int, threads: int) -> list[int]:
        """As `wrong`, with so many threads that fault at the same time: pwrite reads the pages without the GIL."""
        share = -(-count // threads)
        copy = os.memfd_create("copy", os.MFD_CLOEXEC)

        def read(begin: int) -> None:
            for page in range(begin, min(begin + share, first + count)):
                os.pwrite(copy, self.view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES], page * PAGE_BYTES)

        readers = [threading.Thread(target=read, args=(begin,)) for begin in range(first, first + count, share)]
        for each in readers:
            each.start()
        for each in readers:
            each.join()
        found = [
            page
            for page in range(first, first + count)
            if os.pread(copy, PAGE_BYTES, page * PAGE_BYTES) != self._expected(page)
        ]
        os.close(copy)
        return found

    def wrong_of(self, pages: list[int]) -> list[int]:
        return [page for page in pages if self.wrong(page, 1)]

    def check(self, first: int, count: int) -> list[tuple[int, int]]:
        """Runs of lost pages."""
        try:
            self.region.check(_bytes(first, count))
        except RegionLost as error:
            return error.runs
        return []

    def prefetch(self, first: int, count: int) -> int:
        return self.region.prefetch(_bytes(first, count)) // PAGE_BYTES

    def evict(self, first: int, count: int) -> int:
        return self.region.evict(_bytes(first, count)) // PAGE_BYTES

    def statistics(self) -> dict[str, Any]:
        return dataclasses.asdict(self.region.statistics())

    def close(self) -> bool:
        self.view.release()
        self.region.close()
        return True


def _bytes(first: int, count: int) -> tuple[int, int]:
    return first * PAGE_BYTES, (first + count) * PAGE_BYTES


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    program = Program(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    commands: dict[str, Callable[..., Any]] = {
        name: getattr(program, name)
        for name in (
            "write",
            "wrong",
            "wrong_of",
            "wrong_in_threads",
            "check",
            "prefetch",
            "evict",
            "statistics",
            "close",
        )
    }
    _answer("ready")
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            _answer(commands[command](*arguments))
        except RamsterError as error:
            _answer({"error": error.code, "message": str(error), "runs": getattr(error, "runs", [])})


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
