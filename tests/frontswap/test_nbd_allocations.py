"""From receiving a write to acknowledging it, the connection's thread asks the kernel for no memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from ramster.constants import PAGE_BYTES
from ramster.engine.links import Links
from ramster.engine.store import Store
from ramster.testing.allocations import MemoryCalls, minor_faults
from ramster.testing.nbd import NbdClient, ServedExport

PAGES = 1 << 20
STRIDE = 512 * PAGE_BYTES  # the next page of the page table
CONTENT = os.urandom(2048) + bytes(2048)

pytestmark = pytest.mark.skipif("san" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer allocates by itself")


@pytest.fixture
def export() -> Iterator[ServedExport]:
    store = Store(32 << 20, segment_bytes=65536, lock=False)
    links = Links(store, 1, lock=False)
    made = ServedExport(links, PAGES)
    store.populate(made.pool, PAGES)
    yield made
    made.close()
    links.stop()
    store.close()


def connect(export: ServedExport) -> tuple[NbdClient, int]:
    """A client, and the thread that serves it."""
    before = {thread.native_id for thread in threading.enumerate()}
    client = export.connect()
    (tid,) = (thread.native_id for thread in threading.enumerate() if thread.native_id not in before)
    assert tid is not None
    return client, tid


def write(client: NbdClient, first: int, count: int) -> None:
    """Single pages, a run, a part of a page: each where the page table was never used."""
    for turn in range(first, first + count):
        client.write(turn * STRIDE, CONTENT)
    client.write((first + count) * STRIDE, CONTENT * 64)
    client.write((first + count + 1) * STRIDE + 100, b"part of a page")


def test_a_write_faults_no_page_in(export: ServedExport) -> None:
    client, tid = connect(export)
    write(client, 0, 100)  # brings in the thread's stack and the code
    before = minor_faults(tid)
    write(client, 200, 1000)
    assert minor_faults(tid) - before == 0


def test_a_write_makes_no_memory_call(export: ServedExport) -> None:
    client, tid = connect(export)
    write(client, 0, 100)
    calls = MemoryCalls(os.getpid())
    try:
        with calls:
            write(client, 200, 500)
    except (FileNotFoundError, PermissionError) as error:
        pytest.skip(str(error))
    assert calls.of(tid) == []
