"""Cost per page from small to large: working sets, faulting threads, regions; each beside the smallest of all.

A verifying random walk, every second page rewritten, a quarter of the working set resident, everything else compressed
in the node's arena. With several regions the working set is divided among them, with several threads each has its
share.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from bench.data import PAGE
from bench.nodes import cluster
from bench.rows import Row, compare

import ramster
from ramster.errors import KernelUnsupported, PermissionMissing
from ramster.testing._walk import Walk

MIB = 1 << 20
THREADS = (1, 4, 16)
REGIONS = (1, 4)


class Set:
    """A working set in so many regions of equal size."""

    def __init__(self, client: ramster.Client, size: int, regions: int) -> None:
        share = size // regions
        self.regions = [client.region(share, resident=share // 4, name=f"scale-{n}") for n in range(regions)]
        self.views = [memoryview(region) for region in self.regions]
        self.walks = [Walk(view, n + 1) for n, view in enumerate(self.views)]
        self.pages = size // PAGE
        self.seed = 0
        self.ns(self.pages, 1, "sequential", 1)

    def ns(self, visits: int, threads: int, order: str = "random", dirty: int = 2) -> float:
        """Nanoseconds per visited page, all threads of all regions together."""
        self.seed += 1
        each = max(1, threads // len(self.walks))
        share = max(1, visits // (each * len(self.walks)))
        with ThreadPoolExecutor(len(self.walks)) as executor:
            work = [
                executor.submit(walk.run, visits=share, threads=each, order=order, dirty=dirty, seed=self.seed)
                for walk in self.walks
            ]
            totals = [each.result() for each in work]
        if any(t["empty"] + t["stale"] + t["foreign"] + t["altered"] for t in totals):
            raise AssertionError(f"wrong pages: {totals}")
        return max(t["ns"] for t in totals) / sum(t["visits"] for t in totals)

    def close(self) -> None:
        self.walks.clear()
        for view in self.views:
            view.release()
        for region in self.regions:
            region.close()


def run(quick: bool) -> list[Row]:
    sizes, rounds, visits = ([4, 8], 2, 512) if quick else ([64, 256, 1024], 5, 32768)
    rows = []
    try:
        # Half of it is what the pages take, the rest keeps the cleaner out of the figure.
        with cluster({"a": {"arena": {"size": (sizes[-1] + 2 * sizes[0]) * MIB}}}) as nodes:
            client = ramster.connect(nodes.start()["a"].region_socket)
            smallest = Set(client, sizes[0] * MIB, 1)
            for size in sizes:
                for regions in REGIONS:
                    working = Set(client, size * MIB, regions)
                    for threads in THREADS[: 2 if quick else 3]:
                        if threads < regions:
                            continue
                        row = compare(
                            f"{size} MiB, {regions} region{'s' * (regions > 1)}, {threads} thread{'s' * (threads > 1)}",
                            "ns/page",
                            partial(working.ns, visits, threads),
                            f"{sizes[0]} MiB, 1 region, 1 thread",
                            partial(smallest.ns, visits, 1),
                            rounds=rounds,
                        )
                        rows.append(row)
                    working.close()
            smallest.close()
    except (PermissionMissing, KernelUnsupported) as error:
        return [Row("cost per page at scale", None, "ns/page", "", None, note=f"skipped: {error}")]
    return rows
