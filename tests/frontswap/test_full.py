"""Room that runs out: what a region may outgrow is said when it is made, and what a write does then is its choice."""

import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.frontswap.conftest import DEADLINE, Engines

from ramster.frontswap import messages
from ramster.frontswap.capacity import Capacity, decode, of_tiers, outgrows

MIB = 1 << 20

ROOM = Capacity(arena_free_bytes=32 * MIB, lenders=1, lenders_free_bytes=512 * MIB)


def measured(put: int, compressed: int) -> Capacity:
    return replace(ROOM, put_bytes=put, put_compressed_bytes=compressed)


@pytest.mark.parametrize(
    ("beyond", "room", "said"),
    [
        (0, Capacity(), None),
        (544 * MIB, ROOM, None),
        (544 * MIB + 1, ROOM, "544 MiB compressed"),
        (
            1 << 40,
            ROOM,
            "1 TiB beyond its RAM, and there is room for 544 MiB compressed (arena 32 MiB, 1 lender 512 MiB)",
        ),
        (1 << 40, ROOM, "compress 1927.5:1"),
        (1, Capacity(), "no lender has room"),
        (1, Capacity(), "room for 0 B"),
        (MIB, Capacity(spill_bytes=2 * MIB, spill_free_bytes=MIB), None),
        (2 * MIB, Capacity(spill_bytes=2 * MIB, spill_free_bytes=MIB), "spill file 1 MiB"),
        # A full file gives up copies for pages: what lenders have is room beside it.
        (
            2 * MIB,
            Capacity(lenders_free_bytes=9 * MIB, spill_bytes=MIB, spill_free_bytes=MIB, spill_mirror=True),
            None,
        ),
        # What was measured counts, once it is enough, and no more of it than is sound.
        (1000 * MIB, measured(64 * MIB - 1, 16 * MIB), "too little stored so far"),
        (1000 * MIB, measured(64 * MIB, 32 * MIB), None),
        (1088 * MIB + 1, measured(64 * MIB, 32 * MIB), "1.06 GiB of pages that compress as those so far (2.0:1)"),
        (4 * 544 * MIB, measured(64 * MIB, 0), None),
        (4 * 544 * MIB + 1, measured(64 * MIB, 0), "compress 4.0:1"),
        (544 * MIB, measured(64 * MIB, 66 * MIB), "528 MiB of pages that compress as those so far (1.0:1)"),
        (1, replace(measured(64 * MIB, 16 * MIB), arena_free_bytes=0, lenders_free_bytes=0), "room for 0 B"),
        # Two that fit alone and not together: the second is told.
        (
            300 * MIB,
            replace(ROOM, regions_bytes=600 * MIB),
            "other regions 300 MiB more, and there is room for 544 MiB",
        ),
        (300 * MIB, replace(ROOM, regions_bytes=600 * MIB), "compress 1.1:1"),
        (300 * MIB, replace(ROOM, regions_bytes=544 * MIB), None),
        # What is stored already takes no room again.
        (300 * MIB, replace(ROOM, regions_bytes=600 * MIB, stored_bytes=56 * MIB), None),
        (300 * MIB, replace(ROOM, regions_bytes=600 * MIB, stored_bytes=900 * MIB), None),
        # One that outgrows it all was told itself; a small one after it is not.
        (MIB, replace(ROOM, regions_bytes=1 << 40), None),
        (545 * MIB, replace(ROOM, regions_bytes=1 << 40), "beyond its RAM, and there is room"),
    ],
)
def test_a_region_that_may_outgrow_what_there_is(beyond: int, room: Capacity, said: str | None) -> None:
    for full, end in (
        ("fail", 'is SIGBUS. See Client.capacity(); full="wait"'),
        ("wait", "waits, and is SIGBUS after"),
    ):
        text = outgrows(beyond, room, full)
        if said is None:
            assert text is None
        else:
            assert text is not None and said in text and end in text


