"""Status objects as tables for people. Tolerant: a node of another version may say less or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ramster.cli.tables import Part, Table
from ramster.config.units import counted, show_seconds, show_size
from ramster.constants import PAGE_BYTES
from ramster.frontswap.swap import overcommitted
from ramster.logs import escaped

_STATE_STYLES = {"up": "green", "connecting": "yellow", "down": "red"}


def status_tables(status: Mapping[str, Any]) -> Iterator[Part]:
    """The parts of a status, in reading order."""
    yield _node(status)
    yield _memory(status)
    if warning := overcommitted(status):
        yield f"Warning: {warning}.", "yellow"
        yield ""
    if guard := status.get("guard"):
        yield _guard(guard)
    yield from _peers(status.get("peers") or [])
    yield from _regions(status.get("regions") or [])
    yield from export_table(status.get("exports") or [])
    yield from _foreign(status.get("lend") or {})


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
        used = f", which {counted(clients, 'connection')} use{'s' * (clients == 1)}" if clients else ""
        lines.append(f"{size} stored in export {export.get('name', '?')}{used}")
    known = {"foreign", "regions", "exports"}
    lines += [f"{key}: {value}" for key, value in sorted(would_lose.items()) if key not in known and value]
    return [escaped(line) for line in lines]


def _int(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key, 0)
    return value if isinstance(value, int) else 0


def _node(status: Mapping[str, Any]) -> str:
    seconds = int(status.get("uptime_s", 0))
    return (
        f"node {status.get('name', '?')} (number {status.get('number', '?')}) {status.get('state', '?')}, "
        f"pid {status.get('pid', '?')}, version {status.get('version', '?')}, "
        f"up {show_seconds(seconds)}, generation {status.get('generation', '?')}"
    )


def _memory(status: Mapping[str, Any]) -> Table:
    arena = status.get("arena") or {}
    counters = status.get("counters") or {}
    segment = _int(arena, "segment_bytes")
    total, free = _int(arena, "frames_total"), _int(arena, "frames_free")
    table = Table("Memory", ("", ""), left=2, heads=False)
    table.add(
        "arena",
        f"{show_size((total - free) * segment)} of {show_size(_int(arena, 'arena_bytes'))} used"
        + (", locked" if arena.get("locked") else ", not locked"),
    )
    table.add("segments here / away", f"{_int(arena, 'segments_local')} / {_int(arena, 'segments_remote')}")
    table.add(
        "pages here / away",
        f"{_int(arena, 'pages_local') + _int(arena, 'pages_filled')} / {_int(arena, 'pages_remote')}",
    )
    bytes_in, compressed = _int(arena, "bytes_in"), _int(arena, "bytes_compressed")
    if compressed:
        table.add("compression", f"{bytes_in / compressed:.2f} : 1")
    table.add("puts", str(_int(counters, "puts")))
    table.add("gets here / away", f"{_int(counters, 'local_gets')} / {_int(counters, 'remote_gets')}")
    if damaged := _int(counters, "pages_damaged"):
        lenders = [
            f"{_int(peer, 'damaged')} from {peer.get('name', '?')}"
            for peer in status.get("peers") or ()
            if _int(peer, "damaged")
        ]
        # Each read of one counts, also where another copy was right: these are no pages as of now.
        table.add(("reads of damaged pages", "red"), str(damaged) + f" ({', '.join(lenders)})" * bool(lenders))
    if lost := _int(arena, "pages_lost"):
        table.add(("lost pages", "red"), str(lost))
    if away := _int(arena, "pages_unreachable"):
        names = [str(peer.get("name", "?")) for peer in status.get("peers") or () if _int(peer, "pages_unreachable")]
        table.add(("pages out of reach", "red"), f"{away}: {', '.join(names)} has the only copy")
    if spill := status.get("spill"):
        table.add("spill file", _spill(spill))
        if cuts := _int(spill, "cuts"):
            table.add(
                ("spill file cut short", "red"),
                f"by somebody else, {counted(cuts, 'time')}; {counted(_int(spill, 'pages_cut'), 'page')} lost by it",
            )
        if unread := _int(spill, "read_errors"):
            reason = str(spill.get("last_error") or "")
            table.add(
                ("spill read errors", "red"), f"{unread}: pages there may be lost" + f" ({reason})" * bool(reason)
            )
        if missing := _int(spill, "unmirrored"):
            pages = counted(_int(spill, "pages_unmirrored"), "page")
            table.add(("unmirrored", "yellow"), f"{counted(missing, 'segment')}, {pages}: lost if their lender goes")
    return table


def _spill(spill: Mapping[str, Any]) -> str:
    used = f"{show_size(_int(spill, 'bytes_used'))} of {show_size(_int(spill, 'bytes_total'))} used"
    copies = f", {counted(_int(spill, 'mirrored'), 'segment')} mirrored" if spill.get("mirror") else ""
    return f"{used}{copies}, {counted(_int(spill, 'pages'), 'page')} here alone"


def _guard(guard: Mapping[str, Any]) -> Table:
    columns = ("check", "state", "detail")
    table = Table("Guard: what a kernel that swaps on this node relies on", columns, left=3)
    for name, check in guard.items():
        state = str(check.get("state", "?"))
        # A refusal is a fault only for a node that is swapped on; the node itself warns then.
        table.add(name, (state, {"ok": "green", "refused": "yellow"}.get(state, "")), str(check.get("detail", "")))
    return table


def _peers(peers: list[Mapping[str, Any]]) -> tuple[Part, ...]:
    if not peers:
        return ("No peers: pages that do not fit in the arena have nowhere to go.", "")
    columns = ("name", "link", "address", "credit", "sent", "received", "gets", "round trip p50")
    table = Table("Peers", columns, left=3)
    for peer in peers:
        state = str(peer.get("state", "?"))
        reason = str(peer.get("reason") or "")
        standing = str(peer.get("standing") or "trusted")
        if state == "up" and standing != "trusted":
            state, reason = "up, not trusted", standing
        trip = _int(peer, "round_trip_p50_us")
        table.add(
            str(peer.get("name", "?")),
            (f"{state} ({reason})" if reason and state != "up" else state, _STATE_STYLES.get(state, "yellow")),
            str(peer.get("address", "?")),
            str(_int(peer, "credit")),
            show_size(_int(peer, "bytes_sent")),
            show_size(_int(peer, "bytes_received")),
            str(_int(peer, "gets")),
            f"{trip} us" if trip else "-",
        )
    return (table,)


def _regions(regions: list[Mapping[str, Any]]) -> tuple[Part, ...]:
    if not regions:
        return ("No regions.", "")
    columns = (
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
    table = Table("Regions", columns)
    for region in regions:
        lost = _int(region, "lost_pages")
        table.add(
            str(region.get("name") or region.get("id", "?")),
            str(region.get("pid", "?")),
            str(_int(region, "attached_processes")),
            *(
                show_size(_int(region, key) * PAGE_BYTES)
                for key in ("pages", "resident_pages", "local_pages", "remote_pages")
            ),
            (str(lost), "red" if lost else ""),
            str(_int(region, "faults")),
            f"{_int(region, 'fault_local_p50_us')}/{_int(region, 'fault_local_p99_us')} us",
            f"{_int(region, 'fault_remote_p50_us')}/{_int(region, 'fault_remote_p99_us')} us",
        )
    said: list[Part] = [(line, "red") for line in map(full, regions) if line]
    said += [(line, "yellow") for line in map(thrashing, regions) if line]
    return (table, *said, "") if said else (table,)


def full(region: Mapping[str, Any]) -> str:
    """What to say of a region that is full, or was; nothing of others."""
    name = f"region {region.get('name') or region.get('id', '?')}"
    refused = _int(region, "refused")
    ended = f"{counted(refused, 'fault')} found no room in time and gave SIGBUS so far"
    if region.get("full"):
        ways = "enlarge [arena] size, add a lender or a spill file"
        what = f"{name} is full: neither arena, lenders nor spill file take a page of it, and what it writes waits"
        return f"{what}; {ended}; {ways}" if refused else f"{what}; {ways}"
    return f"{name} was full: {ended}" if refused else ""


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


def export_table(exports: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """All exports of a node."""
    if not exports:
        return ("No exports.", "")
    columns = ("name", "for", "size", "here", "away", "lost", "clients", "reads", "writes", "errors")
    table = Table("Exports (NBD)", columns, left=2)
    for export in exports:
        gone, errors = _int(export, "pages_gone"), _int(export, "errors")
        table.add(
            str(export.get("name", "?")) + (" (read-only)" if export.get("read_only") else ""),
            for_whom(export),
            show_size(_int(export, "size_bytes")),
            show_size(_int(export, "pages_here") * PAGE_BYTES),
            show_size(_int(export, "pages_away") * PAGE_BYTES),
            (str(gone), "red" if gone else ""),
            str(_int(export, "connections")),
            str(_int(export, "reads")),
            str(_int(export, "writes")),
            (str(errors), "red" if errors else ""),
        )
    said: list[Part] = [(line, "red") for line in map(deserted, exports) if line]
    return (table, *said, "") if said else (table,)


def for_whom(export: Mapping[str, Any]) -> str:
    """Whose certificates may use an export over TCP."""
    return ", ".join(map(str, export.get("allow") or ())) or "every client"


def deserted(export: Mapping[str, Any]) -> str:
    """What to say of an export that this machine's kernel swaps on and is not connected to any more."""
    seconds = export.get("deserted_s") or 0
    if not export.get("swap") or not seconds or not isinstance(seconds, int | float):
        return ""
    return (
        f"this machine's kernel swaps on export {export.get('name', '?')} and has not been connected to it for "
        f"{show_seconds(int(seconds))}: `ramster swap status` says what that means"
    )


def _foreign(lend: Mapping[str, Any]) -> tuple[Part, ...]:
    granted, total = _int(lend, "bytes"), _int(lend, "frames_total")
    if not granted:
        return ("This node lends nothing.", "")
    frame = granted // total if total else 0
    title = f"Lent to others: {show_size(_int(lend, 'bytes_used'))} of {show_size(granted)}"
    table = Table(title, ("owner", "held"))
    for owner, frames in sorted((lend.get("owners") or {}).items()):
        table.add(str(owner), show_size(int(frames) * frame))
    return (table,)
