from typing import Final

WEIGHTS: Final[dict[str, int]]
ROOM: Final[int]
DRAIN_PER_S: Final[int]

class Bucket:
    """What one peer sent that helps nobody, on one connection, for tests."""

    def charge(self, weight: int, now_ms: int, room: int = ...) -> bool: ...
