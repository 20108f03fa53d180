"""The demo's worker process: makes the array, does the work, reports JSON lines on stdout.

A touch of a lost page ends it by SIGBUS, so nothing else lives here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ramster.cli.demo import workload
from ramster.cli.demo.plan import Work
from ramster.constants import PAGE_BYTES
from ramster.errors import RamsterError, RegionLost

if TYPE_CHECKING:
    from ramster.frontswap.regions import Region


class ArrayTarget:
    """A numpy array in RAM or mapped from a file: nothing can be lost, nobody counts faults."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    def lost_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        return []

    def fault_counts(self) -> dict[str, int]:
        return {}


class RegionTarget:
    """A RAMster region seen as bytes."""

    def __init__(self, region: Region, pages: int) -> None:
        self._region = region
        self.array: npt.NDArray[np.uint8] = region.array((pages * PAGE_BYTES,), np.uint8)

    def lost_runs(self, first: int, count: int) -> list[tuple[int, int]]:
        try:
            self._region.check(slice(first * PAGE_BYTES, (first + count) * PAGE_BYTES))
        except RegionLost as error:
            return [(int(start), int(pages)) for start, pages in error.runs]
        return []

    def fault_counts(self) -> dict[str, int]:
        statistics = self._region.statistics()
        return {
            "faults": statistics.faults,
            "faults_local": statistics.faults_local,
            "faults_remote": statistics.faults_remote,
        }


def emit(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _run(work: Work) -> None:
    if work.kind == "plain":
        workload.run(work, ArrayTarget(np.empty(work.pages * PAGE_BYTES, dtype=np.uint8)), emit)
        emit({"event": "done", "kind": work.kind, "statistics": {}})
    elif work.kind == "memmap":
        array = np.memmap(work.scratch, dtype=np.uint8, mode="w+", shape=(work.pages * PAGE_BYTES,))
        workload.run(work, ArrayTarget(array), emit)
        emit({"event": "done", "kind": work.kind, "statistics": {}})
    else:
        _run_region(work)


def _run_region(work: Work) -> None:
    import ramster

    client = ramster.connect(work.socket)
    region = client.region(work.pages * PAGE_BYTES, resident=work.resident_bytes, name="demo")
    target = RegionTarget(region, work.pages)
    emit({"event": "region", "kind": work.kind, "pid": os.getpid()})
    workload.run(work, target, emit)
    emit({"event": "done", "kind": work.kind, "statistics": dataclasses.asdict(region.statistics())})
    sys.stdin.readline()  # the parent asks the node for its figures while the region still exists
    del target
    region.close()


def main() -> int:
    """Reads the orders from the file that the command line names. An error is an `error` event and its exit code."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        _run(work)
    except RamsterError as error:
        emit({"event": "error", "code": error.code, "message": str(error)})
        return error.exit_code
    except MemoryError:
        emit({"event": "error", "code": "usage", "message": "not enough RAM for the array; make --size smaller"})
        return 2
    finally:
        with contextlib.suppress(OSError):
            if work.scratch:
                Path(work.scratch).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
