"""How this machine's swaps are: what is asked for, what kernel and node show, and what is wrong. Changes nothing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol

from ramster.config.units import show_seconds
from ramster.errors import NodeAbsent, RamsterError
from ramster.frontswap.devices import Place, daemons, loop_direct, loops, mounted, nbd_attachment, swap_on, swaps
from ramster.frontswap.swap_records import Record, names, own_devices, recorded
from ramster.frontswap.swap_safety import zswap_on

#: States in which the kernel swaps on what nobody serves.
BAD: Final = ("cut off", "broken")


class Node(Protocol):
    """What is asked of the node; each method raises NodeUnreachable and the node's own refusals."""

    def status(self) -> dict[str, Any]: ...
    def exports(self) -> list[dict[str, Any]]: ...
    def create_export(self, name: str, size_bytes: int, *, swap: bool = False) -> dict[str, Any]: ...
    def change_export(self, name: str, *, swap: bool) -> dict[str, Any]: ...
    def remove_export(self, name: str, *, force: bool = False) -> None: ...


def judge_state(
    name: str,
    way: str,
    *,
    swapping: bool,
    node: bool,
    connections: int | None,
    attached: bool,
    deserted_s: float = 0.0,
) -> tuple[str, str]:
    """(state, what is wrong and what to do about it; "" where it is on).

    swapping: the kernel does, and `on` came to its end. connections: of the export; None: there is none. attached: what
    stands between kernel and node is there: nbdfuse, or the device's connection. deserted_s: for how long nobody has
    been connected who was.

    "on"; "half-done"; and, where the kernel swaps on what nobody serves, "cut off": without a node or its export,
    "broken": with something missing between them.
    """
    end = (
        f"processes that need a page of it are killed; end those that can be spared, run `ramster swap off {name}` "
        "(--force goes on where pages are lost), then switch it on again"
    )
    if not swapping:
        return "half-done", f"as a crash leaves it, or a command still at work; to end it: ramster swap off {name}"
    if not node:
        return "cut off", f"the node that it is on does not answer: {end}"
    if connections is None:
        return "cut off", f"the node has no export {name} any more: {end}"
    since = f" (nobody has been connected to its export for {show_seconds(int(deserted_s))})" if deserted_s else ""
    if not attached:
        what = "nbdfuse, which stands between the kernel and the node, is gone"
        return (
            "broken",
            f"{what if way == 'bridge' else 'its device is not connected to the node any more'}{since}: {end}",
        )
    if not connections:
        return "broken", f"{since[2:-1] or 'nothing is connected to its export (was the node started anew?)'}: {end}"
    return "on", ""


def describe(where: Place, record: Record, node: Node | None) -> dict[str, Any]:
    """One swap: what is asked for, what is there, and what the node says of its export (None: no answer).

    state, why: as of `judge_state`.
    """
    row = next((row for each in own_devices(where, record) if (row := swap_on(each)) is not None), None)
    device = row.device if row is not None else record.device
    export: dict[str, Any] | None = None
    if node is not None:
        try:
            export = next((each for each in node.exports() if each.get("name") == where.name), None)
        except RamsterError:
            node = None
    processes = daemons(where)
    there = bool(loops(where) or mounted(where.mount) or processes)
    if record.way == "nbd":
        there = record.attachment is not None and device is not None and nbd_attachment(device) == record.attachment
    state, why = judge_state(
        record.name,
        record.way,
        swapping=row is not None and record.done,
        node=node is not None,
        connections=None if export is None else int(export.get("connections", 0)),
        attached=there if record.way == "nbd" else bool(processes),
        deserted_s=0.0 if export is None else float(export.get("deserted_s", 0.0)),
    )
    return {
        "name": record.name,
        "state": state,
        "why": why,
        "way": record.way,
        "device": device,
        "attached": there,
        "direct_io": loop_direct(device) if record.way == "bridge" and device is not None else None,
        "size_bytes": row.size_bytes if row is not None else record.size_bytes,
        "used_bytes": row.used_bytes if row is not None else 0,
        "priority": row.priority if row is not None else record.priority,
        "processes": processes,
        "export": export,
    }


def status(node: Node, run_dir: Path) -> dict[str, Any]:
    """{"swaps": [...], "others": [...]}: ours, and what else this kernel swaps on. Works without a node."""
    reachable: Node | None = node
    try:
        node.exports()
    except RamsterError:
        reachable = None
    there = list(recorded(run_dir))
    ours = [describe(where, record, reachable) for where, record in there]
    devices = {device for where, record in there for device in own_devices(where, record)}
    others = [asdict(row) for row in swaps() if row.device.removesuffix(" (deleted)") not in devices]
    return {"swaps": ours, "others": others, "node": reachable is not None, "zswap": zswap_on()}


def health(node: Node, run_dir: Path) -> tuple[list[str], list[str]]:
    """(names of the swaps of this node that are on, what is wrong with the others that the kernel swaps on).

    A node that is slow to answer has not cut anything off.
    """
    if not names(run_dir):
        return [], []
    slow = False
    try:
        node.exports()
    except NodeAbsent:
        pass
    except RamsterError:
        slow = True
    rows = [describe(where, record, None if slow else node) for where, record in recorded(run_dir)]
    return (
        [each["name"] for each in rows if each["state"] == "on" or (slow and each["state"] == "cut off")],
        [
            f"the swap {each['name']} is {each['state']}: {each['why']}"
            for each in rows
            if each["state"] in BAD and not (slow and each["state"] == "cut off")
        ],
    )
