"""The node's log: one line an event, whatever the other side's words are, and no flood."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster import logs


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Log:
    def __init__(self) -> None:
        self.clock, self.stream = Clock(), io.StringIO()
        self.handler = logs.Handler(self.stream, self.clock)
        self.logger = logging.getLogger("ramster.tests.logs")
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    made.logger.removeHandler(made.handler)
    made.handler.close()


@given(st.text(st.characters(), max_size=4000))
def test_any_words_stay_on_one_short_line(words: str) -> None:
    shown = logs.escaped(words)
    assert len(shown) <= logs.LINE_MAX and shown.isprintable()
    assert len(shown.splitlines()) <= 1


def test_a_peer_cannot_forge_a_line_or_move_the_cursor(log: Log) -> None:
    log.logger.warning("refused %s: %s", "10.0.0.1", "no\n2026 ERROR ramster: all is lost\x1b[2J\r\u2028x")
    assert len(log.lines) == 1
    assert r"no\n2026 ERROR ramster: all is lost\x1b[2J\r\u2028x" in log.lines[0]


def test_a_long_reason_does_not_push_out_who_gave_it(log: Log) -> None:
    log.logger.warning("%s refused: %s; closed after %d s", "x" * 100_000, "y" * 100_000, 7)
    assert len(log.lines[0]) < logs.LINE_MAX + 100 and "..." in log.lines[0]
    log.logger.warning("refused: %s; closed after %d s", "y" * 100_000, 7)
    assert log.lines[1].endswith("...; closed after 7 s")


def test_a_traceback_is_indented_and_escaped(log: Log) -> None:
    try:
        raise ValueError("one\n2026 ERROR two\x1b[31m")
    except ValueError:
        log.logger.exception("failed")
    assert "failed" in log.lines[0]
    assert all(line.startswith("    ") for line in log.lines[1:])
    assert "\x1b" not in log.stream.getvalue()


def test_one_reason_has_a_window_and_the_rest_is_counted(log: Log) -> None:
    for number in range(1000):
        log.logger.warning("closed a connection from %s", f"10.0.0.1:{number}")
    log.logger.warning("something else")
    assert len(log.lines) == logs.LINES + 1 and log.lines[-1].endswith("something else")
    log.clock.now += logs.WINDOW_S
    log.handler.settle()
    assert (
        f"{1000 - logs.LINES} more like this within 10 s, the last: closed a connection from 10.0.0.1:999"
        in log.lines[-1]
    )
    log.handler.settle()
    log.logger.warning("closed a connection from %s", "10.0.0.2")
    assert len(log.lines) == logs.LINES + 3 and log.lines[-1].endswith("from 10.0.0.2")


def test_what_has_a_name_of_its_own_has_a_window_of_its_own(log: Log) -> None:
    for number in range(50):
        log.logger.info("export %s: made", number, extra={"per": number})
    assert len(log.lines) == 50


def test_what_was_held_back_is_said_at_the_end(log: Log) -> None:
    for _ in range(logs.LINES + 3):
        log.logger.error("again")
    log.handler.close()
    assert "3 more like this" in log.lines[-1] and "ERROR" in log.lines[-1]


def test_reasons_without_end_share_one_window() -> None:
    windows = logs.Windows()
    said = sum(windows.admit(key, 0.0) for key in range(10 * logs.REASONS_MAX))
    assert said == logs.REASONS_MAX + logs.LINES
    assert sum(count for _, count in windows.settle(logs.WINDOW_S)) == 10 * logs.REASONS_MAX - said
