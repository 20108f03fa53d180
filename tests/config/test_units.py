"""Sizes and times read as people write them, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.config.units import format_bytes, format_ms, parse_bytes, parse_ms, show_apart, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 64 << 20), ("256 KiB", 256 << 10), ("1.5GiB", 3 << 29), ("0B", 0), ("4096", 4096), (4096, 4096)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "ms"), [("200ms", 200), ("5s", 5000), ("1.5min", 90_000), ("7d", 604_800_000), (9, 9)]
)
def test_times(text: object, ms: int) -> None:
    assert parse_ms(text) == ms


@pytest.mark.parametrize("text", ["64MB", "64mib", "-1B", "1e3", "", "MiB", "0.3B", "1 2", True, 1.5, None, -1])
def test_what_is_not_a_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="64MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["5sec", "1m", "0.5ms", False, [], -5])
def test_what_is_not_a_time_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="200ms"):
        parse_ms(text)


@given(st.integers(0, 1 << 62))
def test_formatted_amounts_read_back_exactly(amount: int) -> None:
    assert parse_bytes(format_bytes(amount)) == amount
    assert parse_ms(format_ms(amount)) == amount


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (4096, "4 KiB"),
        (88952 << 10, "86.9 MiB"),
        (150 << 20, "150 MiB"),
        (3 << 39, "1.5 TiB"),
    ],
)
def test_sizes_as_people_read_them(amount: int, shown: str) -> None:
    assert show_size(amount) == shown


def test_two_sizes_never_look_the_same() -> None:
    assert show_apart(64 << 20, 1 << 30) == ("64 MiB", "1 GiB")
    assert show_apart(1 << 30, (1 << 30) + 4096) == ("1073741824 bytes", "1073745920 bytes")
