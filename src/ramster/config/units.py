"""Sizes, times and counts as people write them: "64MiB", "200ms", "1 page"; or integers in bytes and milliseconds."""

import re
from decimal import Decimal
from typing import Final

_SIZES: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TIMES: Final = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")

SIZE_RULE: Final = 'a size such as "64MiB" (B, KiB, MiB, GiB, TiB), or an integer in bytes'
TIME_RULE: Final = 'a time such as "200ms" (ms, s, min, h, d), or an integer in milliseconds'


def _parse(value: object, units: dict[str, int], rule: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"allowed is {rule}, not negative")
        return value
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    # A bare "64" in quotes counts as the base unit, like the integer.
    factor = units.get(match[2] or next(iter(units))) if match else None
    if match is None or factor is None:
        raise ValueError(f"allowed is {rule}")
    amount = Decimal(match[1]) * factor
    if amount != int(amount):
        raise ValueError(f"allowed is {rule}, a whole number of {next(iter(units))}")
    return int(amount)


def parse_bytes(value: object) -> int:
    """Bytes of "64MiB", "1.5GiB", "0B", "4096" or 4096; ValueError says what is allowed."""
    return _parse(value, _SIZES, SIZE_RULE)


def parse_ms(value: object) -> int:
    """Milliseconds of "5s", "200ms", "1.5h" or 200; ValueError says what is allowed."""
    return _parse(value, _TIMES, TIME_RULE)


def _format(amount: int, units: dict[str, int]) -> str:
    name, factor = next(iter(units.items()))
    for larger, size in units.items():
        if amount and amount % size == 0:
            name, factor = larger, size
    return f"{amount // factor}{name}"


def format_bytes(amount: int) -> str:
    """Exact text that `parse_bytes` reads back: 67108864 is "64MiB"."""
    return _format(amount, _SIZES)


def show_size(amount: int) -> str:
    """Bytes as people read them, rounded: 512 MiB, 1.5 GiB, 4 KiB, 17 B."""
    for unit, factor in reversed(_SIZES.items()):
        if amount >= factor > 1:
            value = amount / factor
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
    return f"{amount} B"


def show_apart(one: int, other: int) -> tuple[str, str]:
    """Two sizes that are not the same, as people read them; in bytes where they would look the same."""
    shown = show_size(one), show_size(other)
    alike = shown[0].replace(".0 ", " ") == shown[1].replace(".0 ", " ")
    return shown if not alike else (f"{one} bytes", f"{other} bytes")


def format_ms(amount: int) -> str:
    """Exact text that `parse_ms` reads back: 5000 is "5s"."""
    return _format(amount, _TIMES)


def counted(count: int, noun: str, form: str = "") -> str:
    """A number of things whose plural ends in s: "1 page", "0 pages". form: of the number, as for format()."""
    return f"{count:{form}} {noun}{'s' * (count != 1)}"


def show_seconds(seconds: int) -> str:
    """Seconds as people say them: 5 s, 3 min, 2 h 5 min, 4 d 1 h."""
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
