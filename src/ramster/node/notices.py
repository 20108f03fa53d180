"""What the node's log says by itself: a pure comparison of two looks at the node.

Native threads count and change states; they never write. So a peer that goes, pages that are lost, a lender that takes
nothing, a store that refuses are noticed here, once each, with their reason and what it means for whom. What one
request of somebody else caused (a refused connection, a bad certificate) is said where it happens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ramster.config.units import counted, show_size
from ramster.constants import PAGE_BYTES

# A peer is said to stand still after this many probes without an answer; the idle time-out, which ends its link, comes
# later.
STILL_PROBES: Final = 3


@dataclass(frozen=True, slots=True)
class PeerLook:
    """One peer, as far as it has been connected since the node started."""

    name: str
    up: bool
    gone: bool = False
    """It said goodbye."""
    reason: str = ""
    lost: bool = False
    """Out of reach for longer than pages are waited for."""
    silent_s: float = 0.0
    """For how long nothing came on a connection that is up."""
    pages: int = 0
    """Of one that is `lost`: stored pages whose only copy it has."""
    damaged: int = 0
    """Reads that got bytes from it which fail their check, so far."""


@dataclass(frozen=True, slots=True)
class RegionLook:
    name: str
    pid: int
    lost: int = 0
    """Pages that somebody touched and that nobody has, now."""
    refused: int = 0
    """Faults that found no room in time, so far."""
    removed: int = 0
    """Pages that the application itself took away while their only copy was there, so far."""
    full: bool = False
    """Nothing has taken a further page of it, a short while ago or now."""


@dataclass(frozen=True, slots=True)
class SwapLook:
    """An export that this machine's kernel swaps on."""

    name: str
    deserted: bool = False
    """It had clients, and none of them is left."""


@dataclass(frozen=True, slots=True)
class Look:
    """The node at one moment."""

    peers: dict[int, PeerLook] = field(default_factory=dict)
    regions: dict[int, RegionLook] = field(default_factory=dict)
    swaps: dict[int, SwapLook] = field(default_factory=dict)
    damaged: int = 0
    """Reads of pages that failed their check, here or as they came back, so far: of one page, each counts."""
    puts_refused: int = 0
    pages_lost: int = 0
    """Stored pages whose only copy is gone, now."""
    cuts: int = 0
    """How often somebody had cut the spill file short, so far."""
    pages_cut: int = 0
    """Pages that this has cost, so far; `pages_lost` has them too while they are not put again or flushed."""


@dataclass(frozen=True, slots=True)
class Notice:
    level: int
    text: str
    per: str = ""
    """What has a window of its own in the log."""


def notices(before: Look, now: Look, probe_s: float) -> Iterator[Notice]:
    """What is worth a line, of all that changed. The first look has an empty one before it.

    probe_s: how often a silent peer is probed.
    """
    cut = now.pages_cut - before.pages_cut
    lost = now.pages_lost - cut > before.pages_lost
    for number, peer in now.peers.items():
        yield from _peer(before.peers.get(number), peer, STILL_PROBES * probe_s, lost)
    if now.cuts > before.cuts:
        yield Notice(
            logging.ERROR if cut else logging.WARNING,
            "somebody else has cut the spill file short: "
            + (f"{_pages(cut)} that lay there alone are lost" if cut else "nothing that lay there alone is lost"),
        )
    if lost:
        yield Notice(
            logging.ERROR,
            f"{_pages(now.pages_lost - cut - before.pages_lost)} have lost their only copy, {now.pages_lost} in all: "
            f"{_whose(now)}",
        )
    for number, region in now.regions.items():
        yield from _region(before.regions.get(number, RegionLook(region.name, region.pid)), region, _why(now))
    for number in {**before.swaps, **now.swaps}:
        yield from _swap(before.swaps.get(number), now.swaps.get(number))
    if now.damaged > before.damaged:
        yield _damaged(before, now)
    if now.puts_refused > before.puts_refused:
        yield Notice(
            logging.WARNING,
            f"the arena is full and nothing leaves it: {counted(now.puts_refused - before.puts_refused, 'put')} "
            f"refused; enlarge [arena] size, add a lender or a spill file",
        )


def _damaged(before: Look, now: Look) -> Notice:
    had = {number: peer.damaged for number, peer in before.peers.items()}
    lenders = {peer.name: n for number, peer in now.peers.items() if (n := peer.damaged - had.get(number, 0)) > 0}
    count = now.damaged - before.damaged
    here = count - sum(lenders.values())
    whose = ", ".join(f"{n} from node {name}" for name, n in lenders.items())
    look = [f"at the RAM of {', '.join(lenders)}, and whether it is to be trusted"] if lenders else []
    look += ["at the RAM of this machine, and at the spill file where there is one"] if here > 0 or not lenders else []
    return Notice(
        logging.ERROR,
        f"{counted(count, 'read')} met bytes that fail their check{f' ({whose})' if whose else ''}; a page that has no "
        f"other copy is reported as damaged: look {'; '.join(look)}",
    )


