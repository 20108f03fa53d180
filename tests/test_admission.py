"""Who waits and who goes: the decisions as tables, the table against a flood."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.admission import Limits, Table, Verdict, Waiting, admit, prove, source_of

LIMITS = Limits(total=6, per_source=3, reserved=2, per_name=2)


def row(text: str, key: int) -> Waiting:
    """ "a" is a connection of source a; "A" one of an expected source; "a:x" one that has proved to be x."""
    source, _, name = text.partition(":")
    return Waiting(key, source.lower(), source.isupper(), name)


def rows(text: str) -> list[Waiting]:
    return [row(each, key) for key, each in enumerate(text.split(), 1)]


@pytest.mark.parametrize(
    ("waiting", "newcomer", "displaced"),
    [
        ("", "a", None),
        ("a a", "a", None),
        ("a a a", "a", 1),  # its own oldest, although there is room
        ("b a a a", "a", 2),
        ("a:x a a", "a", None),  # what has proved a name is not counted among the strangers of its source
        ("a a a b", "c", 1),  # the strangers' part is full: the oldest of those who have most
        ("a b b b", "c", 2),
        ("a b c d", "e", 1),
        ("a:x b c d", "e", 2),
        ("a b c d", "P", None),  # room is kept for whom one expects
        ("a b c d P", "P", None),
        ("a b c d P P", "Q", 1),  # and they go before each other
        ("P P a b c d", "Q", 3),
        ("P P P Q Q Q", "R", 1),
        ("P P P", "P", 1),
        ("P P P P:x P:x P:x", "Q", 1),
        ("P Q R S T U", "a", 1),  # of those who are expected only where nobody else is left
    ],
)
def test_a_newcomer_takes_the_place_of(waiting: str, newcomer: str, displaced: int | None) -> None:
    coming = row(newcomer, 0)
    assert admit(LIMITS, rows(waiting), coming.source, coming.expected) == Verdict(displaced)


@pytest.mark.parametrize(("waiting", "newcomer"), [("a:w b:x c:y d:z", "e"), ("a:u b:v P:w P:x P:y P:z", "Q")])
def test_who_has_proved_a_name_makes_room_for_nobody(waiting: str, newcomer: str) -> None:
    coming = row(newcomer, 0)
    verdict = admit(LIMITS, rows(waiting), coming.source, coming.expected)
    assert verdict.displaced is None and "are being greeted" in verdict.refused


@pytest.mark.parametrize(
    ("waiting", "key", "name", "goes"),
    [
        ("a", 1, "x", None),
        ("b:x a", 2, "x", None),
        ("b:x c:x a", 3, "x", 1),
        ("b:x c:y a", 3, "x", None),
        ("b:x c:x", 2, "x", None),  # said again
    ],
)
def test_a_name_has_a_share_too(waiting: str, key: int, name: str, goes: int | None) -> None:
    assert prove(LIMITS, rows(waiting), key, name) == goes


@given(st.lists(st.tuples(st.sampled_from("abcdPQ"), st.sampled_from(["", "x", "y", "z"])), max_size=60))
def test_the_bounds_hold_whoever_comes(arrivals: list[tuple[str, str]]) -> None:
    table = Table(LIMITS)
    there: set[int] = set()
    for source, name in arrivals:
        at: list[int] = []
        key = table.enter(source.lower(), source.isupper(), lambda at=at: there.discard(at[0]))  # type: ignore[misc]
        if isinstance(key, str):
            continue
        at.append(key)
        there.add(key)
        if name:
            assert table.prove(key, name)
        assert len(there) == len(table) <= LIMITS.total
        assert sum(not each.expected for each in table._rows()) <= LIMITS.total - LIMITS.reserved or source.isupper()
        assert all(sum(other.name == each.name for other in table._rows()) <= 2 for each in table._rows() if each.name)
    for key in list(there):
        assert table.leave(key) and not table.leave(key) and not table.prove(key, "x")
    assert not len(table)


def test_a_valid_one_among_a_thousand_idle_ones_has_its_turn() -> None:
    """All of one address, as behind a common router: the idle ones displace each other, and it is the youngest."""
    table = Table(Limits(total=64, per_source=64, reserved=16))
    gone: list[str] = []
    for number in range(1000):
        table.enter("192.0.2.9", False, lambda number=number: gone.append(f"idle {number}"))  # type: ignore[misc]
    valid = table.enter("192.0.2.9", False, lambda: gone.append("valid"))
    assert isinstance(valid, int) and table.displaced == len(gone) == 1001 - 48 and "valid" not in gone
    for _ in range(47):
        table.enter("192.0.2.9", False, lambda: gone.append("idle"))
    assert table.leave(valid) and "valid" not in gone


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("user 1000", "user 1000"),
    ],
)
def test_sources_are_what_one_host_can_have(host: str, source: str) -> None:
    assert source_of(host) == source
