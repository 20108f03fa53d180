"""The shell around the policy goes on, whatever one look meets."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import pytest

from ramster.remotify.policy import Policy, Settings
from ramster.remotify.worker import Worker, spill_trouble


class Store:
    """As much of a store as a look needs, with nothing in it."""

    def __init__(self) -> None:
        self.pressure_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def pressure_handled(self) -> None: ...

    def frames(self) -> tuple[int, int]:
        return 8, 8

    def coldest(self, most: int) -> list[Any]:
        return []


class Links:
    """Fails at the first looks, in two ways, then shows nobody."""

    def __init__(self, done: asyncio.Event) -> None:
        self.looks = 0
        self.done = done

    def lenders(self) -> list[Any]:
        self.looks += 1
        if self.looks <= 5:
            raise OverflowError("can't convert negative value") if self.looks < 4 else MemoryError("no room")
        self.done.set()
        return []

    def shipping(self) -> int:
        return 0


def test_a_look_that_fails_is_said_once_and_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> Worker:
        store, links = Store(), Links(asyncio.Event())
        worker = Worker(store, links, Policy(Settings(cold_after_ms=0)), 5)  # type: ignore[arg-type]
        task = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(20):
                await links.done.wait()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            os.close(store.pressure_fd)
        return worker

    worker = asyncio.run(run())
    assert worker.decisions >= 1
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True, True]


HERE, NO_COPY = "pages stay in the arena", "what goes to lenders has no copy there"


@pytest.mark.parametrize(
    ("works", "reads_failed", "room", "mirror", "said"),
    [
        (True, False, True, False, ""),
        (True, False, True, True, ""),
        (False, False, True, False, f"why; {HERE}"),
        (False, False, True, True, f"why; {NO_COPY}"),
        (True, True, True, False, "reading failed (why); pages that lie there cannot be had"),
        (True, True, True, True, "reading failed (why); pages whose lender is away cannot be had"),
        (False, True, True, False, f"why; {HERE}"),
        (True, False, False, False, f"it is full; {HERE}"),
        (False, True, False, False, f"it is full; {HERE}"),
        (True, False, False, True, ""),  # copies that find no room are counted and said apart
        (False, False, False, True, f"why; {NO_COPY}"),
        (True, True, False, True, "reading failed (why); pages whose lender is away cannot be had"),
    ],
)
def test_what_is_said_of_a_spill_file(works: bool, reads_failed: bool, room: bool, mirror: bool, said: str) -> None:
    assert spill_trouble(works, reads_failed, room, mirror, "why") == said
