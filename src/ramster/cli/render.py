"""Status objects as tables for people. Tolerant: a node of another version may say less or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ramster.cli.demo.plan import show_size
from ramster.constants import PAGE_BYTES
from ramster.frontswap.swap import overcommitted

_STATE_STYLES = {"up": "green", "connecting": "yellow", "down": "red"}


def status_tables(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The parts of a status, in reading order."""
    yield _node(status)
    yield _memory(status)
    if warning := overcommitted(status):
        yield Text(f"Warning: {warning}.\n", style="yellow")
    yield _guard(status.get("guard") or {})
    yield _peers(status.get("peers") or [])
    yield _regions(status.get("regions") or [])
    yield export_table(status.get("exports") or [])
    yield _foreign(status.get("lend") or {})


def losses(would_lose: Mapping[str, Any]) -> list[str]:
    """A line for each thing that a stop would lose, empty if nothing."""
    lines = [
        f"{show_size(int(size))} kept for node {owner}, which has no other copy"
        for owner, size in sorted((would_lose.get("foreign") or {}).items())
    ]
    for region in would_lose.get("regions") or []:
        name = region.get("name") or f"region {region.get('id', '?')}"
        size = show_size(int(region.get("pages", 0)) * PAGE_BYTES)
        lines.append(f"{size} of {name} of process {region.get('pid', '?')}, which runs on it")
    for export in would_lose.get("exports") or []:
        size, clients = show_size(int(export.get("pages", 0)) * PAGE_BYTES), int(export.get("connections", 0))
        used = f", which {clients} connection{'s' * (clients != 1)} use{'s' * (clients == 1)}" if clients else ""
        lines.append(f"{size} stored in export {export.get('name', '?')}{used}")
    known = {"foreign", "regions", "exports"}
    lines += [f"{key}: {value}" for key, value in sorted(would_lose.items()) if key not in known and value]
    return lines


def _int(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key, 0)
    return value if isinstance(value, int) else 0


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _node(status: Mapping[str, Any]) -> Text:
    seconds = int(status.get("uptime_s", 0))
    return Text.assemble(
        ("node ", ""),
        (str(status.get("name", "?")), "bold"),
        f" (number {status.get('number', '?')}) {status.get('state', '?')}, pid {status.get('pid', '?')}, "
        f"version {status.get('version', '?')}, up {show_seconds(seconds)}, generation {status.get('generation', '?')}",
    )


def show_seconds(seconds: int) -> str:
    """Seconds as people say them: 5 s, 3 min, 2 h 5 min, 4 d 1 h."""
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def _memory(status: Mapping[str, Any]) -> Table:
    arena = status.get("arena") or {}
    counters = status.get("counters") or {}
    segment = _int(arena, "segment_bytes")
    total, free = _int(arena, "frames_total"), _int(arena, "frames_free")
    table = _table("Memory", "", "value")
    table.show_header = False
    table.add_row(
        "arena",
        f"{show_size((total - free) * segment)} of {show_size(_int(arena, 'arena_bytes'))} used"
        + (", locked" if arena.get("locked") else ", not locked"),
    )
    table.add_row("segments here / away", f"{_int(arena, 'segments_local')} / {_int(arena, 'segments_remote')}")
    table.add_row(
        "pages here / away",
        f"{_int(arena, 'pages_local') + _int(arena, 'pages_filled')} / {_int(arena, 'pages_remote')}",
    )
    bytes_in, compressed = _int(arena, "bytes_in"), _int(arena, "bytes_compressed")
    if compressed:
        table.add_row("compression", f"{bytes_in / compressed:.2f} : 1")
    table.add_row("puts", str(_int(counters, "puts")))
    table.add_row("gets here / away", f"{_int(counters, 'local_gets')} / {_int(counters, 'remote_gets')}")
    if damaged := _int(counters, "pages_damaged"):
        table.add_row(Text("damaged pages", style="red"), str(damaged))
    if lost := _int(arena, "pages_lost"):
        table.add_row(Text("lost pages", style="red"), str(lost))
    if spill := status.get("spill"):
        table.add_row("spill file", _spill(spill))
        if missing := _int(spill, "unmirrored"):
            table.add_row(
                Text("unmirrored", style="yellow"),
                f"{missing} segments, {_int(spill, 'pages_unmirrored')} pages: lost if their lender goes",
            )
    return table


def _spill(spill: Mapping[str, Any]) -> str:
    used = f"{show_size(_int(spill, 'bytes_used'))} of {show_size(_int(spill, 'bytes_total'))} used"
    copies = f", {_int(spill, 'mirrored')} segments mirrored" if spill.get("mirror") else ""
    return f"{used}{copies}, {_int(spill, 'pages')} pages here alone"


