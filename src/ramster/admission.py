"""Who may wait on a listener before it is known who they are: bounded in all and for each source, with room kept.

Connections of strangers cost a descriptor, and later a thread, before anybody can tell them from a peer. A full
listener that turns newcomers away is one that sixty-four idle connections shut; so a newcomer takes the place of the
one that has waited longest without proving anything. `admit` and `prove` decide, and look at nothing but their
arguments; `Table` remembers who waits and carries the decisions out.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

# What one customer of a network is given at least: whoever has it has all addresses in it.
_IPV6_PREFIX: Final = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one listener, or of one stage of it.

    total: connections at a time. per_source: of one source, as long as it has proved nothing. reserved: of total, kept
    for sources that are expected; less than total. per_name: of one name that was proved.
    """

    total: int
    per_source: int
    reserved: int = 0
    per_name: int = 8

    def __post_init__(self) -> None:
        assert 0 <= self.reserved < self.total and self.per_source > 0 < self.per_name


@dataclass(frozen=True, slots=True)
class Waiting:
    """One connection that is not decided yet. name: who it has proved to be; empty for nobody."""

    key: int
    source: str
    expected: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a newcomer: let in, in the place of `displaced` where that is a key; or refused, and why."""

    displaced: int | None = None
    refused: str = ""


def admit(limits: Limits, waiting: Iterable[Waiting], source: str, expected: bool) -> Verdict:
    """For one more connection from `source`. waiting: those that are there, the oldest first.

    Of a source that has its share the oldest goes, of a full listener the oldest of the source that has most there:
    so a flood displaces itself. Who has proved a name is displaced by nobody's mere arrival.
    """
    rows = list(waiting)
    own = [row for row in rows if row.source == source and not row.name]
    if len(own) >= limits.per_source:
        return Verdict(own[0].key)
    strangers = [row for row in rows if not row.expected]
    if not expected and len(strangers) >= limits.total - limits.reserved:
        return _in_place_of(strangers)
    if len(rows) >= limits.total:
        # Those who are expected first of all take the places of strangers.
        verdict = _in_place_of(strangers)
        return verdict if verdict.displaced is not None else _in_place_of(rows)
    return Verdict()


def _in_place_of(rows: list[Waiting]) -> Verdict:
    unproved = [row for row in rows if not row.name]
    if not unproved:
        return Verdict(refused=f"{len(rows)} others are being greeted")
    most = Counter(row.source for row in unproved)
    return Verdict(max(unproved, key=lambda row: most[row.source]).key)  # the first of equals: the oldest


def prove(limits: Limits, waiting: Iterable[Waiting], key: int, name: str) -> int | None:
    """Who goes when connection `key` proves `name`: the oldest of it, where it has its share without this one."""
    same = [row.key for row in waiting if row.name == name and row.key != key]
    return same[0] if len(same) >= limits.per_name else None


def source_of(host: str) -> str:
    """Under which source the connections of an address are counted: itself, and of IPv6 its network."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ip_network((address, _IPV6_PREFIX), strict=False))
    return str(address)


class Table:
    """Who waits now on one listener, or in one stage of it. Any thread may call.

    A connection that is displaced is told by the function that came with it: it must not block, nor call the table, and
    is never called once `leave` has returned.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.displaced = 0
        """Connections that had to make room, since the start."""
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[Waiting, Callable[[], None]]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, source: str, expected: bool, drop: Callable[[], None]) -> int | str:
        """A key for one more connection, after whoever is in its way was told to go; or why there is no room."""
        with self._lock:
            verdict = admit(self.limits, self._rows(), source, expected)
            if verdict.refused:
                return verdict.refused
            self._displace(verdict.displaced)
            key = self._next
            self._next += 1
            self._waiting[key] = Waiting(key, source, expected), drop
            return key

    def prove(self, key: int, name: str) -> bool:
        """The connection has shown to be `name`. False where it was told to go meanwhile."""
        with self._lock:
            if key not in self._waiting:
                return False
            self._displace(prove(self.limits, self._rows(), key, name))
            row, drop = self._waiting[key]
            self._waiting[key] = replace(row, name=name), drop
            return True

    def leave(self, key: int) -> bool:
        """It is decided, or gone. False where it was told to go before."""
        with self._lock:
            return self._waiting.pop(key, None) is not None

    def _rows(self) -> list[Waiting]:
        return [row for row, _ in self._waiting.values()]

    def _displace(self, key: int | None) -> None:
        if key is not None:
            _, drop = self._waiting.pop(key)
            self.displaced += 1
            drop()
