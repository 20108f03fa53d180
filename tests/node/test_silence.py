"""Real nodes, one of which stands still, or whose network does: what another's silence costs, and for how long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.node.test_faults import LENDER, PAGES, filled

from ramster.testing.cluster import Cluster
from ramster.testing.proxy import wait_until

# Counts silence for longer than the borrower waits for a page.
SLOW_TO_NOTICE = {"links": {"idle_timeout": "3s"}}
# Pauses for longer than any test takes.
SLOW_TO_CONNECT = {"links": {"give_up": "10min", "reconnect_min": "1min", "reconnect_max": "1min"}}


@contextlib.contextmanager
def pair(**lender: Any) -> Iterator[Cluster]:
    """alpha borrows from beta, which connects, through a proxy."""
    with Cluster({"alpha": {}, "beta": {**LENDER, **lender}}, proxied=True) as cluster:
        yield cluster.start()


def test_a_node_that_stood_still_itself_gives_nothing_up() -> None:
    """What was sent to it meanwhile lies in its sockets, and the time counts for nobody."""
    with pair(**SLOW_TO_NOTICE) as cluster, filled(cluster["alpha"]) as application:
        alpha, beta = cluster["alpha"], cluster["beta"]
        proxy = cluster.proxy("alpha", "beta")
        proxy.hold()
        application.send("wrong", 0, PAGES)
        alpha.wait(lambda status: status["counters"]["gets_pending"] > 0, "a get is under way")
        with alpha.suspended():
            beta.wait(lambda status: status["peers"][0]["state"] != "up", "it has been silent for longer than give_up")
        wait_until(lambda: "this node did not run for" in alpha.log, "it has noticed, and looked at what waits")
        proxy.release()
        assert application.answer() == []
        counters = alpha.status()["counters"]
        assert counters["unreachable"] == 0
        assert application.ask("check", 0, PAGES) == []


def test_a_connection_that_is_broken_without_a_sign_is_replaced_while_gets_wait() -> None:
    """As after a few seconds without network, when the packets of old connections are sent again after long pauses."""
    with pair(**SLOW_TO_NOTICE) as cluster, filled(cluster["alpha"]) as application:
        cluster.proxy("alpha", "beta").freeze()
        assert application.ask("wrong", 0, PAGES) == []
        assert cluster["alpha"].status()["counters"]["unreachable"] == 0


def test_who_waits_for_pages_is_called_by_a_lender_that_pauses() -> None:
    with pair(**SLOW_TO_CONNECT) as cluster, filled(cluster["alpha"]) as application:
        proxy = cluster.proxy("alpha", "beta")
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: proxy.refused >= 2, "the lender has tried both connections, and pauses for a minute")
        proxy.refuse(False)
        assert application.ask("wrong", 0, PAGES) == []
        assert cluster["alpha"].status()["counters"]["unreachable"] == 0
        cluster.wait_up()
        assert all(node.status()["counters"]["refused_connections"] == 0 for node in cluster.nodes.values())