def test_what_the_tiers_can_take() -> None:
    arena = {"segment_bytes": MIB, "frames_total": 10, "live_bytes": 3 * MIB}
    arena |= {"pages_stored": 2, "bytes_in": 3, "bytes_compressed": 1}
    granted = [5, 0]
    assert decode(of_tiers(arena, granted, None)) == Capacity(
        arena_bytes=10 * MIB, arena_free_bytes=7 * MIB, lenders=1, lenders_free_bytes=5 * MIB, stored_bytes=8192,
        put_bytes=3, put_compressed_bytes=1,
    )  # fmt: skip
    spill = {"bytes_total": 8 * MIB, "bytes_used": 2 * MIB, "mirror": True}
    found = decode({**of_tiers(arena, granted, spill), "of another version": 5})
    assert (found.spill_free_bytes, found.spill_mirror, found.free_bytes) == (6 * MIB, True, 18 * MIB)
    # As it goes over the socket.
    said = messages.encode(messages.Reply(ok=True, capacity=of_tiers(arena, granted, spill)))
    assert decode(messages.decode_reply(said).capacity) == found


def test_a_warning_when_it_is_made(engines: Callable[..., Engines]) -> None:
    node = engines(arena_bytes=8 * MIB)
    agent = node.agent("import warnings\n")
    agent.run("""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small = client.region("4MiB", resident="1MiB")
            assert not caught
            large = client.empty((1 << 40,), "u1", resident="1MiB")
        (only,) = caught
        assert only.category is ramster.CapacityWarning and "1 TiB" in str(only.message), caught
        assert only.filename == "<string>", only.filename
    """)
    found: dict[str, Any] = agent.ask("vars(client.capacity())")
    assert found["arena_bytes"] == node.store.statistics().arena_bytes >= found["arena_free_bytes"] > 7 * MIB
    assert found["lenders"] == 0 == found["spill_bytes"]
    assert found["regions_bytes"] == 3 * MIB + (1 << 40) - MIB and found["resident_reserved_bytes"] == 2 * MIB
    agent.run("del large; small.close(); gc.collect()")
    end = time.monotonic() + DEADLINE
    while agent.ask("client.capacity().regions_bytes"):
        assert time.monotonic() < end


FILL = textwrap.dedent("""
    region = client.region(24 << 20, resident=64 * PAGE, name="filled", full={full!r})
    a = region.array((region.nbytes // PAGE, 512), np.uint64)
    rng = np.random.default_rng(1)
    for page in range(len(a)):
        a[page] = rng.integers(0, 1 << 63, 512, np.uint64)
    rng = np.random.default_rng(1)
    for page in range(0 if {look} else len(a), len(a)):
        assert (a[page] == rng.integers(0, 1 << 63, 512, np.uint64)).all(), page
""")


def test_a_write_waits_for_room(engines: Callable[..., Engines]) -> None:
    """Noise that the arena cannot hold: the write goes on once a lender, here a larger arena's worth of room, comes."""
    node = engines(arena_bytes=40 * MIB, full_wait_ms=100)
    other = node.agent()
    other.run(FILL.format(full="fail", look=False).replace('"filled"', '"other"'))
    agent = node.agent()
    agent.send(FILL.format(full="wait", look=True), True)
    # It has waited for longer than a region that fails would, and it says so.
    assert agent.process.stderr is not None
    while "a write waits for room" not in (line := agent.process.stderr.readline()):
        assert line, "it ended"
    assert node.regions["filled"].statistics()["full"]
    assert node.regions["filled"].statistics()["refused"] == 0
    other.run("del a; region.close()")
    assert agent.answer() is None
    assert node.regions["filled"].statistics()["refused"] == 0


@pytest.mark.parametrize("full", ["fail", "wait"])
def test_the_wait_has_an_end(engines: Callable[..., Engines], full: str) -> None:
    node = engines(arena_bytes=8 * MIB, full_wait_ms=100, full_hold_ms=1500)
    agent = node.agent()
    agent.send(FILL.format(full=full, look=False), True)
    with pytest.raises(EOFError) as ended:
        agent.answer()
    assert "ended with -7" in str(ended.value) and "SIGBUS" in str(ended.value)
    assert ("a write waits for room" in str(ended.value)) == (full == "wait")
