"""Real nodes and processes, and what goes wrong between them: nothing is ever wrong or zero, what is lost is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramster.cli.render import status_tables
from ramster.cli.tables import lines
from ramster.testing.cluster import Application, Cluster, Node
from ramster.testing.proxy import wait_until

PAGES = 4000
RESIDENT = 256
LENDER = {"lend": {"size": "32MiB"}}


@pytest.fixture
def pair() -> Iterator[Cluster]:
    """alpha borrows from beta through a proxy."""
    with Cluster({"alpha": {}, "beta": LENDER}, proxied=True) as cluster:
        yield cluster.start()


def filled(node: Node, pages: int = PAGES, resident: int = RESIDENT) -> Application:
    """A region with every page written, much of which is at a lender by then."""
    application = Application(node.region_socket, pages, resident)
    assert application.ask("write", 0, pages) == pages
    node.wait(
        lambda status: status["arena"]["pages_remote"] > pages // 4 and not status["remotify"]["under_way"],
        "remotified",
    )
    return application


def numbers(runs: list[list[int]]) -> set[int]:
    return {page for first, count in runs for page in range(first, first + count)}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "ramster.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_page_comes_back_and_closing_frees_the_lender(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        assert application.ask("wrong", 0, PAGES) == []
        statistics = application.ask("statistics")
        assert statistics["faults_remote"] > 0 and statistics["lost_pages"] == 0
        assert application.ask("close")
        # Every frame that held a page of the region is given back.
        pair["beta"].wait(lambda status: status["lend"]["frames_used"] == 0, "the lender's frames are free again")
        status = pair["alpha"].wait(lambda status: status["arena"]["frames_free"] >= 126, "so are the borrower's")
        assert (status["arena"]["pages_stored"], status["arena"]["segments_remote"]) == (0, 0)


def test_the_end_of_an_application_frees_the_lender(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        application.process.kill()
    pair["beta"].wait(lambda status: status["lend"]["frames_used"] == 0, "the lender's frames are free again")
    assert pair["alpha"].status()["regions"] == []


def test_the_lender_is_killed(pair: Cluster) -> None:
    """Exactly the pages whose only copy it had are lost; every other one is right; a touch of a lost one is SIGBUS."""
    with filled(pair["alpha"]) as application:
        assert application.ask("check", 0, PAGES) == []
        pair["beta"].kill()
        wait_until(lambda: application.ask("check", 0, PAGES), "the loss is seen", 10)
        runs = application.ask("check", 0, PAGES)
        lost = numbers(runs)
        status = pair["alpha"].status()
        arena = status["arena"]
        assert 0 < len(lost) <= arena["pages_unreachable"] == arena["pages_remote"]
        assert arena["pages_lost"] == 0, "it may come back with the same memory"
        assert [peer["pages_unreachable"] for peer in status["peers"]] == [arena["pages_unreachable"]]
        shown = "".join(text for part in status_tables(status) for line in lines(part, None) for text, _ in line)
        assert f"{arena['pages_unreachable']}: beta has the only copy" in shown
        said = f"{arena['pages_unreachable']} pages"
        wait_until(lambda: said in pair["alpha"].log and "out of reach for too long" in pair["alpha"].log, "said")
        # The statistics say where the rest is; resident pages that were clean copies of remote ones are not lost.
        here = application.ask("statistics")
        assert len(lost) == here["remote_pages"] + here["lost_pages"]
        answer = application.ask("prefetch", 0, PAGES)
        assert answer["error"] == "region-lost" and numbers(answer["runs"]) <= lost
        assert application.ask("wrong_of", sorted(set(range(PAGES)) - lost)) == []
        assert numbers(application.ask("check", 0, PAGES)) == lost, "looking at the others lost none"
        application.send("wrong_of", [min(lost)])
        assert application.died_of() == signal.SIGBUS
    assert pair["alpha"].running()
    with Application(pair["alpha"].region_socket, 300, 128) as other:
        other.ask("write", 0, 300)
        assert other.ask("wrong", 0, 300) == []


def test_the_lender_starts_again_with_empty_hands(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        pair["beta"].kill()
        pair["beta"].start()
        pair.wait_up()
        runs = application.ask("check", 0, PAGES)
        lost = numbers(runs)
        assert lost
        assert application.ask("wrong_of", sorted(set(range(PAGES)) - lost)) == []
        assert application.ask("statistics")["lost_pages"] == len(lost)
        arena = pair["alpha"].status()["arena"]
        assert (arena["pages_lost"] >= len(lost), arena["pages_unreachable"]) == (True, 0)
        assert pair["beta"].status()["lend"]["frames_used"] < 500
        application.send("wrong_of", [max(lost)])
        assert application.died_of() == signal.SIGBUS


def test_a_clean_resident_page_survives_the_death_of_its_lender(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        assert application.ask("prefetch", 0, 128) == 128
        before = application.ask("statistics")
        pair["beta"].kill()
        pair["alpha"].wait(lambda status: status["peers"][0]["state"] != "up", "the death is seen")
        # Its stored copy is out of reach: it is stored again before it leaves.
        assert application.ask("evict", 0, 128) == 128
        after = application.ask("statistics")
        assert after["evictions"] - before["evictions"] >= 128
        wait_until(lambda: numbers(application.ask("check", 0, PAGES)), "the loss of others is seen", 10)
        assert not numbers(application.ask("check", 0, 128))
        assert application.ask("wrong", 0, 128) == []


def test_the_lender_is_suspended_for_a_while(pair: Cluster) -> None:
    """Longer than its connections are kept, shorter than give_up."""
    with filled(pair["alpha"]) as application:
        with pair["beta"].suspended():
            application.send("wrong", 0, PAGES)
            pair["alpha"].wait(
                lambda status: status["counters"]["gets_pending"] > 0, "a get waits for the lender that sleeps"
            )
            with pytest.raises(AssertionError, match="no answer"):
                application.answer(1.0)
        assert application.answer() == []
        assert application.ask("check", 0, PAGES) == []


def test_the_link_is_cut_and_restored(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        proxy = pair.proxy("alpha", "beta")
        for _ in range(3):
            application.send("wrong", 0, PAGES)
            proxy.cut()
            assert application.answer() == []
            pair.wait_up()
        proxy.refuse()
        proxy.cut()
        application.send("wrong", 0, PAGES)
        with pytest.raises(AssertionError, match="no answer"):
            application.answer(0.5)
        proxy.refuse(False)
        assert application.answer() == []
        assert application.ask("write", 0, PAGES, 1) == PAGES
        assert application.ask("wrong", 0, PAGES) == []


def test_the_link_is_half_open(pair: Cluster) -> None:
    """Nothing arrives and nothing is closed: both notice by the silence, and connect anew."""
    with filled(pair["alpha"]) as application:
        proxy = pair.proxy("alpha", "beta")
        proxy.hold()
        pair["alpha"].wait(lambda status: status["peers"][0]["state"] != "up", "silence is noticed")
        assert "idle" in pair["alpha"].peer("beta")["reason"] or pair["alpha"].peer("beta")["reason"]
        application.send("wrong", 0, PAGES)
        proxy.cut()
        proxy.release()
        assert application.answer() == []


def test_bits_flip_on_the_way(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        for way in (pair.proxy("alpha", "beta").down, pair.proxy("alpha", "beta").up):
            way.corrupt(after=5000)
            assert application.ask("wrong", 0, PAGES) == []
            assert application.ask("write", 0, PAGES, 1) == PAGES
        assert application.ask("wrong", 0, PAGES) == []


def test_the_borrowers_node_is_killed_while_a_process_faults(pair: Cluster) -> None:
    """It stalls, then dies of SIGBUS: no page is ever read as zeros."""
    with filled(pair["alpha"]) as application:
        with pair["beta"].suspended():
            application.send("wrong", 0, PAGES)
            pair["alpha"].wait(lambda status: status["counters"]["gets_pending"] > 0, "a fault is under way")
            pair["alpha"].kill()
            assert application.died_of() == signal.SIGBUS
        assert "node" in application.stderr()


def test_goodbye_is_a_loss_at_once(pair: Cluster) -> None:
    """`ramster stop` refuses while the node holds foreign data and says what would be lost; --force does it."""
    beta = pair["beta"]
    with filled(pair["alpha"]) as application:
        refused = run("stop", "--config", beta.config)
        assert refused.returncode == 5
        assert "alpha" in refused.stderr and "MiB" in refused.stderr and "--force" in refused.stderr
        assert beta.running()
        assert application.ask("wrong", 0, PAGES) == []
        forced = run("stop", "--config", beta.config, "--force")
        assert forced.returncode == 0, forced.stderr
        assert beta.wait_exit() == 0
        lost = numbers(application.ask("check", 0, PAGES))
        assert lost, "no need to wait for give_up"
        assert pair["alpha"].peer("beta")["gone"]
        assert application.ask("wrong_of", sorted(set(range(PAGES)) - lost)) == []
    assert pair["alpha"].wait(lambda status: not status["regions"], "the application is gone")


def test_a_borrower_does_not_stop_under_its_applications(pair: Cluster) -> None:
    with filled(pair["alpha"]) as application:
        refused = run("stop", "--config", pair["alpha"].config)
        assert refused.returncode == 5 and "program" in refused.stderr
        assert application.ask("wrong", 0, PAGES) == []


def silent(cluster: Cluster) -> None:
    cluster.proxy("alpha", "beta").refuse()
    cluster.proxy("alpha", "beta").cut()
    cluster["beta"].wait(lambda status: status["peers"][0]["state"] != "up", "the owner is silent")


def test_an_owner_that_comes_back_within_its_grace_keeps_its_pages() -> None:
    lender = LENDER | {"lend": {"size": "32MiB", "foreign_grace": "1s"}}
    with Cluster({"alpha": {}, "beta": lender}, proxied=True) as cluster:
        cluster.start()
        with filled(cluster["alpha"]) as application:
            used = cluster["beta"].status()["lend"]["frames_used"]
            silent(cluster)
            since = time.monotonic()
            cluster.proxy("alpha", "beta").refuse(False)
            cluster.wait_up()
            while time.monotonic() < since + 1.5:
                assert application.ask("wrong", 0, PAGES) == []
            assert cluster["beta"].status()["lend"]["frames_used"] >= used // 2
            assert application.ask("check", 0, PAGES) == []


def test_an_owner_that_stays_away_beyond_its_grace_loses_its_pages_and_is_told() -> None:
    lender = LENDER | {"lend": {"size": "32MiB", "foreign_grace": "1s"}}
    with Cluster({"alpha": {}, "beta": lender}, proxied=True) as cluster:
        cluster.start()
        with filled(cluster["alpha"]) as application:
            silent(cluster)
            cluster["beta"].wait(lambda status: status["lend"]["frames_used"] == 0, "the grace is over")
            assert "dropped" in cluster["beta"].log
            cluster.proxy("alpha", "beta").refuse(False)
            cluster.wait_up()
            # The first page that is asked for tells: nobody has it, and so it is for its whole segment.
            application.send("wrong", 0, PAGES)
            assert application.died_of() == signal.SIGBUS


def test_two_lenders_share_and_one_dies() -> None:
    with Cluster({"alpha": {}, "beta": LENDER, "gamma": LENDER}) as cluster:
        cluster.start()
        with filled(cluster["alpha"]) as application:
            used = [cluster[name].status()["lend"]["frames_used"] for name in ("beta", "gamma")]
            assert min(used) > 0 and max(used) <= 2 * min(used) + 10
            assert application.ask("wrong", 0, PAGES) == []
            cluster["gamma"].kill()
            wait_until(lambda: application.ask("check", 0, PAGES), "the loss is seen", 10)
            lost = numbers(application.ask("check", 0, PAGES))
            assert 0 < len(lost) < PAGES // 2 + 500
            assert application.ask("wrong_of", sorted(set(range(PAGES)) - lost)) == []


@pytest.fixture(scope="module")
def alone() -> Iterator[Node]:
    """A node whose peer lends nothing."""
    with Cluster({"alpha": {}, "beta": {}}) as cluster:
        yield cluster.start()["alpha"]


def test_everything_is_full(alone: Node) -> None:
    """Bounded wait, then SIGBUS for the toucher and a line that says why; what was there before stays right."""
    with (
        Application(alone.region_socket, 8000, RESIDENT) as first,
        Application(alone.region_socket, PAGES, RESIDENT) as second,
    ):
        assert first.ask("write", 0, 2000) == 2000
        second.send("write", 0, PAGES)
        assert second.died_of() == signal.SIGBUS
        assert "region full" in second.stderr()
        assert first.ask("wrong", 0, 2000) == []
    alone.wait(lambda status: not status["regions"], "both are gone")


def test_evicting_into_a_full_arena_is_an_error_and_loses_nothing(alone: Node) -> None:
    with Application(alone.region_socket, 4096, 4096) as application:
        assert application.ask("write", 0, 4096) == 4096
        answer = application.ask("evict", 0, 4096)
        assert answer["error"] == "region-full"
        statistics = application.ask("statistics")
        assert statistics["full"] and statistics["lost_pages"] == 0
        assert application.ask("wrong", 0, 3000) == []


def _threads(pid: int) -> int:
    """The engine's own; Python keeps the threads of a pool once it has needed them."""
    return sum(name.read_text().startswith("ramster-") for name in Path(f"/proc/{pid}/task").glob("*/comm"))


def test_nothing_is_left_of_regions_that_are_gone(alone: Node) -> None:
    assert alone.process is not None
    status: dict[str, Any] = alone.status()
    before = (_threads(status["pid"]), len(list(Path(f"/proc/{status['pid']}/fd").iterdir())))
    for _ in range(3):
        with Application(alone.region_socket, 1000, RESIDENT) as application:
            application.ask("write", 0, 1000)
    alone.wait(lambda status: not status["regions"] and status["arena"]["pages_stored"] == 0, "all are gone")
    wait_until(
        lambda: (_threads(status["pid"]), len(list(Path(f"/proc/{status['pid']}/fd").iterdir()))) <= before,
        "threads and descriptors as before",
    )
