"""How the node's log is written: an event is one line that nobody outside can break, forge or flood.

Peers, applications and NBD clients put words into the log: a refusal's reason, a region's name, a garbled request. So
what cannot be printed is written as an escape, what is long is cut, and each reason has a window: the first lines of it
are written as they come, the rest are counted and said in one line when the window ends.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TextIO

# The longest honest line lists what the guard looked at.
LINE_MAX: Final = 1500
# What one argument may take of it: a long reason must not push out who it is about.
ARGUMENT_MAX: Final = 1000
# Lines of one reason that are written in one window: more than a person reads, less than fills a disk.
LINES: Final = 10
WINDOW_S: Final = 10.0
# Reasons that are told apart at one moment. They come from format strings of ours, so only a mistake exceeds it.
REASONS_MAX: Final = 512

FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def escaped(text: str, limit: int = LINE_MAX) -> str:
    """`text` on one line of at most `limit` characters, with nothing that moves a cursor or begins a new line."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class Formatter(logging.Formatter):
    """Lines whose arguments and message are `escaped`. The traceback of a fault of ours follows, indented."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        worded = _worded(record)
        worded.asctime = self.formatTime(record)
        lines = [self.formatMessage(worded)]
        lines += [f"    {escaped(line)}" for line in (record.exc_text or "").splitlines()]
        return "\n".join(lines)


def _worded(record: logging.LogRecord) -> logging.LogRecord:
    """The record with its message as it is written."""
    if isinstance(record.args, tuple) and record.args:
        cut = tuple(
            arg if isinstance(arg, int | float) or arg is None else escaped(str(arg), ARGUMENT_MAX)
            for arg in record.args
        )
        message = str(record.msg) % cut
    else:
        message = record.getMessage()
    worded = logging.makeLogRecord(record.__dict__)
    worded.message = escaped(message)
    return worded


@dataclass(slots=True)
class _Window:
    since: float
    lines: int = 0
    held_back: int = 0


class Windows:
    """Which lines are written. Pure: time is an argument, in seconds.

    A key is whatever tells two reasons apart.
    """

    def __init__(self) -> None:
        self._open: dict[object, _Window] = {}

    def admit(self, key: object, now: float) -> bool:
        """Whether a line for this reason is written now."""
        window = self._open.get(key)
        if window is None:
            if len(self._open) >= REASONS_MAX:
                key = None  # one window for all that are too many
                window = self._open.get(key)
            if window is None:
                window = self._open[key] = _Window(now)
        window.lines += 1
        if window.lines <= LINES:
            return True
        window.held_back += 1
        return False

    def settle(self, now: float) -> list[tuple[object, int]]:
        """The windows that end: (key, lines held back), those that held any back."""
        over = [key for key, window in self._open.items() if now - window.since >= WINDOW_S]
        return [(key, n) for key in over if (n := self._open.pop(key).held_back)]


class Handler(logging.StreamHandler[TextIO]):
    """Writes to `stream` what the windows let through.

    The reason of a record is its logger, level and format string, and its attribute `per` where it has one
    (`log.error(..., extra={"per": export})`: a window for each export). `settle` must be called now and then: it says
    how many lines were held back, also when no further line comes.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self.setFormatter(Formatter())
        self._clock = clock
        self._windows = Windows()
        self._last: dict[object, logging.LogRecord] = {}
        self._turn = threading.RLock()

    def emit(self, record: logging.LogRecord) -> None:
        with self._turn:
            self.settle()
            key = (record.name, record.levelno, str(record.msg), getattr(record, "per", None))
            if self._windows.admit(key, self._clock()):
                super().emit(record)
            else:
                self._last[key] = record

    def settle(self, *, at_once: bool = False) -> None:
        """Say what was held back in windows that have ended, or in all of them."""
        with self._turn:
            for key, count in self._windows.settle(float("inf") if at_once else self._clock()):
                last = self._last.pop(key, None)
                words = "" if last is None else f": {_worded(last).message}"
                level = logging.WARNING if last is None else last.levelno
                name = __name__ if last is None else last.name
                text = f"{count} more like this within {WINDOW_S:g} s, the last{words}"
                super().emit(logging.LogRecord(name, level, __file__, 0, "%s", (text,), None))

    def close(self) -> None:
        self.settle(at_once=True)
        super().close()


def set_up(stream: TextIO | None = None) -> Handler:
    """Make the process log to `stream` (stderr) in this way, from INFO on; replaces what was set up before."""
    handler = Handler(sys.stderr if stream is None else stream)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return handler
