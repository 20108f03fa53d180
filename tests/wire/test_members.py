"""A member of the cluster that floods a lender, or crowds it: others do not notice, and who floods is cut off."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.wire.test_garbage import TIMEOUT_S, Served, ask, header, image_of

from ramster.engine._conduct import DRAIN_PER_S, ROOM, WEIGHTS, Bucket
from ramster.engine._turns import WORK, Schedule
from ramster.engine.links import BULK, GET, Connection
from ramster.errors import RamsterError
from ramster.testing.proxy import wait_until
from ramster.wire import conduct, frames, hello
from ramster.wire.frames import FrameType

BAD, GOOD = 3, 2
KINDS = {"get": GET, "bulk": BULK}
DEADLINE_S = 60.0
# A turn ends with the frame that brings it over what it may have; the dearest ones, an answer of 64 pages and an order
# to compact the largest directory, cost less than half a millisecond.
TURN_WORK_MAX = WORK + 500_000


# --- the decisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "per_s", "tolerated"),
    [
        ("useful", 10**6, True),
        ("idle", DRAIN_PER_S, True),
        ("idle", DRAIN_PER_S * 3, False),
        ("costly", DRAIN_PER_S // 8, True),
        ("costly", DRAIN_PER_S, False),
        ("nonsense", DRAIN_PER_S // 64, True),
        ("nonsense", DRAIN_PER_S // 8, False),
    ],
)
def test_what_drains_is_tolerated_and_what_overflows_is_not(weight: str, per_s: int, tolerated: bool) -> None:
    bucket, steps = Bucket(), 100
    charged = [bucket.charge(WEIGHTS[weight] * per_s // steps, 1000 * n // steps) for n in range(10 * steps)]
    assert all(charged) is tolerated


def test_a_bucket_is_as_large_as_what_a_loss_can_cause() -> None:
    for room in (ROOM, ROOM + 200_000):
        bucket = Bucket()
        assert bucket.charge(room, 5, room) and not bucket.charge(1, 5, room)
        assert bucket.charge(DRAIN_PER_S - 1, 1005, room), "a second later"
        assert not bucket.charge(DRAIN_PER_S, 500, room), "a clock that goes back drains nothing"


@pytest.mark.parametrize(
    ("faults", "since_ms", "left_ms"),
    [
        (0, 0, 0),
        (1, 0, 500),
        (1, 499, 1),
        (1, 500, 0),
        (2, 0, 1000),
        (3, 500, 1500),
        (8, 0, 64_000),
        (1_000_000, 0, 64_000),
        (1_000_000, 64_000, 0),
    ],
)
def test_pauses_grow_and_end(faults: int, since_ms: int, left_ms: int) -> None:
    assert conduct.shut_out_ms(faults, since_ms) == left_ms


# --- whose turn it is -------------------------------------------------------------------------------------------------

ONE, TWO, QUIET, ALMOST = 7, 200, 254, 3


def serve(schedule: Schedule, looks: int, busy: dict[int, int]) -> dict[int, int]:
    """What each of the busy peers gets, by the cost of its frames: all of them have something in every look."""
    got = dict.fromkeys(busy, 0)

    def turn(peer: int, work: int) -> None:
        done = -(-work // busy[peer]) * busy[peer]  # a frame is not left half done
        got[peer] += done
        schedule.over(peer, done, True)

    for _ in range(looks):
        for peer in busy:
            if work := schedule.came(peer):
                turn(peer, work)
        if following := schedule.next():
            turn(*following)
    return got


def test_who_was_idle_is_served_at_once_and_who_has_used_its_work_up_waits() -> None:
    schedule = Schedule()
    assert schedule.next() is None and schedule.came(ONE) == schedule.came(TWO) == WORK
    for peer in (ONE, TWO):
        schedule.over(peer, WORK, True)
    for peer in (ONE, TWO) * 5:
        assert schedule.came(ONE) == schedule.came(TWO) == 0, "they wait"
        left = schedule.came(QUIET)
        assert left >= WORK // 2, "not behind the others"
        schedule.over(QUIET, WORK // 4, False)
        assert schedule.next() == (peer, WORK)
        schedule.over(peer, WORK, True)
        assert schedule.came(QUIET) == (left - WORK // 4 if peer == TWO else WORK), "a round ends with the last of them"
        schedule.over(QUIET, 0, False)


@pytest.mark.parametrize(
    "busy",
    [
        {ONE: 1000, TWO: 1000},
        {ONE: 1000, TWO: 300_000},
        {ONE: 99_999, TWO: 480_000, ALMOST: 7},
        {peer: 1 + 1777 * peer for peer in range(254)},
    ],
    ids=["alike", "one with dear frames", "three", "all"],
)
def test_busy_peers_get_equal_shares_whatever_their_frames_cost(busy: dict[int, int]) -> None:
    got = serve(Schedule(), 200 * len(busy), busy)
    fair = sum(got.values()) / len(got)
    assert all(abs(each - fair) <= WORK + max(busy.values()) for each in got.values()), got


def test_who_sends_just_less_than_a_quantum_gets_no_more_than_that_in_a_round() -> None:
    schedule = Schedule()
    serve(schedule, 20, {ONE: 1000, TWO: 1000})
    got = dict.fromkeys((ONE, TWO, ALMOST), 0)
    for _ in range(3000):
        work = schedule.came(ALMOST)
        while work:
            done = min(work, WORK - 1)
            got[ALMOST] += done
            schedule.over(ALMOST, done, False)
            work = schedule.came(ALMOST)
        if following := schedule.next():
            peer, work = following
            got[peer] += work
            schedule.over(peer, work, peer != ALMOST)
    assert got[ALMOST] <= 1.01 * got[ONE] and abs(got[ONE] - got[TWO]) <= WORK, got


def test_a_debt_is_paid_in_rounds_and_idleness_saves_nothing() -> None:
    schedule = Schedule()
    schedule.next()
    assert schedule.came(ONE) == WORK
    schedule.over(ONE, 4 * WORK, False)
    assert schedule.came(ONE) == 0
    turns = [schedule.next() for _ in range(4)]
    assert turns == [None, None, None, (ONE, WORK)], "three rounds for what it had too much"
    schedule.over(ONE, 0, False)
    for _ in range(1000):
        schedule.next()
    assert schedule.came(ONE) == WORK
    assert schedule.waiting == 0


# --- floods -----------------------------------------------------------------------------------------------------------


class Good:
    """A member with one segment here, whose pages it gets."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.bulk = served.attached(GOOD, "bulk")
        self.get = served.attached(GOOD, "get")
        image, _ = image_of([500], 1)
        _, answer, _ = ask(self.bulk, FrameType.SHIP, image, request=1, segment=5, generation=1)
        self.handle = answer["handle"]

    def still_served(self) -> None:
        _, answer, body = ask(self.get, FrameType.GET, b"\0\0", request=9, segment=5, generation=1, handle=self.handle)
        assert answer["status"] == 0 and len(body) > 500
        self.served.still_serves(self.bulk)

    def close(self) -> None:
        ask(self.bulk, FrameType.FREE, b"", request=6, segment=5, generation=1)
        self.bulk.close()
        self.get.close()


