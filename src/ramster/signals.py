"""Signals that would interrupt what must be finished."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """A second Ctrl-C or SIGTERM does not stop the clean-up of the first; what is in here is short and bounded.

    In another thread than the first it does nothing: signals do not interrupt those.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
