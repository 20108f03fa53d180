"""Time as an argument: decision code takes a `Clock`, so that a test or the simulator can move it."""

import time
from typing import Protocol


class Clock(Protocol):
    """A clock that never goes back."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since an arbitrary, fixed moment."""
        ...


class SystemClock:
    """CLOCK_MONOTONIC: not moved by NTP steps; stands still while the machine sleeps."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since boot, without time asleep."""
        return time.monotonic_ns()
