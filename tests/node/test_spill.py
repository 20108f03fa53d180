"""Real nodes with a spill file: more than the arena without a lender, no page lost with one that dies."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from ramster.testing.cluster import Application, Cluster
from ramster.testing.proxy import wait_until

PAGES = 3000
RESIDENT = 256
SPILL = {"spill": {"path": "spill.img", "size": "64MiB"}}
MIRROR = {"spill": {"path": "spill.img", "size": "64MiB", "mirror": True}}
LENDER = {"lend": {"size": "32MiB"}}


def spill(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = status["spill"]
    return found


def test_a_node_alone_holds_four_times_its_arena() -> None:
    with Cluster({"alpha": SPILL | {"arena": {"size": "4MiB", "full_wait": "2s"}}}) as cluster:
        node = cluster.start()["alpha"]
        pages = 4 * 4 * 1048576 // 2200
        with Application(node.region_socket, pages, RESIDENT) as application:
            assert application.ask("write", 0, pages) == pages
            assert application.ask("wrong", 0, pages) == []
            assert application.ask("statistics")["lost_pages"] == 0
            status = node.status()
            assert status["arena"]["pages_stored"] > 0.8 * pages
            seen = spill(status)
            assert seen["pages"] > 0.5 * pages and seen["segments"] > 0 and seen["mirrored"] == 0
            assert Path(seen["path"]).stat().st_size <= 64 << 20
            assert 0 < seen["bytes_used"] <= seen["bytes_total"] and (seen["errors"], seen["last_error"]) == (0, "")
            assert seen["reads"] > 0 and 0 < seen["read_p50_us"] <= seen["read_p99_us"] and seen["writes"] > 0
        node.wait(lambda status: spill(status)["bytes_used"] == 0, "rooms of a region that ended are free")


def test_a_lender_that_is_killed_costs_no_page_with_a_mirror() -> None:
    with Cluster({"alpha": MIRROR | {"arena": {"size": "4MiB"}}, "beta": LENDER}) as cluster:
        alpha = cluster.start()["alpha"]
        with Application(alpha.region_socket, PAGES, RESIDENT) as application:
            assert application.ask("write", 0, PAGES) == PAGES
            status = alpha.wait(
                lambda status: spill(status)["mirrored"] > 20 and not status["remotify"]["under_way"], "mirrored"
            )
            before = status["arena"]["pages_remote"] - status["arena"]["pages_spilled"]
            assert before > PAGES // 4
            cluster["beta"].kill()
            assert application.ask("wrong", 0, PAGES) == []
            assert application.ask("check", 0, PAGES) == []
            cluster["beta"].start()  # with empty hands: what it had is in the file alone from here on
            cluster.wait_up()
            assert application.ask("wrong", 0, PAGES) == []
            status = alpha.status()
            assert status["arena"]["pages_lost"] == 0 and status["arena"]["segments_lost"] == 0
            assert spill(status)["reads"] > 0 and spill(status)["segments"] > 0


def test_a_lender_that_stands_still_holds_up_no_write() -> None:
    with Cluster({"alpha": SPILL | {"arena": {"size": "4MiB"}}, "beta": LENDER}, proxied=True) as cluster:
        alpha = cluster.start()["alpha"]
        with Application(alpha.region_socket, PAGES, RESIDENT) as application:
            cluster.proxy("alpha", "beta").hold()
            assert application.ask("write", 0, PAGES) == PAGES
            cluster.proxy("alpha", "beta").release()
            assert application.ask("wrong", 0, PAGES) == []
            assert not application.ask("statistics")["full"]
        assert alpha.status()["counters"]["puts"] > PAGES // 2


def test_a_disk_that_fills_up_is_said_once_and_loses_nothing() -> None:
    with Cluster(
        {"alpha": SPILL | {"arena": {"size": "4MiB", "full_wait": "100ms"}, "region": {"full_wait": "200ms"}}}
    ) as cluster:
        node = cluster.start()["alpha"]
        assert node.process is not None
        with (
            Application(node.region_socket, 1000, RESIDENT) as first,
            Application(node.region_socket, PAGES * 2, RESIDENT) as second,
        ):
            assert first.ask("write", 0, 1000) == 1000
            resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
            second.send("write", 0, PAGES * 2)
            second.died_of()
            assert "region full" in second.stderr()
            wait_until(lambda: re.search(r"WARNING .*region .* is full: neither arena", node.log), "it is said")
            assert first.ask("wrong", 0, 1000) == []
            node.wait(lambda status: spill(status)["write_errors"] > 0, "counted")
        assert node.log.count("spill file /") == 1 and "too large" in node.log


def test_bad_pages_on_the_disk_are_lost_and_said() -> None:
    with Cluster({"alpha": SPILL | {"arena": {"size": "4MiB"}}}) as cluster:
        node = cluster.start()["alpha"]
        with Application(node.region_socket, PAGES, RESIDENT) as application:
            assert application.ask("write", 0, PAGES) == PAGES
            status = node.wait(lambda status: not status["remotify"]["under_way"], "written")
            path = Path(spill(status)["path"])
            with path.open("r+b") as file:
                file.seek(4096)
                data = bytearray(file.read())
                data[::8] = bytes(byte ^ 1 for byte in data[::8])
                file.seek(4096)
                file.write(data)
            answer = application.ask("prefetch", 0, 100)
            assert answer["error"] == "region-lost"
            application.send("wrong", 0, 100)
            application.died_of()
        assert node.running()


def test_what_is_wrong_with_the_file_ends_the_start_with_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("not ours")
    for path, size, says in (
        (other, "64MiB", "holds something that is no spill file"),
        (tmp_path / "spill", "4KiB", "allowed are"),
    ):
        config = tmp_path / "node.toml"
        config.write_text(
            f'[node]\nname = "alpha"\nnumber = 1\nrun_dir = "run"\n[arena]\nsize = "4MiB"\nlock = false\n'
            f'[spill]\npath = "{path}"\nsize = "{size}"\n'
        )
        command = [sys.executable, "-P", "-m", "ramster.cli", "node", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (2, 3, 9) and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert other.read_text() == "not ours"


def test_a_spill_file_in_ram_is_warned_of() -> None:
    shm = Path("/dev/shm/ramster-test-spill.img")
    with Cluster({"alpha": {"spill": {"path": str(shm), "size": "1MiB"}}}) as cluster:
        node = cluster.start()["alpha"]
        wait_until(lambda: "that is in RAM" in node.log, "warned")
    shm.unlink(missing_ok=True)
