"""This machine's kernel swaps on an export of its node: what is unsafe, the order of doing it and of undoing it.

`on` makes the export, attaches it, writes the swap header, switches it on; each step is noted in RUN_DIR/swap/NAME.json
before it is taken. `off` goes the other way: swapoff first, then the device, the mount and nbdfuse, the export last. It
looks at what is there and not at how far `on` came, so it ends every half-done state, and may be run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from ramster.config import paths
from ramster.config.units import format_bytes
from ramster.constants import MIB, NAME_PATTERN, NAME_RULE, NBD_SOCKET, PAGE_BYTES
from ramster.errors import NodeAbsent, NodeUnreachable, PermissionMissing, RamsterError, Refused, UsageError
from ramster.frontswap.cgroups import tight
from ramster.frontswap.devices import (
    CONNECTIONS_MAX,
    RESERVE_WANTED,
    Bridge,
    KernelNbd,
    Place,
    Swap,
    Way,
    daemons,
    detach,
    has_nbd,
    loop_direct,
    loops,
    meminfo,
    mkswap,
    mounted,
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
from ramster.signals import unbroken

DEFAULT_NAME: Final = "swap0"
#: Behind zram (100 where zram-generator makes it), before disks (below 0 unless told otherwise).
DEFAULT_PRIORITY: Final = 50
PRIORITY_MAX: Final = 32767
#: Below, mkswap's own header and the kernel's clusters are most of it.
SIZE_BYTES_MIN: Final = MIB
#: The kernel keeps a few bytes for each page of swap; beyond this it is a typing error rather than a plan.
SIZE_TIMES_RAM_MAX: Final = 64
#: Pages of real programs compress 2:1 to 3:1 with LZ4; a plan counts on the lower.
RATIO: Final = 2
#: RAM that `off` leaves for everybody else.
MARGIN: Final = 0.02
# swapoff reads one page after the other; a tier that gives none for so long is not coming back by itself.
STALLED_S: Final = 120.0
LOCK_S: Final = 60.0
RELEASE_S: Final = 10.0  # for the node to see that the last client has gone
_RECORD_VERSION: Final = 2
_POLL_S: Final = 0.2  # neither a lock, nor swapoff, nor a closing connection tells when it is done


class Node(Protocol):
    """What is asked of the node; each method raises NodeUnreachable and the node's own refusals."""

    def status(self) -> dict[str, Any]: ...
    def exports(self) -> list[dict[str, Any]]: ...
    def create_export(self, name: str, size_bytes: int, *, swap: bool = False) -> dict[str, Any]: ...
    def remove_export(self, name: str, *, force: bool = False) -> None: ...


Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Record:
    """What a crash must not make us forget. device: chosen, not necessarily attached. made: the export is ours.

    token: in the names of what is made, see `devices`. attachment: which one of the kernel's nbd device is ours.
    """

    name: str
    size_bytes: int
    priority: int
    way: str
    device: str | None = None
    made: bool = False
    attached: bool = False
    attachment: str | None = None
    done: bool = False
    token: str = field(default_factory=partial(secrets.token_hex, 8))
    version: int = _RECORD_VERSION


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(f"a swap's name is {NAME_RULE}; given was {name!r:.80}")


def place(run_dir: Path, name: str, token: str = "") -> Place:
    """token: of its record, "" before there is one. UsageError for what is no name."""
    _check_name(name)
    directory = paths.canonical(run_dir) / "swap"
    return Place(name, directory, paths.canonical_run_dir(run_dir) / NBD_SOCKET, token)


def look_up(where: Place) -> tuple[Place, Record] | None:
    """What is on record, and where it is; None: there is nothing. Refused as `read`."""
    record = read(where)
    return None if record is None else (replace(where, token=record.token), record)


def recorded(run_dir: Path) -> Iterator[tuple[Place, Record]]:
    """Every swap of the node with this run directory."""
    for name in names(run_dir):
        if (each := look_up(place(run_dir, name))) is not None:
            yield each


def write(where: Place, record: Record) -> None:
    """Whole or not at all."""
    staging = where.record.with_suffix(".new")
    with staging.open("w") as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(where.record)