class Door:
    """How long who was cut off stays out: as ever, but the time passes when a test says so."""

    def __init__(self) -> None:
        self.later_ms = 0

    def __call__(self, faults: int, since_ms: int) -> int:
        return conduct.shut_out_ms(faults, self.later_ms)


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def served(tmp_path: Path, door: Door) -> Iterator[Served]:
    node = Served(tmp_path, shut_out_ms=door)
    yield node
    node.close()


class Flood:
    """Sends the same bytes again and again until it is cut off, and reads nothing."""

    def __init__(self, connection: Connection, blob: bytes) -> None:
        self._connection = connection
        self._blob = blob
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        try:
            while True:
                self._connection.send(self._blob, TIMEOUT_S)
        except RamsterError:
            pass

    def stop(self, served: Served) -> None:
        served.links.detach(BAD)
        self._thread.join()
        self._connection.close()
        wait_until(lambda: not served.links.up(BAD, GET) and not served.links.up(BAD, BULK), "gone")


NOTHING = {"request": 9, "segment": 3, "generation": 1}


def flood_of(served: Served, bulk: Connection, get: Connection, what: str) -> tuple[Connection, bytes, int]:
    """The connection, what is sent on it, and its kind."""
    if what in ("GET", "GET of nothing", "PAGE", "PING on get"):
        image, _ = image_of([900] * 60, 1)
        _, answer, _ = ask(bulk, FrameType.SHIP, image, request=1, segment=5, generation=1)
        generation = 1 if what == "GET" else 2
        one = header(
            type=FrameType[what.split()[0]],
            length=120 if "GET" in what.split()[0] else 0,
            request=7,
            segment=5,
            generation=generation,
            handle=answer["handle"],
        )
        return get, one + (struct.pack("<60H", *range(60)) if "GET" in what.split()[0] else b""), GET
    if what == "COMPACT of the same":
        image, entries = image_of([0] * 1000, 1)
        ask(bulk, FrameType.SHIP, image, request=1, segment=5, generation=1)
        body = b"\xff" * (len(entries) // 8)
        return bulk, header(type=FrameType.COMPACT, length=len(body), segment=5, generation=1) + body, BULK
    if what == "SHIP of noise":
        return bulk, header(type=FrameType.SHIP, length=200, **NOTHING) + bytes(200), BULK
    body = b"\xff" if what == "COMPACT" else b""
    return bulk, header(type=FrameType[what], length=len(body), **NOTHING) + body, BULK


CUT_OFF = [
    "PING",
    "PONG",
    "SHIP of noise",
    "SHIPPED",
    "FREE",
    "FREED",
    "GOODBYE",
    "COMPACT",
    "COMPACT of the same",
    "COMPACTED",
    "GET of nothing",
    "PAGE",
    "PING on get",
]


@pytest.mark.parametrize("what", CUT_OFF)
def test_whoever_floods_with_what_means_nothing_is_cut_off_and_nobody_else(
    served: Served, door: Door, what: str
) -> None:
    good = Good(served)
    bulk, get = served.attached(BAD, "bulk"), served.attached(BAD, "get")
    connection, one, kind = flood_of(served, bulk, get, what)
    flood = Flood(connection, one * (65536 // len(one)))
    until = time.monotonic() + DEADLINE_S
    while served.links.up(BAD, kind) and time.monotonic() < until:
        good.still_served()
    good.still_served()
    row = next(row for row in served.links.peers() if row["number"] == BAD)
    assert row["reason"] == "the peer sent far more that means nothing than an honest one could"
    assert served.links.counters()["floods"] == 1 and served.links.faults(BAD)[0] == 1
    assert served.links.counters()[f"turn_work_max_{'get' if kind == GET else 'bulk'}"] <= TURN_WORK_MAX
    refused = served.tls(BAD)
    refused.send(frames.pack(FrameType.HELLO, hello.encode(served.hello("bad", BAD, "bulk"))), TIMEOUT_S)
    answer, length = frames.unpack(refused.receive(frames.HEADER_BYTES, TIMEOUT_S))
    assert answer == FrameType.REFUSE and b"cut off once for what it sent" in refused.receive(length, TIMEOUT_S)
    refused.close()
    flood.stop(served)
    (get if kind == BULK else bulk).close()
    door.later_ms = 500  # it belongs here, and may come back
    served.attached(BAD, "get").close()
    good.still_served()
    good.close()
    served.links.drop_foreign(BAD)


@pytest.mark.parametrize("both", [False, True], ids=["its own", "both sides'"])
@pytest.mark.parametrize("kind", ["get", "bulk"])
def test_whoever_changes_its_keys_again_and_again_is_cut_off(served: Served, kind: str, both: bool) -> None:
    """TLS has no end of key updates, and no frame comes of them."""
    good = Good(served)
    bad = served.attached(BAD, kind)
    sent = 0
    with contextlib.suppress(RamsterError):
        while sent < 1_000_000:
            bad.update_keys(TIMEOUT_S, both)
            sent += 1
    assert sent < 1_000_000
    wait_until(lambda: not served.links.up(BAD, KINDS[kind]), "cut off")
    row = next(row for row in served.links.peers() if row["number"] == BAD)
    assert row["reason"] == "the peer changed its keys again and again"
    assert served.links.counters()["floods"] == 1 and served.links.faults(BAD)[0] == 1
    good.still_served()
    bad.close()
    good.close()


def test_an_honest_number_of_key_updates_is_none_of_anybodys_business(served: Served) -> None:
    bad = served.attached(BAD, "get")
    for _ in range(100):
        bad.update_keys(TIMEOUT_S)
        served.still_serves(bad)
    assert served.links.counters()["floods"] == 0
    bad.close()


def test_key_updates_are_no_hello(served: Served) -> None:
    """Whoever has a thread of this node and says nothing else is told so, and not only after the time for a hello."""
    bad = served.tls(BAD)
    for _ in range(10):
        bad.update_keys(TIMEOUT_S)
    kind, length = frames.unpack(bad.receive(frames.HEADER_BYTES, TIMEOUT_S))
    assert kind == FrameType.REFUSE
    assert "it changes its keys again and again" in hello.decode_refusal(bad.receive(length, TIMEOUT_S))
    bad.close()


def test_whoever_asks_for_much_has_one_turn_after_the_other(served: Served) -> None:
    """Each of these frames has 60 pages for an answer. It may ask so, and others come in between."""
    good = Good(served)
    bulk, get = served.attached(BAD, "bulk"), served.attached(BAD, "get")
    connection, one, _ = flood_of(served, bulk, get, "GET")
    many = 64
    for _ in range(10):
        connection.send(one * many, TIMEOUT_S)
        good.still_served()
        for _ in range(many):
            length = struct.unpack_from("<I", connection.receive(frames.HEADER_BYTES, TIMEOUT_S), 16)[0]
            assert length > 60 * 900
            for begin in range(0, length, 16384):
                connection.receive(min(16384, length - begin), TIMEOUT_S)
    assert WORK <= served.links.counters()["turn_work_max_get"] <= 2 * WORK, "a turn, and the rest of one frame"
    assert served.links.up(BAD, GET) and served.links.counters()["floods"] == 0
    bulk.close()
    get.close()
    wait_until(lambda: not served.links.up(BAD, GET) and not served.links.up(BAD, BULK), "gone")
    good.close()
    served.links.drop_foreign(BAD)


def test_whoever_breaks_the_protocol_again_and_again_waits_longer_each_time(served: Served, door: Door) -> None:
    for faults, pause_ms in ((1, 500), (2, 1000), (3, 2000)):
        connection = served.attached(BAD, "bulk")
        door.later_ms = 0
        connection.send(bytes(frames.HEADER_BYTES), TIMEOUT_S)
        wait_until(lambda: not served.links.up(BAD, BULK), "cut off")
        connection.close()
        assert served.links.faults(BAD)[0] == faults
        door.later_ms = pause_ms - 1
        assert served.peering.shut_out(BAD)
        door.later_ms = pause_ms
        assert served.peering.shut_out(BAD) == ""


# --- crowding ---------------------------------------------------------------------------------------------------------


def test_small_images_fill_no_more_than_their_owners_share_of_rows(tmp_path: Path) -> None:
    """32 rows for 8 segments: a borrower with half of it has 16, however small its images are."""
    served = Served(tmp_path, borrower_share=0.5)
    try:
        good, bad = served.attached(GOOD, "bulk"), served.attached(BAD, "bulk")
        image, _ = image_of([0], 1)

        def ship(connection: Connection, segment: int) -> dict[str, int]:
            named = image[:4] + struct.pack("<I", segment) + image[8:]
            _, answer, _ = ask(connection, FrameType.SHIP, named, request=1, segment=segment, generation=1)
            return answer

        answers = [ship(bad, segment) for segment in range(17)]
        assert [answer["status"] for answer in answers] == [0] * 16 + [4], "not full: this owner has its share"
        assert answers[15]["credit"] == answers[16]["credit"] == 0
        assert all(ship(good, segment)["status"] == 0 for segment in range(16)), "others have theirs"
        assert ship(good, 16)["status"] == 2, "now no row is left"
        _, freed, _ = ask(bad, FrameType.FREE, b"", request=6, segment=3, generation=1)
        assert freed["credit"] == 1 and ship(bad, 16)["status"] == 0
        assert served.links.foreign() == {GOOD: 16, BAD: 16}
        assert served.links.drop_foreign(BAD) == 16 and served.links.foreign() == {GOOD: 16}
        _, after, _ = ask(bad, FrameType.PING, b"", request=2)
        assert after["credit"] == 4, "half of 8 segments"
        bad.close()
        good.close()
        wait_until(lambda: not served.links.up(GOOD, BULK), "gone")
        served.links.drop_foreign(GOOD)
    finally:
        served.close()
