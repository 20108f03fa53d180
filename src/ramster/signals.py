"""Signals that would interrupt what must be finished, and those that must end a program before it has begun."""

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


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C ends the process here as it ends a program in C, without a word: for imports. KeyboardInterrupt in one is
    shown with a traceback, or lost in a callback of the interpreter's own, and the program goes on.

    Elsewhere than in the main thread, and where somebody handles or ignores the signal, it does nothing.
    """
    try:
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:
            raise ValueError
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
