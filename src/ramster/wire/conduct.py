"""How long a peer that was cut off for what it sent stays out. Pure: what happened and when are arguments.

Such a peer belongs to the cluster, and it may lend: the first pauses are shorter than the time for which a page is
tried (`[links] give_up`), and nothing is for ever.
"""

from __future__ import annotations

from typing import Final

FIRST_MS: Final = 500
LONGEST_MS: Final = 64_000


def shut_out_ms(faults: int, since_ms: int) -> int:
    """How much longer it is to stay out, after so many faults, the last of them so long ago; 0: it may come."""
    if faults <= 0:
        return 0
    return max(0, min(FIRST_MS << min(faults - 1, 20), LONGEST_MS) - since_ms)


def shut_out(left_ms: int, faults: int) -> str:
    """In words: for the REFUSE, the logs of both sides and the status."""
    times = "once" if faults == 1 else f"{faults} times"
    return f"shut out for another {left_ms / 1000:.1f} s: it was cut off {times} for what it sent"
