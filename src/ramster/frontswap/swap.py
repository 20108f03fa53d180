"""This machine's kernel swaps on an export of its node: the order of doing it and of undoing it.

`on` makes the export, attaches it, writes the swap header, switches it on; each step is noted in RUN_DIR/swap/NAME.json
before it is taken. `off` goes the other way: swapoff first, then the device, the mount and nbdfuse, the export last. It
looks at what is there and not at how far `on` came, so it ends every half-done state, and may be run again. What is
unsafe is `swap_safety`, what is on record `swap_records`, how a swap is doing `swap_state`; users find all of it here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ramster.config.units import counted, format_bytes
from ramster.constants import MIB, PAGE_BYTES
from ramster.errors import NodeUnreachable, PermissionMissing, RamsterError, Refused, UsageError
from ramster.frontswap.cgroups import tight
from ramster.frontswap.devices import (
    CONNECTIONS_MAX,
    Bridge,
    KernelNbd,
    Place,
    Swap,
    Way,
    daemons,
    detach,
    has_nbd,
    meminfo,
    mkswap,
    nbd_attachment,
    need,
    reserve_bytes,
    shielded,
    step,
    swap_on,
    swapoff,
    swapon,
    swaps,
)
from ramster.frontswap.swap_records import (
    Record,
    check_name,
    half_done,
    locked,
    look_up,
    names,
    own_devices,
    place,
    read,
    recorded,
    write,
)
from ramster.frontswap.swap_safety import (
    Verdict,
    guard_notes,
    judge,
    other_swap_notes,
    overcommitted,
    refuse_if_no_room,
    reserve_notes,
    zswap_on,
)
from ramster.frontswap.swap_state import Node, describe, health, judge_state, status
from ramster.signals import unbroken

__all__ = [
    "DEFAULT_PRIORITY",
    "Ended",
    "Node",
    "Plan",
    "Record",
    "Verdict",
    "check",
    "choose_way",
    "half_done",
    "health",
    "judge",
    "judge_state",
    "names",
    "need_root",
    "off",
    "on",
    "other_swap_notes",
    "overcommitted",
    "place",
    "read",
    "recorded",
    "refuse_if_no_room",
    "reserve_notes",
    "status",
    "write",
]

DEFAULT_NAME: Final = "swap0"
#: Behind zram (100 where zram-generator makes it), before disks (below 0 unless told otherwise).
DEFAULT_PRIORITY: Final = 50
PRIORITY_MAX: Final = 32767
#: Below, mkswap's own header and the kernel's clusters are most of it.
SIZE_BYTES_MIN: Final = MIB
# swapoff reads one page after the other; a tier that gives none for so long is not coming back by itself.
STALLED_S: Final = 120.0
RELEASE_S: Final = 10.0  # for the node to see that the last client has gone
_POLL_S: Final = 0.2  # neither swapoff nor a closing connection tells when it is done

Say = Callable[[str], None]


# --- on -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for."""

    name: str
    size_bytes: int
    priority: int = DEFAULT_PRIORITY
    accept_loss: bool = False
    connections: int = 4
    way: str = "auto"


def check(plan: Plan) -> None:
    """UsageError for a name that is none and for numbers that make no sense."""
    check_name(plan.name)
    if plan.size_bytes < SIZE_BYTES_MIN:
        raise UsageError(
            f"--size is {format_bytes(plan.size_bytes)}; allowed is {format_bytes(SIZE_BYTES_MIN)} or more"
        )
    if not 0 <= plan.priority <= PRIORITY_MAX:
        raise UsageError(f"--priority is {plan.priority}; allowed is 0 to {PRIORITY_MAX}")
    if not 1 <= plan.connections <= CONNECTIONS_MAX:
        raise UsageError(f"--connections is {plan.connections}; allowed is 1 to {CONNECTIONS_MAX}")
    if plan.way not in ("auto", "nbd", "bridge"):
        raise UsageError(f"--way is {plan.way!r}; allowed are auto, nbd and bridge")


def need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise PermissionMissing(f"{what} needs root; run it with sudo")


def choose_way(wanted: str) -> Way:
    """Refused where the one asked for cannot be had."""
    if wanted == "bridge":
        return Bridge()
    if has_nbd(load=True):
        return KernelNbd()
    if wanted == "nbd":
        raise Refused("this kernel has no nbd module (modprobe nbd fails); --way bridge works without")
    return Bridge()


