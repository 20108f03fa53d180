"""One application of the soak: regions whose every page is verified at each visit, until stdin is closed.

`python -m ramster.testing.soak_application SOCKET SEED REGIONS PAGES RESIDENT THREADS`. Each region is walked by
native threads in random, strided or sequential order, read and rewritten, prefetched, evicted, pinned and looked over,
closed and made again. One line of JSON on stdout after each round of a region. Exit status 0: every page of every
region was right to the end; 3: a wrong page, or a call failed that must not fail, and the last line says which.
"""

from __future__ import annotations

import json
import random
import resource
import select
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, Final

import ramster
from ramster.constants import PAGE_BYTES
from ramster.testing._walk import Walk

if TYPE_CHECKING:
    from ramster.testing._walk import Totals

ROUND_S: Final = 0.25
WRONG: Final = ("empty", "stale", "foreign", "altered")
_lock = threading.Lock()


class WrongPage(Exception):
    """A page that does not hold what was written to it last."""


def say(**what: Any) -> None:
    with _lock:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


class Ground(threading.Thread):
    """One region at a time and the thread that drives its walks."""

    def __init__(self, client: ramster.Client, salt: int, pages: int, resident: int, threads: int) -> None:
        super().__init__()
        self._client = client
        self._salt = salt
        self._pages = pages
        self._resident = resident
        self._threads = threads
        self._dice = random.Random(salt)
        self._rounds = 0
        self.stop = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self._life()
        except BaseException as error:
            self.failure = error
            say(failed=f"{type(error).__name__}: {error}", trace=traceback.format_exc())

    def _life(self) -> None:
        """A region from its making to its end; every page of it is verified before it goes."""
        self._salt += 1
        region = self._client.region(
            self._pages * PAGE_BYTES, resident=self._resident * PAGE_BYTES, name=f"soak-{self._salt}"
        )
        memory = memoryview(region)
        walk = Walk(memory, self._salt)
        for _ in range(self._dice.randrange(8, 60)):
            self._round(region, walk)
            if self.stop.is_set():
                break
        self._judge(walk.run(visits=walk.pages, order="sequential", seconds=60.0), complete=walk.pages)
        del walk
        memory.release()
        region.close()

    def _round(self, region: ramster.Region, walk: Walk) -> None:
        dice = self._dice
        self._judge(
            walk.run(
                visits=10**9,
                seconds=ROUND_S * dice.random(),
                threads=dice.choice([1, self._threads]),
                order=dice.choice(["random", "random", "stride", "sequential"]),
                dirty=dice.choice([0, 1, 2, 4]),
                seed=dice.getrandbits(32),
                shared=dice.random() < 0.5,
            )
        )
        first = dice.randrange(self._pages)
        count = min(dice.randrange(1, 200), self._pages - first)
        where = (first * PAGE_BYTES, (first + count) * PAGE_BYTES)
        what = dice.choice(["evict", "prefetch", "pin", "check", "walk", "walk"])
        if what == "evict":
            region.evict(where)
        elif what == "prefetch":
            region.prefetch(where)
        elif what == "check":
            region.check(None)
        elif what == "pin":
            count = min(count, self._resident // 4)
            with region.pin((where[0], where[0] + count * PAGE_BYTES)):
                self._judge(walk.run(visits=200, threads=1, dirty=1, seed=dice.getrandbits(32)))

    def _judge(self, totals: Totals, complete: int = 0) -> None:
        wrong = {name: totals[name] for name in WRONG if totals[name]}
        say(visits=totals["visits"], writes=totals["writes"], skipped=totals["skipped"], wrong=sum(wrong.values()))
        if wrong:
            raise WrongPage(f"salt {self._salt}: {wrong}, the first (page, version, words) {totals['first']}")
        if totals["visits"] < complete:
            raise TimeoutError(f"only {totals['visits']} of {complete} pages could be verified")


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    socket, (seed, regions, pages, resident, threads) = sys.argv[1], map(int, sys.argv[2:7])
    client = ramster.connect(socket)
    grounds = [Ground(client, (seed << 24) + (n << 16), pages, resident, threads) for n in range(regions)]
    for ground in grounds:
        ground.start()
    say(started=regions)
    while all(ground.is_alive() for ground in grounds):
        if select.select([sys.stdin], [], [], 0.1)[0]:
            break  # closed: time to end
    for ground in grounds:
        ground.stop.set()
    for ground in grounds:
        ground.join()
    if any(ground.failure is not None for ground in grounds):
        sys.exit(3)
    say(ended=True)


if __name__ == "__main__":
    main()
