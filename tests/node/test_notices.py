"""What the log says by itself: the decision as a table, then real nodes."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ramster.node.notices import Look, PeerLook, RegionLook, SwapLook, notices
from ramster.node.watch import Watch
from ramster.testing.cluster import Application, Cluster
from ramster.testing.nbd_handshake import Dialled
from ramster.testing.proxy import wait_until

UP = PeerLook("beta", up=True)
DOWN = PeerLook("beta", up=False, reason="the connection broke")
GONE = PeerLook("beta", up=False, gone=True, reason="it has stopped, and said so")
STILL = PeerLook("beta", up=True, silent_s=3.5)
REGION = RegionLook("matrix", 4711)
SWAP = SwapLook("swap0")
DESERTED = SwapLook("swap0", deserted=True)


def peers(*looks: PeerLook) -> Look:
    return Look(peers={2 + i: look for i, look in enumerate(looks)})


def swap(look: SwapLook) -> Look:
    return Look(swaps={3: look})


def region(look: RegionLook) -> Look:
    return Look(peers={2: DOWN}, regions={1: look})


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (Look(), peers(UP), []),
        (peers(PeerLook("beta", up=False)), peers(UP), []),  # the other of its two connections came first
        (Look(), peers(DOWN), []),  # whoever connects says why it cannot
        (peers(UP), peers(UP), []),
        (peers(UP), peers(DOWN), ["WARNING lost the link to node beta: the connection broke"]),
        (peers(DOWN), peers(DOWN), []),
        (peers(DOWN), peers(UP), ["INFO the link to node beta is up again"]),
        (peers(UP), peers(GONE), ["INFO node beta has stopped"]),
        (peers(UP), peers(replace(GONE, pages=1)), ["WARNING node beta has stopped and said so: what it kept"]),
        (
            peers(UP),
            replace(peers(GONE), pages_lost=3),
            ["WARNING node beta has stopped and said so: what it kept", "ERROR 3 pages (12 KiB) have lost their only"],
        ),
        (
            replace(peers(UP), pages_lost=3),
            replace(peers(GONE), pages_lost=3),
            ["INFO node beta has stopped"],  # lost with another one, earlier
        ),
        (peers(GONE), peers(GONE), []),
        (peers(GONE), peers(UP), ["INFO the link to node beta is up again"]),
        (peers(UP), peers(STILL), ["WARNING node beta has answered nothing for 4 s although its link is up"]),
        (peers(STILL), peers(replace(STILL, silent_s=4.5)), []),
        (peers(STILL), peers(UP), ["INFO node beta answers again"]),
        (peers(STILL), peers(DOWN), ["WARNING lost the link to node beta"]),
        (peers(UP, UP), peers(UP, replace(DOWN, name="gamma")), ["WARNING lost the link to node gamma"]),
        (
            peers(DOWN),
            replace(peers(DOWN), pages_lost=7),
            ["ERROR 7 pages (28 KiB) have lost their only copy, 7 in all: their lender came back without"],
        ),
        (replace(peers(DOWN), pages_lost=7), replace(peers(UP), pages_lost=3), ["INFO the link"]),
        (region(REGION), region(REGION), []),
        (
            region(REGION),
            region(replace(REGION, lost=2)),
            ["ERROR region matrix of process 4711: 2 pages (8 KiB) touched and lost, 2 in all (node beta"],
        ),
        (region(replace(REGION, lost=2)), region(REGION), ["INFO region matrix of process 4711: its lost pages"]),
        (region(REGION), region(replace(REGION, refused=1)), ["ERROR region matrix of process 4711: full, 1 page"]),
        (
            region(REGION),
            region(replace(REGION, full=True)),
            ["WARNING region matrix of process 4711 is full: neither"],
        ),
        (region(replace(REGION, full=True)), region(replace(REGION, full=True)), []),
        (region(replace(REGION, full=True)), region(REGION), ["INFO region matrix of process 4711 has room again"]),
        (
            region(replace(REGION, full=True)),
            region(replace(REGION, full=True, refused=2)),
            ["ERROR region matrix of process 4711: full, 2 pages"],
        ),
        (region(replace(REGION, full=True)), Look(peers={2: DOWN}), []),  # it was closed
        (peers(DOWN), peers(replace(DOWN, lost=True)), ["ERROR node beta has been out of reach for too long"]),
        (
            peers(DOWN),
            peers(replace(DOWN, lost=True, pages=3)),
            ["ERROR node beta has been out of reach for too long: 3 pages (12 KiB) whose only copy it has cannot"],
        ),
        (
            Look(),
            Look(cuts=1, pages_cut=2, pages_lost=2),
            ["ERROR somebody else has cut the spill file short: 2 pages (8 KiB) that lay there alone are lost"],
        ),
        (Look(cuts=1), Look(cuts=2), ["WARNING somebody else has cut the spill file short: nothing that lay there"]),
        (
            Look(cuts=1, pages_cut=2, pages_lost=2),
            Look(cuts=2, pages_cut=3, pages_lost=7),
            [
                "ERROR somebody else has cut the spill file short: 1 page",
                "ERROR 4 pages (16 KiB) have lost their only copy",
            ],
        ),
        (Look(cuts=1, pages_cut=2, pages_lost=2), Look(cuts=1, pages_cut=2), []),
        (peers(replace(DOWN, lost=True)), peers(UP), ["INFO the link to node beta is up again"]),
        (region(REGION), region(replace(REGION, removed=3)), ["WARNING region matrix of process 4711 removed 3 pages"]),
        (Look(), swap(SWAP), []),
        (swap(SWAP), swap(SWAP), []),
        (swap(SWAP), swap(DESERTED), ["WARNING export swap0: the last connection of this machine's kernel"]),
        (Look(), swap(DESERTED), ["WARNING export swap0: the last connection"]),  # between two looks
        (swap(DESERTED), swap(DESERTED), []),
        (swap(DESERTED), swap(SWAP), ["INFO export swap0: this machine's kernel is connected to it again"]),
        (swap(DESERTED), Look(), ["INFO export swap0: this machine's kernel does not swap on it any more"]),
        (swap(SWAP), Look(), []),
        (
            Look(),
            Look(damaged=1),
            ["ERROR 1 read met bytes that fail their check; a page that has no other copy"],
        ),
        (
            replace(peers(replace(UP, damaged=3), replace(UP, name="gamma", damaged=2)), damaged=5),
            replace(peers(replace(UP, damaged=7), replace(UP, name="gamma", damaged=2)), damaged=9),
            ["ERROR 4 reads met bytes that fail their check (4 from node beta); "],
        ),
        (
            peers(UP),
            replace(peers(replace(UP, damaged=1), replace(UP, name="gamma", damaged=2)), damaged=5),
            ["ERROR 5 reads met bytes that fail their check (1 from node beta, 2 from node gamma); "],
        ),
        (
            Look(puts_refused=1),
            Look(puts_refused=9),
            ["WARNING the arena is full and nothing leaves it: 8 puts refused"],
        ),
    ],
)
def test_what_changed_is_said_once(before: Look, now: Look, said: list[str]) -> None:
    lines = [f"{logging.getLevelName(each.level)} {each.text}" for each in notices(before, now, probe_s=1.0)]
    assert len(lines) == len(said), lines
    assert all(line.startswith(words) for line, words in zip(lines, said, strict=True)), lines


def test_a_region_whose_room_comes_and_goes_is_full_until_it_has_had_room_for_a_while() -> None:
    state = {1: False, 2: False}
    regions: Any = SimpleNamespace(
        troubles=lambda: {number: ("matrix", 4711, 0, 0, 0, full) for number, full in state.items()}
    )
    nothing: Any = None
    watch = Watch(nothing, nothing, regions, nothing, (), 1000)
    seen = []
    for now, full in [(0.0, False), (1.0, True), (2.0, False), (3.0, True), (4.0, False), (7.9, False), (8.0, False)]:
        state[1] = full
        looks = watch._look_at_regions(now)
        seen.append(looks[1].full)
        assert not looks[2].full
    assert seen == [False, True, True, True, True, True, False]
    state[1] = True
    assert watch._look_at_regions(9.0)[1].full
    del state[1]
    assert 1 not in watch._look_at_regions(9.5)
    state[1] = False  # another one
    assert not watch._look_at_regions(9.9)[1].full


def test_a_lender_that_returns_false_bytes_all_the_time_is_said_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, reads = 0.0, 0
    monkeypatch.setattr("ramster.node.watch.time.monotonic", lambda: now)
    peer = {"number": 2, "up": True, "gone": False, "reason": "", "lost": False, "silent_ms": 0}
    links: Any = SimpleNamespace(
        unreachable=dict,
        counters=lambda: {"corrupt_replies": reads},
        peers=lambda: [{**peer, "damaged": reads}],
    )
    store: Any = SimpleNamespace(statistics=lambda: SimpleNamespace(corrupt_pages=0, puts_refused=0, pages_lost=0))
    regions: Any = SimpleNamespace(troubles=dict)
    exports: Any = SimpleNamespace(swapped_on=dict)
    beta: Any = SimpleNamespace(number=2, name="beta")
    watch = Watch(store, links, regions, exports, [beta], 1000)
    said = []
    before = watch._look()
    for second in range(1, 121):
        now, reads = float(second), 10 * second
        look = watch._look()
        said += [each.text.split(";")[0] for each in notices(before, look, 1.0)]
        before = look
    assert said == [
        "10 reads met bytes that fail their check (10 from node beta)",
        "600 reads met bytes that fail their check (600 from node beta)",
    ]


PAGES = 4000


@pytest.fixture
def pair() -> Iterator[Cluster]:
    with Cluster({"alpha": {}, "beta": {"lend": {"size": "32MiB"}}}) as cluster:
        yield cluster.start()


def filled(cluster: Cluster) -> Application:
    application = Application(cluster["alpha"].region_socket, PAGES, 256)
    assert application.ask("write", 0, PAGES) == PAGES
    cluster["alpha"].wait(lambda status: status["arena"]["pages_remote"] > PAGES // 4, "remotified")
    return application


def test_a_lender_that_stands_still_and_comes_back_is_in_the_log(pair: Cluster) -> None:
    alpha = pair["alpha"]
    pair["beta"].signal(signal.SIGSTOP)
    try:
        wait_until(
            lambda: "node beta has answered nothing" in alpha.log or "lost the link to node beta" in alpha.log,
            "it is said",
            20,
        )
    finally:
        pair["beta"].signal(signal.SIGCONT)
    wait_until(lambda: "node beta answers again" in alpha.log or "beta is up again" in alpha.log, "and its end", 20)


def test_a_process_that_dies_of_a_lost_page_says_why_and_so_does_the_log(pair: Cluster) -> None:
    alpha = pair["alpha"]
    with filled(pair) as application:
        pair["beta"].kill()
        wait_until(lambda: application.ask("check", 0, PAGES), "the loss is seen", 20)
        first, _ = application.ask("check", 0, PAGES)[0]
        application.send("wrong", first, 1)
        assert application.died_of() == signal.SIGBUS
        assert f"page {first} is lost (the node that kept it is gone or out of reach); SIGBUS" in application.stderr()
    wait_until(lambda: "lost the link to node beta" in alpha.log, "the link's end is said", 20)
    wait_until(lambda: re.search("region .* of process .* touched and lost", alpha.log), "the loss is said", 20)


def test_a_lender_that_is_stopped_is_not_called_broken(pair: Cluster) -> None:
    alpha, beta = pair["alpha"], pair["beta"]
    with filled(pair):
        beta.control.stop(force=True)
        beta.wait_exit()
        wait_until(lambda: "node beta has stopped and said so" in alpha.log, "it is said", 20)
        wait_until(lambda: alpha.peer("beta")["reason"] == "it has stopped, and said so", "status says it", 20)
        assert "connection broke" not in alpha.log


def test_a_swap_whose_last_connection_goes_is_in_the_log_once_and_so_is_its_end(pair: Cluster) -> None:
    alpha = pair["alpha"]

    def attach() -> Dialled:
        client = Dialled(alpha.run_dir / "nbd.sock")
        client.go("swap0")
        return client

    def said(words: str) -> int:
        return len(re.findall(words, alpha.log))

    def row() -> dict[str, object]:
        return next(each for each in alpha.control.exports() if each["name"] == "swap0")

    alpha.control.create_export("swap0", 1 << 20, swap=True)
    alpha.control.create_export("other", 1 << 20)
    with Dialled(alpha.run_dir / "nbd.sock") as client:
        client.go("other")
    one, two = attach(), attach()
    assert row()["deserted_s"] == 0.0
    one.close()
    wait_until(lambda: row()["connections"] == 1, "one has gone", 20)
    two.close()
    gone = "WARNING .* export swap0: the last connection of this machine's kernel, which swaps on it, is gone"
    wait_until(lambda: said(gone), "it is said", 20)
    wait_until(lambda: row()["deserted_s"], "it is counted", 20)
    with attach():
        wait_until(lambda: said("INFO .* export swap0: this machine's kernel is connected to it again"), "its end", 20)
        assert row()["deserted_s"] == 0.0
        alpha.control.change_export("swap0", swap=False)  # what `ramster swap off` does before it disconnects
    wait_until(lambda: row()["connections"] == 0, "it has gone", 20)
    alpha.control.remove_export("swap0")
    alpha.control.create_export("later", 1 << 20, swap=True)
    with Dialled(alpha.run_dir / "nbd.sock") as client:
        client.go("later")
    wait_until(lambda: said("WARNING .* export later: the last connection"), "a later look", 20)
    assert said(gone) == 1 and "export other: the last" not in alpha.log
