"""The pools of the soak: three engines that borrow from and lend to each other, threads that hammer their pools.

`python -m ramster.testing.soak_pools SEED SPOIL`: until stdin is closed. Dense and sparse pools, persistent and
ephemeral ones, come and go; meanwhile segments are cleaned and shipped, and links are cut and made again. One line of
JSON per pool on stdout. Exit status 0: every page was right; 3: the last line says what was not. SPOIL 1 flips a bit
of each stored page of a quiet pool, which must be told.
"""

from __future__ import annotations

import itertools
import json
import random
import select
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, Final

from ramster.engine.links import BULK, GET
from ramster.testing import _stress
from ramster.testing.engines import Side, Wire, contexts
from ramster.testing.proxy import wait_until

WRONG: Final = ("corrupt", "garbage", "foreign", "stale", "vanished", "failed")
KEYS: Final = 900
QUIET: Final = 64
_lock = threading.Lock()


def say(**what: Any) -> None:
    with _lock:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def content(index: int) -> bytes:
    return random.Random(index).randbytes(2048) + b"\x21" * 2048


class Pools:
    """Three engines and what happens to them."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.stop = threading.Event()
        self.failures: list[str] = []
        times = {"request_deadline_ms": 300, "give_up_ms": 60_000, "cleaner": 1, "full_wait_ms": 50}
        # An arena of two thirds of what a pool holds: the rest is always away.
        self.sides = [Side(n, context, 24, 96, **times) for n, context in contexts(directory, 3).items()]
        self.wires = [Wire(one, other) for one, other in itertools.combinations(self.sides, 2)]
        for wire in self.wires:
            wire.connect()
        self.quiet = [side.store.create_pool(pages=QUIET) for side in self.sides]
        for side, pool in zip(self.sides, self.quiet, strict=True):
            for index in range(QUIET):
                side.store.put(pool, index, content(index))

    def guarded(self, work: Any, *arguments: Any) -> None:
        try:
            while not self.stop.is_set():
                work(*arguments)
        except BaseException as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            say(failed=self.failures[-1], trace=traceback.format_exc())
            self.stop.set()

    def hammer(self, side: Side, dice: random.Random) -> None:
        """One pool from its making to its end."""
        sparse, ephemeral = dice.random() < 0.5, dice.random() < 0.3
        pool = side.store.create_pool(pages=None if sparse else KEYS, persistent=not ephemeral)
        totals = _stress.hammer(
            side.store,
            pool,
            threads=dice.choice([1, 2, 4, 8, 16]),
            keys=KEYS,
            operations=10**9,
            seconds=0.2 + dice.random(),
            seed=dice.getrandbits(32),
            shared=dice.random() < 0.4,
            sparse=sparse,
            ephemeral=ephemeral,
            links=side.links,
        )
        side.store.destroy_pool(pool)
        wrong = {name: totals[name] for name in WRONG if totals[name]}
        say(puts=totals["puts"], gets=totals["gets"], refused=totals["refused"], wrong=sum(wrong.values()))
        if wrong:
            raise AssertionError(f"wrong pages in a pool: {wrong}")
        self.look(side)

    def look(self, side: Side) -> None:
        """Pages that nobody touches go round with the others and come back equal."""
        pool = self.quiet[self.sides.index(side)]
        for index in range(QUIET):
            if side.links.get(pool, index) != content(index):
                raise AssertionError(f"quiet page {index} of node {side.number} is wrong")

    def move(self, side: Side, dice: random.Random) -> None:
        """Seal, clean and ship, at full tilt."""
        if dice.random() < 0.3:
            side.store.seal_open()
        lender = dice.choice([other for other in self.sides if other is not side])
        side.order(lender, dice.randrange(1, 8))
        if dice.random() < 0.3:
            side.store.clean(2)
        self.stop.wait(0.002 + 0.02 * dice.random())

    def disturb(self) -> None:
        wire, kind = self.dice.choice(self.wires), self.dice.choice([GET, BULK])
        wire.cut(kind)
        self.stop.wait(0.1 * self.dice.random())
        wire.connect(kind)
        self.stop.wait(0.3 * self.dice.random())

    def settled(self) -> None:
        """Nothing on its way, stored = live, and each frame that is lent has an owner who knows of it."""
        for side in self.sides:
            side.settle()
            side.store.destroy_pool(self.quiet[self.sides.index(side)])
            side.store.seal_open()
            side.store.verify()
        wait_until(lambda: not any(side.lent_used() for side in self.sides), "no frame is left at a lender")
        for side in self.sides:
            statistics = side.store.statistics()
            if (statistics.pages_stored, statistics.segments_local, statistics.pages_lost) != (0, 0, 0):
                raise AssertionError(f"left over at node {side.number}: {statistics}")
        self.stop.set()

    def close(self) -> None:
        for side in self.sides:
            side.stop()
        for wire in self.wires:
            wire.close()


def main() -> None:
    seed, spoil = int(sys.argv[1]), sys.argv[2] == "1"
    with tempfile.TemporaryDirectory(prefix="ramster-") as directory:
        pools = Pools(Path(directory) / "cluster", seed)
        if spoil:
            for index in range(QUIET):
                pools.sides[0].store.corrupt(pools.quiet[0], index, 777)
        work = [threading.Thread(target=pools.guarded, args=(pools.disturb,))]
        for side in pools.sides:
            work.append(
                threading.Thread(target=pools.guarded, args=(pools.hammer, side, random.Random(seed + side.number)))
            )
            work.append(
                threading.Thread(target=pools.guarded, args=(pools.move, side, random.Random(-seed - side.number)))
            )
        for each in work:
            each.start()
        say(started=True)
        while not pools.stop.is_set() and not select.select([sys.stdin], [], [], 0.1)[0]:
            pass
        pools.stop.set()
        for each in work:
            each.join()
        if not pools.failures:
            statistics = [side.store.statistics() for side in pools.sides]
            say(
                shipped=sum(each.shipped_segments for each in statistics),
                cleaned=sum(each.cleaned_segments for each in statistics),
                plugged=sum(each.puts_plugged for each in statistics),
                remote_gets=sum(side.links.counters()["remote_gets"] for side in pools.sides),
            )
            pools.stop.clear()
            pools.guarded(pools.settled)
        pools.close()
    if pools.failures:
        sys.exit(3)
    say(ended=True)


if __name__ == "__main__":
    main()
