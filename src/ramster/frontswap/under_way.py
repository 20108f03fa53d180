"""What is under way on a region while another thread would close it.

A method is entered or refused, never half of each: `close` lets nothing further in, waits for what is under way, a
bounded time, and then comes through or gives way. So no method ever finds its connection gone under it, and threads
that never pause cannot hold off a close for ever.
"""

from __future__ import annotations

import threading
import weakref
from typing import Final

from ramster.errors import RegionBusy, UsageError

# A request of 16 MiB that no lender holds up is through by then; what takes longer has its name in the error.
CLOSE_PATIENCE_S: Final = 1.0


class Use:
    """One call that is under way. Lives in that call's frame: an interrupt at any point cannot leave it behind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread = threading.current_thread().name
        self.ident = threading.get_ident()

    def __str__(self) -> str:
        return f"{self.name}() in thread {self.thread!r}"


class UnderWay:
    """The calls that use one region now."""

    def __init__(self) -> None:
        # Re-entrant: a signal handler may close a region.
        self._changed = threading.Condition(threading.RLock())
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self._shut = False

    def enter(self, use: Use) -> None:
        """Raises UsageError once the region is closed or closing; what a call under way itself calls comes in."""
        with self._changed:
            if self._shut and all(other.ident != use.ident for other in self._uses):
                raise UsageError("the region is closed, or another thread is closing it")
            self._uses.add(use)

    def leave(self, use: Use) -> None:
        """Also where it was never entered."""
        with self._changed:
            self._uses.discard(use)
            self._changed.notify_all()

    def shut(self, patience_s: float = CLOSE_PATIENCE_S) -> None:
        """From now on nothing enters. Raises RegionBusy where something stays under way (nothing changes then)."""
        with self._changed:
            self._shut = True
            try:
                if self._changed.wait_for(lambda: not self._uses, patience_s):
                    return
                uses = ", ".join(sorted(map(str, self._uses)))
                raise RegionBusy(f"the region is in use: {uses} is under way; close it when that is done")
            except BaseException:
                self._shut = False
                raise

    def reopen(self) -> None:
        """Take back `shut`."""
        with self._changed:
            self._shut = False
