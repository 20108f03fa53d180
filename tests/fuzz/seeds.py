"""Inputs to begin with, made from valid sessions: `python -m tests.fuzz.seeds FOLDER` writes them to files.

Covers both targets, one folder each. Inputs that found something are kept in tests/fuzz/corpus instead.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from tests.fuzz.transmission import SIZE, Plan, request

from ramster.constants import PAGE_BYTES
from ramster.wire import nbd
from ramster.wire.nbd import Command, CommandFlag, Option

_SESSIONS: dict[str, bytes] = {
    "read": request(Command.READ, 0, PAGE_BYTES) + request(Command.READ, 100, 70_000),
    "all": request(Command.READ, 0, SIZE) + request(Command.BLOCK_STATUS, 0, SIZE),
    "write": request(Command.WRITE, 0, 3 * PAGE_BYTES) + request(Command.READ, 0, 4 * PAGE_BYTES),
    "parts": request(Command.WRITE, 4000, 9000, CommandFlag.FUA) + request(Command.READ, 3000, 12_000),
    "inside": request(Command.WRITE, 10 * PAGE_BYTES + 7, 50) + request(Command.WRITE_ZEROES, 11 * PAGE_BYTES + 9, 90),
    "zero": request(Command.WRITE_ZEROES, 5000, 20_000, CommandFlag.NO_HOLE) + request(Command.READ, 0, 40_000),
    "trim": request(Command.TRIM, 100, 50_000) + request(Command.FLUSH) + request(Command.READ, 0, 60_000),
    "cache": request(Command.CACHE, 0, 30 * PAGE_BYTES) + request(Command.READ, 0, 30 * PAGE_BYTES),
    "status": request(Command.BLOCK_STATUS, 50, 9999, CommandFlag.REQ_ONE) + request(Command.BLOCK_STATUS, 0, 99_999),
    "many": b"".join(request(Command.READ, n * 3 * PAGE_BYTES, 2 * PAGE_BYTES) for n in range(20)),
    "goodbye": request(Command.READ, 0, PAGE_BYTES) + request(Command.DISC),
    "wrong": request(Command.READ, SIZE, 1) + request(9, 0, 1) + request(Command.FLUSH, 1) + request(Command.TRIM),
    "noise": request(Command.READ, 0, 100) + b"noise" * 9,
    "half": request(Command.WRITE, 4000, 9000)[:20],
}


def transmission() -> dict[str, bytes]:
    """Every session in every world, and in each way to speak at least once."""
    found = {}
    for number, (name, session) in enumerate(_SESSIONS.items()):
        for world in range(4):
            plan = Plan(
                structured=(number + world) % 3 != 0,
                allocation=(number + world) % 3 != 0,
                world=world,
                lockstep=(number >> 1) + world & 1 == 1,
                spelt=False,
                leaves=(number + 2 * world) % 5 // 3,
                piece=(number % 4 == 3) * 61,
            )
            found[f"{name}{world}"] = plan.bytes() + session
    spelt = Plan(True, True, 0, False, True, 0, 61)
    found["spelt"] = spelt.bytes() + request(Command.WRITE, 0, 5000, payload=b"spelt" * 1000) + _SESSIONS["read"]
    found["cut"] = spelt.bytes() + request(Command.WRITE, 0, 5000, payload=b"spelt" * 900)
    found["long"] = spelt.bytes() + request(Command.WRITE, 0, 0xFFFFFFFF, payload=b"long")
    away = Plan(True, True, 1, False, True, 1, 0)
    found["leaves"] = away.bytes() + request(Command.WRITE, 100, 9000, payload=b"\x01" * 8000)
    return found


def handshake() -> dict[str, bytes]:
    """The first byte is the way that TLS is offered, see `handshake.run`."""
    fixed = struct.pack(">I", 3)
    go = nbd.pack_option(Option.GO, nbd.pack_info("swap", *nbd.Info))
    structured = nbd.pack_option(Option.STRUCTURED_REPLY)
    queries = nbd.pack_queries("swap", nbd.BASE_ALLOCATION, "base:", "other:x")
    sessions = {
        "go": fixed + go,
        "info": fixed + nbd.pack_option(Option.INFO, nbd.pack_info("old")) + nbd.pack_option(Option.ABORT),
        "context": fixed
        + structured
        + nbd.pack_option(Option.LIST_META_CONTEXT, queries)
        + nbd.pack_option(Option.SET_META_CONTEXT, queries)
        + go,
        "list": fixed + nbd.pack_option(Option.LIST) + nbd.pack_option(Option.EXPORT_NAME, b"old"),
        "tls": fixed + nbd.pack_option(Option.STARTTLS) + structured + go,
        "name": bytes(4) + nbd.pack_option(Option.EXPORT_NAME, b"swap"),
        "unknown": fixed + nbd.pack_option(Option.PEEK_EXPORT, b"xyz") + nbd.pack_option(77) + go,
        "long": fixed + nbd.pack_option(Option.GO, bytes(nbd.OPTION_BYTES_MAX + 1)) + go,
    }
    return {f"{name}{tls}": bytes([tls]) + data for name, data in sessions.items() for tls in range(3)}


TARGETS = {"transmission": transmission, "handshake": handshake}


def main(folder: str) -> None:
    for target, make in TARGETS.items():
        directory = Path(folder) / target
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in make().items():
            (directory / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main(sys.argv[1])
