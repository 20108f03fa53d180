"""Real nodes with a mirror that is overwritten at random: nothing wedges, and the status says what has no copy."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ramster.constants import NBD_SOCKET, PAGE_BYTES
from ramster.testing.application import content
from ramster.testing.cluster import Application, Cluster
from ramster.testing.nbd_handshake import Dialled

BLOCKS = 1000
PAGES = 3000
RESIDENT = 64


def settings(mirror_mib: int) -> dict[str, Any]:
    return {
        "alpha": {
            "arena": {"size": "4MiB", "full_wait": "5s"},
            "region": {"full_wait": "20s"},
            "spill": {"path": "spill.img", "size": f"{mirror_mib}MiB", "mirror": True},
        },
        "beta": {"lend": {"size": "32MiB"}},
    }


@pytest.mark.parametrize("mirror_mib", [3, 13])
def test_random_overwrites_wedge_no_node(mirror_mib: int) -> None:
    """8.4 MiB compressed in an arena of 4 MiB, a region and an export, some four times over: a file with room for less
    than that, and one with room for half as much again.
    """
    dice = random.Random(1)
    written: dict[int, int] = {}
    with Cluster(settings(mirror_mib)) as cluster:
        alpha = cluster.start()["alpha"]
        alpha.control.create_export("disk", BLOCKS * PAGE_BYTES)
        with (
            Application(alpha.region_socket, PAGES, RESIDENT) as application,
            Dialled(alpha.run_dir / NBD_SOCKET) as dialled,
        ):
            client = dialled.go("disk")
            for version in range(1, 6):
                for _ in range(8):
                    first = dice.randrange(PAGES - 300)
                    assert application.ask("write", first, 300, version) == 300
                for _ in range(BLOCKS):
                    block = dice.randrange(BLOCKS)
                    client.write(block * PAGE_BYTES, content(block, version))
                    written[block] = version
            assert application.ask("wrong", 0, PAGES) == []
            for block, version in written.items():
                assert client.read(block * PAGE_BYTES, PAGE_BYTES) == content(block, version), f"block {block}"
            assert not application.ask("statistics")["full"]
            status = alpha.status()
            assert status["arena"]["puts_refused"] == 0 and status["arena"]["pages_lost"] == 0
            if mirror_mib == 13:
                status = alpha.wait(lambda status: status["spill"]["unmirrored"] == 0, "all of it is mirrored")
                assert status["spill"]["given_up"] == 0
            else:
                spill = status["spill"]
                assert spill["unmirrored"] > 0 and spill["pages_unmirrored"] > 0
                assert alpha.log.count("unmirrored") == 1, "said once"
            client.close()
        alpha.control.remove_export("disk", force=True)
        alpha.wait(lambda status: status["spill"]["bytes_used"] == 0, "all rooms are free")
