from typing import Self

GAP_MS: int
BEAT_MS: int

def verdict(
    state: str,
    *,
    started_ms: int = ...,
    sent_ms: int = ...,
    now_ms: int = ...,
    stopping: bool = ...,
    spilled: bool = ...,
    mirrored: bool = ...,
    remote: bool = ...,
    give_up_ms: int = ...,
    spill_ms: int = ...,
    hedge_ms: int = ...,
    ask_again_ms: int = ...,
) -> str:
    """What is decided about a get in this state ("waits", "sent", "spill", ...): "wait", "give up", "settle",
    "redirect" or "ask".
    """

def skipped_ms(beat_ms: int, now_ms: int) -> int:
    """How much of the time between two readings of the clock does not count."""

class RanClock:
    """A clock of the time in which this process ran, as long as it is read more often than once in GAP_MS."""

    def __new__(cls) -> Self: ...
    def ms(self) -> int: ...
    @property
    def gaps(self) -> int: ...
