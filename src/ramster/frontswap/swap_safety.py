"""Whether this machine's kernel may swap on its node, and stop: what is unsafe, what is less good than it could be.

Decisions alone: what the node says of itself and what the kernel shows come as arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ramster.config.units import format_bytes
from ramster.constants import MIB, PAGE_BYTES
from ramster.errors import Refused
from ramster.frontswap.devices import RESERVE_WANTED, Swap

#: The kernel keeps a few bytes for each page of swap; beyond this it is a typing error rather than a plan.
SIZE_TIMES_RAM_MAX: Final = 64
#: Pages of real programs compress 2:1 to 3:1 with LZ4; a plan counts on the lower.
RATIO: Final = 2
#: RAM that `off` leaves for everybody else.
MARGIN: Final = 0.02


@dataclass(frozen=True, slots=True)
class Verdict:
    """refusals: reasons, each with what to do. warnings: what is less good than it could be.

    awaited: peers whose links are still connecting, where what they may lend is the one thing that is missing.
    """

    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    awaited: tuple[str, ...] = ()


def capacity(status: Mapping[str, Any]) -> tuple[int, int, int]:
    """Bytes of compressed pages that the node could still take: in its arena, at its lenders, in its spill file."""
    arena = status.get("arena") or {}
    segment = int(arena.get("segment_bytes", 0))
    spill = status.get("spill") or {}
    return (
        int(arena.get("frames_free", 0)) * segment,
        sum(int(peer.get("credit", 0)) for peer in status.get("peers") or [] if peer.get("state") == "up") * segment,
        max(0, int(spill.get("bytes_total", 0)) - int(spill.get("bytes_used", 0))),
    )


def _unlinked(status: Mapping[str, Any]) -> str:
    """Which of them could not be counted, and why."""
    found = [
        f"{peer.get('name', '?')} is {peer.get('state', '?')}" + (f": {peer['reason']}" if peer.get("reason") else "")
        for peer in status.get("peers") or []
        if peer.get("state") != "up"
    ]
    return f" ({', '.join(found)})" if found else ""


def overcommitted(status: Mapping[str, Any]) -> str:
    """A warning where what the node stores compresses too little for its swaps to be filled; else empty."""
    arena = status.get("arena") or {}
    given, kept = int(arena.get("bytes_in", 0)), int(arena.get("bytes_compressed", 0))
    swaps = [each for each in status.get("exports") or [] if each.get("swap")]
    missing = sum(int(each.get("size_bytes", 0)) - int(each.get("pages_stored", 0)) * PAGE_BYTES for each in swaps)
    room = sum(capacity(status))
    if not swaps or given < MIB or kept * RATIO <= given or missing * kept <= room * given:
        return ""
    return (
        f"pages here compress {given / kept:.1f}:1 and not {RATIO}:1: of the {missing // MIB} MiB that the swaps of "
        f"this machine can still take there is room for about {room * given // kept // MIB} MiB; page-outs are refused "
        "after that. Add a lender or a [spill] file, or make the swaps smaller"
    )


def judge(status: Mapping[str, Any], size: int, ram: int, *, accept_loss: bool) -> Verdict:
    """Whether a node in this state should be swapped on. ram: of this machine, bytes."""
    refusals, warnings = [], []
    if not (status.get("arena") or {}).get("locked"):
        refusals.append(
            "the node's arena is not locked in RAM: the kernel could swap out the very memory that it swaps to; "
            "set lock = true in [arena] and give the node the right to lock it (LimitMEMLOCK=infinity or CAP_IPC_LOCK)"
        )
    guard: Mapping[str, Any] = status.get("guard") or {}
    own = guard.get("locked_memory")
    if isinstance(own, Mapping) and own.get("state") != "ok":
        advice = own.get("advice") or 'set guard = "auto" in [node]'
        refusals.append(
            f"the node's own memory is not locked in RAM ({own.get('detail', '')}): to write a page out, the kernel "
            f"would wait for a node that waits for a page; {advice}"
        )
    lenders = [str(peer.get("name", "?")) for peer in status.get("peers") or []]
    remotifies = bool((status.get("remotify") or {}).get("enabled", True)) and bool(lenders)
    if remotifies and not (status.get("spill") or {}).get("mirror"):
        text = (
            f"pages that go to {', '.join(lenders)} have no second copy: when that machine dies, so do the processes "
            "whose pages it had"
        )
        if accept_loss:
            warnings.append(text)
        else:
            refusals.append(f"{text}; set path, size and mirror = true in [spill], or insist with --accept-loss")
    if size > SIZE_TIMES_RAM_MAX * ram:
        refusals.append(
            f"{format_bytes(size)} is more than {SIZE_TIMES_RAM_MAX} times the {ram // MIB} MiB of this machine; "
            "choose a smaller --size"
        )
    here, away, spilled = capacity(status)
    awaited: list[str] = []
    if (here + away + spilled) * RATIO < size:
        if not refusals:  # no link mends those
            peers = status.get("peers") or []
            awaited = [str(peer.get("name", "?")) for peer in peers if peer.get("state") == "connecting"]
        tiers = [f"{here // MIB} MiB free in the arena"]
        tiers += [f"{away // MIB} MiB granted by lenders{_unlinked(status)}"] if lenders else []
        tiers += [f"{spilled // MIB} MiB in the spill file"] if status.get("spill") else []
        refusals.append(
            f"not enough room: {' + '.join(tiers)} hold about {(here + away + spilled) * RATIO // MIB} MiB of pages "
            f"that compress {RATIO}:1, and {size // MIB} MiB are asked for; "
            "choose a smaller --size, raise size in [arena], or add a lender or a [spill] file"
        )
    return Verdict(tuple(refusals), (*warnings, *guard_notes(status)), tuple(awaited))


def guard_notes(status: Mapping[str, Any]) -> Iterator[str]:
    """What the node was refused that is no reason to refuse it. Of some things a node knows once it has the export."""
    for name, check in (status.get("guard") or {}).items():
        if name != "locked_memory" and isinstance(check, Mapping) and check.get("state") in ("refused", "unsupported"):
            advice = f"; {check['advice']}" if check.get("advice") else ""
            yield f"the node's guard: {name} {check['state']}: {check.get('detail', '')}{advice}"


def reserve_notes(reserve: int) -> Iterator[str]:
    """Whether the kernel keeps enough free for a node that it swaps on."""
    if reserve < RESERVE_WANTED:
        yield (
            f"the kernel keeps {reserve // 1024} KiB free for those who must not wait, the node among them; "
            f"more is better when all memory is taken: sysctl vm.min_free_kbytes={RESERVE_WANTED // 1024}"
        )


def other_swap_notes(rows: list[Swap], priority: int, zswap: bool) -> Iterator[str]:
    """What stands in front of it, or beside it."""
    if zswap:
        yield (
            "zswap stands in front of every swap and compresses each page a first time, for nothing; "
            "to switch it off: echo N > /sys/module/zswap/parameters/enabled"
        )
    for row in rows:
        if row.priority == priority:
            yield f"{row.device} has the priority {priority} too: the kernel takes both in turn"
        elif row.priority > priority:
            yield f"{row.device} has the higher priority {row.priority}: it is filled first"


def zswap_on() -> bool:
    with contextlib.suppress(OSError):
        return Path("/sys/module/zswap/parameters/enabled").read_text().strip() == "Y"
    return False


def refuse_if_no_room(
    row: Swap, rows: list[Swap], memory: Mapping[str, int], groups: list[tuple[Path, int, int]]
) -> None:
    """Refused when what is on `row` fits neither into RAM nor into the other swaps.

    groups: cgroups whose own limit has no room for what they have in swap, as of `cgroups.tight`: the kernel kills
    their processes when their pages come back.
    """
    elsewhere = sum(each.size_bytes - each.used_bytes for each in rows if each.device != row.device)
    free = memory["MemAvailable"] - int(memory["MemTotal"] * MARGIN)
    if row.used_bytes > free + elsewhere:
        raise Refused(
            f"{row.used_bytes // MIB} MiB are on {row.device}, and {max(0, free) // MIB} MiB of RAM"
            + (f" and {elsewhere // MIB} MiB of other swap" if len(rows) > 1 else "")
            + " are free: processes would be killed; end some of them or add another swap first, "
            "or take the risk with --force"
        )
    if groups and row.used_bytes > elsewhere:
        path, swapped, limit = groups[0]
        raise Refused(
            f"the processes in {path} have {swapped // MIB} MiB in swap, and their limit of {limit // MIB} MiB has no "
            "room for that: the kernel would kill them; let them end first (a `ramster run`?), raise the limit, "
            "or take the risk with --force"
        )
