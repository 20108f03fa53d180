"""How much of what a node serves one caller may have, so that nobody uses up what others need. Decisions alone.

Limits that all callers share are how one locks out the others: a part is kept for those on this machine, of it a part
for what this machine's kernel swaps on, and no single export, address, user or process has all of the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

# Of fewer connections there is nothing to share out.
SHARED_FROM: Final = 8
# Each region costs threads, two sockets and a page table; far above what one machine's applications need.
REGIONS_MAX: Final = 256
REGIONS_OF_A_PROCESS_MAX: Final = 128
REGIONS_OF_A_USER_MAX: Final = 192


@dataclass(frozen=True, slots=True)
class NbdClient:
    """Who uses an export, or wants to. source: address, or user. local: through nbd.sock. own: root or the node's user,
    who could end the node as well.
    """

    export: str
    source: str
    local: bool
    own: bool = False


def nbd_refusal(limit: int, clients: Collection[NbdClient], coming: NbdClient, *, swap: bool) -> str:
    """Why one more connection may not use its export; empty where it may. limit: of all connections. clients: those
    there are. swap: this machine swaps on the export.
    """
    count, knob = len(clients), "([nbd] connections_max)"
    if count >= limit:
        return f"this node serves {limit} connections already {knob}"
    kept = 0 if coming.local and swap else limit // 8 if coming.local else limit // 4
    if count >= limit - kept:
        whom = "what this machine swaps on" if coming.local else "nbd.sock"
        return f"this node serves {count} connections, and keeps the last {kept} of {limit} for {whom} {knob}"
    if limit < SHARED_FROM:
        return ""
    share = limit // 2
    if not coming.local and sum(not each.local and each.export == coming.export for each in clients) >= share:
        return f"the export has {share} connections by TCP, the most that one may have of {limit} {knob}"
    if not coming.own and sum(each.source == coming.source for each in clients) >= share:
        return f"{coming.source} has {share} connections, the most that one may have of {limit} {knob}"
    return ""


def region_refusal(count: int, of_process: int, of_user: int, *, own: bool) -> str:
    """Why one more region may not be made; empty where it may. of_process, of_user: regions that the caller has. own:
    root or the node's user.
    """
    if count >= REGIONS_MAX:
        return f"this node has {REGIONS_MAX} regions already, its limit"
    if of_process >= REGIONS_OF_A_PROCESS_MAX:
        return f"this process has {of_process} regions already, the most that one may have of a node's {REGIONS_MAX}"
    if not own and of_user >= REGIONS_OF_A_USER_MAX:
        return f"this user has {of_user} regions already, the most that one may have of a node's {REGIONS_MAX}"
    return ""