def _peer(before: PeerLook | None, now: PeerLook, still_s: float, lost: bool) -> Iterator[Notice]:
    """lost: pages have lost their only copy since the look before."""
    name = f"node {now.name}"
    was_up = before is not None and before.up
    was_still = before is not None and before.up and before.silent_s >= still_s
    if now.gone and not (before is not None and before.gone):
        if now.pages or lost:
            yield Notice(logging.WARNING, f"{name} has stopped and said so: what it kept for this node is lost", name)
        else:
            yield Notice(logging.INFO, f"{name} has stopped", name)
    elif was_up and not now.up and not now.gone:
        yield Notice(logging.WARNING, f"lost the link to {name}: {now.reason or 'no reason is known'}", name)
    if now.lost and not now.gone and before is not None and not before.lost:
        yield Notice(
            logging.ERROR,
            f"{name} has been out of reach for too long: "
            + (f"{_pages(now.pages)} whose only copy it has" if now.pages else "pages whose only copy it has")
            + " cannot be had, unless it comes back with the same memory",
            name,
        )
    if now.up and before is not None and not was_up and (before.gone or before.reason):
        yield Notice(logging.INFO, f"the link to {name} is up again", name)
    if now.up and now.silent_s >= still_s and not was_still:
        yield Notice(
            logging.WARNING,
            f"{name} has answered nothing for {now.silent_s:.0f} s although its link is up: it stands still, or the "
            "network between",
            name,
        )
    elif now.up and was_still and now.silent_s < still_s:
        yield Notice(logging.INFO, f"{name} answers again", name)


def _region(before: RegionLook, now: RegionLook, why: str) -> Iterator[Notice]:
    name = f"region {now.name} of process {now.pid}"
    if now.lost > before.lost:
        yield Notice(
            logging.ERROR,
            f"{name}: {_pages(now.lost - before.lost)} touched and lost, {now.lost} in all ({why}); that is SIGBUS",
            name,
        )
    elif before.lost and not now.lost:
        yield Notice(logging.INFO, f"{name}: its lost pages can be had again, or were let go", name)
    if now.removed > before.removed:
        yield Notice(
            logging.WARNING,
            f"{name} removed {_pages(now.removed - before.removed)} whose only copy was there (MADV_REMOVE): lost",
            name,
        )
    if now.full and not before.full:
        yield Notice(
            logging.WARNING,
            f"{name} is full: neither arena, lenders nor spill file take a page of it, so what it writes waits for "
            "room and is SIGBUS in the end; enlarge [arena] size, add a lender or a spill file",
            name,
        )
    elif before.full and not now.full:
        yield Notice(logging.INFO, f"{name} has room again", name)
    if now.refused > before.refused:
        yield Notice(
            logging.ERROR,
            f"{name}: full, {_pages(now.refused - before.refused)} found no room in time and gave SIGBUS; enlarge "
            "[arena] size, add a lender or a spill file",
            name,
        )


def _swap(before: SwapLook | None, now: SwapLook | None) -> Iterator[Notice]:
    """None: there is no such export, or no kernel swaps on it."""
    was, is_ = before is not None and before.deserted, now is not None and now.deserted
    if now is not None and is_ and not was:
        yield Notice(
            logging.WARNING,
            f"export {now.name}: the last connection of this machine's kernel, which swaps on it, is gone (nbdfuse or "
            "nbd-client was killed?): reads of its pages fail with I/O errors, and a process that needs one is killed; "
            f"`ramster swap status` says more, `ramster swap off {now.name}` ends it",
            now.name,
        )
    elif before is not None and was and not is_:
        how = "is connected to it again" if now is not None else "does not swap on it any more"
        yield Notice(logging.INFO, f"export {before.name}: this machine's kernel {how}", before.name)


def _why(now: Look) -> str:
    """Which peers can be the reason that pages are lost."""
    away = [
        f"node {peer.name} {'has stopped' if peer.gone else f'is out of reach ({peer.reason})'}"
        for peer in now.peers.values()
        if not peer.up
    ]
    return ", ".join(away) if away else "their lender restarted or dropped them, or they failed their check"


def _whose(now: Look) -> str:
    gone = [f"node {peer.name} has stopped" for peer in now.peers.values() if peer.gone]
    return ", ".join(gone) if gone else "their lender came back without its memory, or dropped them"


def _pages(count: int) -> str:
    return f"{counted(count, 'page')} ({show_size(count * PAGE_BYTES)})"