def read(where: Place) -> Record | None:
    """None: there is none. Refused for one that nobody could have written."""
    try:
        data = json.loads(where.record.read_text())
        if data.get("version") != _RECORD_VERSION:
            raise ValueError(f"version {data.get('version')!r:.20}")
        return Record(**data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise Refused(
            f"{where.record} cannot be read ({error}); "
            "look at /proc/swaps, switch the device off by hand (swapoff DEVICE), then remove the file"
        ) from None


def names(run_dir: Path) -> list[str]:
    """Of all records, in order."""
    found = (path.stem for path in (paths.canonical(run_dir) / "swap").glob("*.json"))
    return sorted(name for name in found if NAME_PATTERN.fullmatch(name))


@contextlib.contextmanager
def _locked(where: Place) -> Iterator[Place]:
    """One command at a time changes swaps of this node: two would choose the same device."""
    where.directory.mkdir(mode=0o750, exist_ok=True)
    descriptor = os.open(where.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Refused(
                        f"another `ramster swap` has worked for more than {LOCK_S:g} s; wait until it is done"
                    ) from None
                time.sleep(_POLL_S)
        yield replace(where, lock=descriptor)
    finally:
        os.close(descriptor)


# --- what is unsafe -----------------------------------------------------------------------------------------------


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
    _check_name(plan.name)
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
    node: Node, run_dir: Path, plan: Plan, say: Say, patience: Callable[[str], bool] = lambda _: False
) -> dict[str, Any]:
    """Ends with the kernel swapping on a new export, described as by `describe`, or with nothing changed.

    patience: of a wait, told for what; sleeps a moment and is true until the time is over.
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
    with _locked(where) as where:
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
        except BaseException as error:
            _undo_after(error, node, where, say)
            raise
        with contextlib.suppress(RamsterError):  # it swaps, whatever the node has to add
            for warning in guard_notes(node.status()):
                if warning not in verdict.warnings:
                    say(warning)
        if way.name == "bridge":
            for pid in daemons(where):
                for warning in shielded(pid):
                    say(warning)
        return describe(where, record, node)


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
    with _locked(where) as where:
        there = look_up(where)
        if there is None:
            return Ended(name, ())
        where, record = there
        done = []
        for device in _devices(where, record):
            row = swap_on(device)
            if row is not None:
                if not force:
                    refuse_if_no_room(row, swaps(), meminfo(), list(tight()))
                _swap_off(where, row, say)
                done.append(f"switched {device} off")
        more, notes = _take_down(node, where, record)
        return Ended(name, (*done, *more), tuple(notes))


def _devices(where: Place, record: Record) -> list[str]:
    """The block devices that are its own: those on its file, and the one in the record.

    The latter while it is attached as we left it, or not at all: another program may have taken the same number since.
    """
    found = loops(where)
    device, left = record.device, record.attachment
    if record.way == "nbd" and device is not None and left is not None and nbd_attachment(device) in (None, left):
        found.append(device)
    return found


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
                    say(f"swapping in: {used // PAGE_BYTES} pages left ({used // MIB} MiB)")
                if now - last > STALLED_S:
                    raise Refused(
                        f"swapoff {device} has read nothing for {STALLED_S:g} s, {seen // PAGE_BYTES} pages are left; "
                        "the swap stays on; look at `ramster status`: is a lender away?"
                    )
        except BaseException:
            process.terminate()
            raise
    if process.returncode and swap_on(device) is not None:
        raise Refused(f"swapoff {device} failed: {' '.join(errors.split())}; the swap stays on, nothing is lost")


def _take_down(node: Node, where: Place, record: Record) -> tuple[list[str], list[str]]:
    """Everything below the swap itself; (done, notes). Refused while it is still on, or when something does not go."""
    for each in _devices(where, record):
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


# --- status -------------------------------------------------------------------------------------------------------


def judge_state(
    name: str, way: str, *, swapping: bool, node: bool, connections: int | None, attached: bool
) -> tuple[str, str]:
    """(state, what is wrong and what to do about it; "" where it is on).

    swapping: the kernel does, and `on` came to its end. connections: of the export; None: there is none. attached: what
    stands between kernel and node is there: nbdfuse, or the device's connection.

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
    if not attached:
        what = "nbdfuse, which stands between the kernel and the node, is gone"
        return "broken", f"{what if way == 'bridge' else 'its device is not connected to the node any more'}: {end}"
    if not connections:
        return "broken", f"nothing is connected to its export any more (was the node started anew?): {end}"
    return "on", ""


def describe(where: Place, record: Record, node: Node | None) -> dict[str, Any]:
    """One swap: what is asked for, what is there, and what the node says of its export (None: no answer).

    state, why: as of `judge_state`.
    """
    row = next((row for each in _devices(where, record) if (row := swap_on(each)) is not None), None)
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
    devices = {device for where, record in there for device in _devices(where, record)}
    others = [asdict(row) for row in swaps() if row.device.removesuffix(" (deleted)") not in devices]
    return {"swaps": ours, "others": others, "node": reachable is not None, "zswap": zswap_on()}


#: States in which the kernel swaps on what nobody serves.
BAD: Final = ("cut off", "broken")


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


def half_done(run_dir: Path) -> bool:
    """Whether a swap of this node is being made, or was left so."""
    return any(not record.done for _, record in recorded(run_dir))