def on(
    node: Node,
    run_dir: Path,
    plan: Plan,
    say: Say,
    patience: Callable[[str], bool] = lambda _: False,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Ends with the kernel swapping on a new export, described as by `describe`, or with nothing changed.

    patience: of a wait, told for what; sleeps a moment and is true until the time is over. tell: shows the user what
    came of it; a swap that nobody could be told of is undone, too.
    Refused with every reason at once; what could be better goes to `say`. An error in the middle undoes what was done.
    """
    check(plan)
    where = place(run_dir, plan.name)
    need_root("switching swap on")
    need("mkswap", "swapon", "swapoff")
    node.status()  # a run directory of nobody is not made
    way = choose_way(plan.way)
    # Without the lock: meanwhile `off` of another swap has its turn.
    while (absent := _awaited(node, where, plan)) and patience(
        f"waiting for the link to {', '.join(absent)}: without what is lent there is too little room"
    ):
        pass
    with locked(where) as where:
        if read(where) is not None:
            raise Refused(
                f"there is a swap {plan.name} already (ramster swap status); "
                f"end it with `ramster swap off {plan.name}`, or choose another --name"
            )
        verdict = _judged(node, plan)
        if verdict.refusals:
            raise Refused("; and ".join(verdict.refusals))
        if _exists(node, plan.name):
            raise Refused(
                f"the node has an export {plan.name} already; "
                f"remove it with `ramster export rm {plan.name}`, or choose another --name"
            )
        if way.name == "bridge":
            say(
                "this kernel has no nbd: nbdfuse and a loop device stand in for it, which works but is slower"
                if plan.way == "auto"
                else "through nbdfuse and a loop device, which is slower than nbd"
            )
        notes = (*reserve_notes(reserve_bytes()), *other_swap_notes(swaps(), plan.priority, zswap_on()))
        for warning in (*verdict.warnings, *notes):
            say(warning)
        record = Record(plan.name, plan.size_bytes, plan.priority, way.name)
        where = replace(where, token=record.token)
        try:
            record = _make(node, where, plan, way, record)
            with contextlib.suppress(RamsterError):  # it swaps, whatever the node has to add
                for warning in guard_notes(node.status()):
                    if warning not in verdict.warnings:
                        say(warning)
            if way.name == "bridge":
                for pid in daemons(where):
                    for warning in shielded(pid):
                        say(warning)
            made = describe(where, record, node)
            tell(made)
            return made
        except BaseException as error:  # also after the last step: whoever interrupts learns nothing of a swap
            _undo_after(error, node, where, say)
            raise


def _judged(node: Node, plan: Plan) -> Verdict:
    return judge(node.status(), plan.size_bytes, meminfo()["MemTotal"], accept_loss=plan.accept_loss)


def _exists(node: Node, name: str) -> bool:
    return any(each.get("name") == name for each in node.exports())


def _awaited(node: Node, where: Place, plan: Plan) -> tuple[str, ...]:
    """Peers that are worth waiting for: where the name is taken, too, waiting ends in a refusal."""
    found = _judged(node, plan).awaited
    return () if not found or read(where) is not None or _exists(node, plan.name) else found


def _make(node: Node, where: Place, plan: Plan, way: Way, record: Record) -> Record:
    write(where, record)
    size = -(-plan.size_bytes // PAGE_BYTES) * PAGE_BYTES
    try:
        node.create_export(plan.name, size, swap=True)
    except (Refused, UsageError):
        where.record.unlink()  # an export of that name, if there is one, is not ours
        raise
    record = replace(record, made=True)
    write(where, record)

    def chosen(device: str) -> None:
        write(where, replace(record, device=device))

    device = way.attach(where, plan.connections, chosen)
    record = replace(record, device=device, attached=True, attachment=nbd_attachment(device))
    write(where, record)
    step(mkswap(where, device), "writing the swap header", where.lock)
    step(swapon(device, plan.priority), "switching the swap on", where.lock)
    record = replace(record, done=True)
    write(where, record)
    return record


def _undo_after(error: BaseException, node: Node, where: Place, say: Say) -> None:
    """Whatever `_make` has done, undone; the record stays if that fails too, so that `off` can try again."""
    try:
        with unbroken():
            record = read(where)
            if record is not None:
                _take_down(node, where, record)
    except (RamsterError, OSError) as second:
        say(f"not all of it could be undone ({second}); run `ramster swap off {where.name}`")


# --- off ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """What `off` did. notes: what was not as it should be."""

    name: str
    done: tuple[str, ...]
    notes: tuple[str, ...] = ()


def off(node: Node, run_dir: Path, name: str, *, force: bool, say: Say) -> Ended:
    """Nothing of it is left, whatever state it was in. Again, or for a name that is not there: done is empty.

    Refused while RAM has no room for what is out there, unless forced; and when something does not end in time: then
    the record stays, and the next call goes on.
    """
    where = place(run_dir, name)
    need_root("switching swap off")
    if not where.directory.is_dir():
        return Ended(name, ())
    with locked(where) as where:
        there = look_up(where)
        if there is None:
            return Ended(name, ())
        where, record = there
        done = []
        for device in own_devices(where, record):
            row = swap_on(device)
            if row is not None:
                if not force:
                    refuse_if_no_room(row, swaps(), meminfo(), list(tight()))
                _swap_off(where, row, say)
                done.append(f"switched {device} off")
        more, notes = _take_down(node, where, record)
        return Ended(name, (*done, *more), tuple(notes))


def _swap_off(where: Place, row: Swap, say: Say) -> None:
    """Minutes, when much is out there. Interrupted, it leaves the swap on, and nothing is lost."""
    device = row.device
    last, seen = time.monotonic(), row.used_bytes
    said = time.monotonic()
    with subprocess.Popen(
        swapoff(device),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=() if where.lock is None else (where.lock,),
    ) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    pass
                now, left = time.monotonic(), swap_on(device)
                used = left.used_bytes if left is not None else 0
                if used != seen:
                    last, seen = now, used
                if now - said >= 1.0:
                    said = now
                    say(f"swapping in: {counted(used // PAGE_BYTES, 'page')} left ({used // MIB} MiB)")
                if now - last > STALLED_S:
                    raise Refused(
                        f"swapoff {device} has read nothing for {STALLED_S:g} s, "
                        f"{counted(seen // PAGE_BYTES, 'page')} left; "
                        "the swap stays on; look at `ramster status`: is a lender away?"
                    )
        except BaseException:
            process.terminate()
            raise
    if process.returncode and swap_on(device) is not None:
        raise Refused(f"swapoff {device} failed: {' '.join(errors.split())}; the swap stays on, nothing is lost")


def _take_down(node: Node, where: Place, record: Record) -> tuple[list[str], list[str]]:
    """Everything below the swap itself; (done, notes). Refused while it is still on, or when something does not go."""
    for each in own_devices(where, record):
        if (row := swap_on(each)) is not None:  # only after an `on` that failed: little can be out there yet
            _swap_off(where, row, lambda _: None)
    notes: list[str] = []
    device = None
    if record.way == "nbd" and record.device is not None:
        now = nbd_attachment(record.device)
        # A crash may have come between the attaching and the note of it, which is before anything swaps on it.
        mine = (
            now == record.attachment if record.attached else swap_on(record.device) is None and _ours(node, where.name)
        )
        if now is not None and mine:
            device = record.device
        elif now is not None:
            notes.append(f"{record.device} is attached to something else by now, which stays")
    with contextlib.suppress(RamsterError):  # it may have none, or be gone
        node.change_export(where.name, swap=False)  # so that it does not warn of the connections that end now
    done = detach(where, device)
    try:
        # Also when the record does not know of it: a crash came between the making and the note of it.
        done += _remove_export(node, where.name)
    except NodeUnreachable as error:
        notes.append(f"the export {where.name} was not removed: {error}")
    where.record.unlink(missing_ok=True)
    return done, notes


def _ours(node: Node, name: str) -> bool:
    """Whether somebody uses the export: a device in the record may have gone to another program meanwhile."""
    with contextlib.suppress(NodeUnreachable):
        return any(each.get("name") == name and each.get("connections") for each in node.exports())
    return False


def _remove_export(node: Node, name: str) -> list[str]:
    until = time.monotonic() + RELEASE_S
    while _exists(node, name):
        try:
            node.remove_export(name)
        except Refused:  # the node has not yet seen the last connection close
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_S)
            continue
        return [f"removed the export {name}"]
    return []