def _guard(guard: Mapping[str, Any]) -> RenderableType:
    if not guard:
        return Text("")
    table = _table("Guard: what a kernel that swaps on this node relies on", "", "state", "detail")
    table.columns[2].justify = "left"
    for name, check in guard.items():
        state = str(check.get("state", "?"))
        # A refusal is a fault only for a node that is swapped on; the node itself warns then.
        table.add_row(
            name, Text(state, style={"ok": "green", "refused": "yellow"}.get(state, "")), str(check.get("detail", ""))
        )
    return table


def _peers(peers: list[Mapping[str, Any]]) -> RenderableType:
    if not peers:
        return Text("No peers: pages that do not fit in the arena have nowhere to go.\n")
    table = _table("Peers", "name", "link", "address", "credit", "sent", "received", "gets", "round trip p50")
    for peer in peers:
        state = str(peer.get("state", "?"))
        reason = str(peer.get("reason") or "")
        standing = str(peer.get("standing") or "trusted")
        if state == "up" and standing != "trusted":
            state, reason = "up, not trusted", standing
        trip = _int(peer, "round_trip_p50_us")
        table.add_row(
            str(peer.get("name", "?")),
            Text(
                f"{state} ({reason})" if reason and state != "up" else state, style=_STATE_STYLES.get(state, "yellow")
            ),
            str(peer.get("address", "?")),
            str(_int(peer, "credit")),
            show_size(_int(peer, "bytes_sent")),
            show_size(_int(peer, "bytes_received")),
            str(_int(peer, "gets")),
            f"{trip} us" if trip else "-",
        )
    return table


def _regions(regions: list[Mapping[str, Any]]) -> RenderableType:
    if not regions:
        return Text("No regions.\n")
    table = _table(
        "Regions",
        "name",
        "pid",
        "processes",
        "size",
        "resident",
        "local",
        "remote",
        "lost",
        "faults",
        "local p50/p99",
        "remote p50/p99",
    )
    for region in regions:
        lost = _int(region, "lost_pages")
        table.add_row(
            str(region.get("name") or region.get("id", "?")),
            str(region.get("pid", "?")),
            str(_int(region, "attached_processes")),
            *(
                show_size(_int(region, key) * PAGE_BYTES)
                for key in ("pages", "resident_pages", "local_pages", "remote_pages")
            ),
            Text(str(lost), style="red" if lost else ""),
            str(_int(region, "faults")),
            f"{_int(region, 'fault_local_p50_us')}/{_int(region, 'fault_local_p99_us')} us",
            f"{_int(region, 'fault_remote_p50_us')}/{_int(region, 'fault_remote_p99_us')} us",
        )
    return Group(table, *(Text(line, style="yellow") for line in map(thrashing, regions) if line))


def thrashing(region: Mapping[str, Any]) -> str:
    """What to say of a region that thrashes; nothing of others."""
    enough = _int(region, "enough_pages")
    if not region.get("thrashing"):
        return ""
    return (
        f"region {region.get('name') or region.get('id', '?')} is thrashing: pages come back soon after they left; "
        f"about {show_size(enough * PAGE_BYTES)} resident would end it "
        f"(it may have {show_size(_int(region, 'budget_pages') * PAGE_BYTES)})"
    )


def export_table(exports: Sequence[Mapping[str, Any]]) -> RenderableType:
    """All exports of a node."""
    if not exports:
        return Text("No exports.\n")
    table = _table("Exports (NBD)", "name", "size", "here", "away", "lost", "clients", "reads", "writes", "errors")
    for export in exports:
        gone, errors = _int(export, "pages_gone"), _int(export, "errors")
        table.add_row(
            str(export.get("name", "?")) + (" (read-only)" if export.get("read_only") else ""),
            show_size(_int(export, "size_bytes")),
            show_size(_int(export, "pages_here") * PAGE_BYTES),
            show_size(_int(export, "pages_away") * PAGE_BYTES),
            Text(str(gone), style="red" if gone else ""),
            str(_int(export, "connections")),
            str(_int(export, "reads")),
            str(_int(export, "writes")),
            Text(str(errors), style="red" if errors else ""),
        )
    return table


def _foreign(lend: Mapping[str, Any]) -> RenderableType:
    granted, total = _int(lend, "bytes"), _int(lend, "frames_total")
    if not granted:
        return Text("This node lends nothing.\n")
    frame = granted // total if total else 0
    table = _table(f"Lent to others: {show_size(_int(lend, 'bytes_used'))} of {show_size(granted)}", "owner", "held")
    for owner, frames in sorted((lend.get("owners") or {}).items()):
        table.add_row(str(owner), show_size(int(frames) * frame))
    return table
