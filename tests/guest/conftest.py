"""Guests run two at a time in the background, those that the selected tests ask for; a test waits for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import pytest
from tests.guest import machine
from tests.guest.scenarios import SCENARIOS, Run

AT_ONCE: Final = 2  # a guest has one processor; more of them than the smallest machine has cores gain nothing


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    try:
        machine.require_qemu()
        for each in machine.PROGRAMS:
            machine.program(each)
        kernel = machine.kernel()
    except machine.Unavailable as reason:
        pytest.skip(str(reason))
    wanted = {name for item in request.session.items for name in _asked_for(item)}
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="guest")
    try:
        yield {
            name: pool.submit(scenario, kernel, tmp_path_factory.mktemp(name))
            for name, scenario in SCENARIOS.items()
            if name in wanted
        }
    finally:
        pool.shutdown(cancel_futures=True)


def _asked_for(item: pytest.Item) -> Iterator[object]:
    """Names of its fixtures, those that a parameter chooses too."""
    yield from getattr(item, "fixturenames", ())
    if (call := getattr(item, "callspec", None)) is not None:
        yield from (value for value in call.params.values() if isinstance(value, str))


def _finished(runs: dict[str, Future[Run]], name: str) -> Run:
    try:
        return runs[name].result()
    except machine.Unavailable as reason:
        pytest.skip(str(reason))


def _of(scenario: str) -> Callable[..., Run]:
    """The fixture of one scenario."""

    @pytest.fixture(scope="session", name=scenario)
    def found(runs: dict[str, Future[Run]]) -> Run:
        return _finished(runs, scenario)

    return found


globals().update({scenario: _of(scenario) for scenario in SCENARIOS})
