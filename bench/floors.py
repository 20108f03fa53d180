"""Floors that other modules' paths stand on: a bare userfaultfd handler, a TCP ping-pong."""

from __future__ import annotations

import socket

from bench.rows import Row, figure

from ramster.errors import PermissionMissing
from ramster.testing import _floors


def bench_bare_fault(quick: bool) -> list[Row]:
    """p50 of one fault; several pages per COPY cost more each and less per page."""
    rows = []
    rounds = 3 if quick else 7
    for pages in (1, 8, 32):
        for idle in (False, True):
            faults = (100 if idle else 1000) if quick else (400 if idle else 4000 // min(pages, 8))

            def measure(pages: int = pages, idle: bool = idle, faults: int = faults) -> float:
                return _floors.fault(pages, idle, faults)[0] / 1000

            try:
                row = figure(
                    f"bare fault, {pages} page{'s' * (pages > 1)} per copy, {'from idle' if idle else 'busy'}",
                    "us p50",
                    measure,
                    rounds=rounds,
                )
            except PermissionMissing as error:
                return [Row("bare fault", None, "us p50", "", None, note=str(error))]
            rows.append(row)
    return rows


def bench_ping_pong(quick: bool) -> Row:
    """p50 of a 64-byte request and a 4 KiB reply over loopback TCP between two native threads."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return figure(
                "TCP ping-pong, 4 KiB reply",
                "us p50",
                lambda: _floors.ping_pong(near.fileno(), far.fileno(), 64, 4096, 1000 if quick else 10000)[0] / 1000,
                rounds=3 if quick else 7,
            )


def run(quick: bool) -> list[Row]:
    return [*bench_bare_fault(quick), bench_ping_pong(quick)]
