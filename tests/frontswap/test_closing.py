"""The end of a region: what the user did wrong comes first, and who else is at it is named."""

import textwrap
import threading
from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Node, run_script

from ramster.errors import RegionBusy, UsageError
from ramster.frontswap.under_way import UnderWay, Use

StartNode = Callable[..., Node]


def test_what_is_under_way_holds_off_the_end() -> None:
    uses = UnderWay()
    pin, check = Use("pin"), Use("check")
    uses.enter(pin)
    uses.enter(check)
    with pytest.raises(RegionBusy, match=r"check\(\) in thread 'MainThread', pin\(\) in"):
        uses.shut(0)
    uses.leave(check)
    uses.leave(check)
    with pytest.raises(BufferError, match=r"pin\(\)"):
        uses.shut(0)
    uses.enter(Use("lost with its frame"))
    ended = threading.Thread(target=lambda: uses.leave(pin))
    ended.start()
    uses.shut(30)
    ended.join()
    with pytest.raises(UsageError, match="closed"):
        uses.enter(pin)
    uses.reopen()
    uses.enter(pin)


def test_the_users_own_exception_comes_first(start_node: StartNode) -> None:
    node = start_node("--engine")
    run_script(
        textwrap.dedent("""
        client = ramster.connect(sys.argv[1])
        def fail(manager, kind):
            try:
                with manager as entered:
                    region = entered.region(PAGE) if manager is client else entered
                    a = region.array(3)
                    raise kind("mine")
            except kind as error:
                assert str(error) == "mine"
                return region, getattr(error, "__notes__", [])
        for manager in (None, client):
            for kind in (ValueError, KeyboardInterrupt, BufferError):
                region, notes = fail(client if manager is client else client.region(PAGE), kind)
                assert len(notes) == 1 and "exist (1)" in notes[0], notes
                gc.collect()
                region.close()         # the array went with the traceback
        # Without one of the user's, it is said.
        try:
            with client.region(PAGE) as region: a = region.array(3)
        except ramster.RegionBusy as error: assert isinstance(error, BufferError) and "exist (1)" in str(error)
        else: raise AssertionError
        del a
        region.close()
        # A pin that cannot be taken back does not hide it either.
        region = client.region(PAGE)
        try:
            with region.pin():
                region.close()
                raise ValueError("mine")
        except ValueError as error: assert "not unpinned" in error.__notes__[0]
        """),
        node.socket,
    )


def test_close_beside_other_methods(start_node: StartNode) -> None:
    """Threads that use a region while it is closed: close names what is under way, the others say that it is closed."""
    run_script(
        textwrap.dedent("""
        sys.setswitchinterval(1e-5)
        client = ramster.connect(sys.argv[1])
        said = set()
        for turn in range(8):
            region = client.region(1024 * PAGE, resident=1024 * PAGE)
            failures = []
            def use(call):
                try:
                    while True: call()
                except BaseException as error: failures.append(error)
            def pin(): region.pin(slice(0, 512 * PAGE)).unpin()
            calls = (pin, region.prefetch, region.evict, region.check, region.statistics,
                     lambda: region.advise("random"), lambda: region.touch(0, 9), lambda: region.array(9)[0])
            threads = [threading.Thread(target=use, args=(call,), name=f"user {i}") for i, call in enumerate(calls)]
            for thread in threads: thread.start()
            def closed():
                try: region.close()
                except ramster.RegionBusy as error: said.add(str(error))
                return region.closed
            end = time.monotonic() + 30
            while not closed(): assert time.monotonic() < end, "deadline"
            for thread in threads: thread.join(30); assert not thread.is_alive()
            for error in failures:
                assert type(error) is ramster.UsageError and "closed" in str(error), repr(error)
            assert len(failures) == len(calls)
        assert all("user " in text or "arrays" in text for text in said), said
        """),
        start_node("--engine").socket,
    )


def test_close_under_a_pin_says_so(start_node: StartNode) -> None:
    """The node holds the fault of the pin's page for as long as the test likes."""
    node = start_node("--pattern", "--stalled", "3:1")
    run_script(
        textwrap.dedent("""
        region = ramster.connect(sys.argv[1]).region(8 * PAGE)
        thread = threading.Thread(target=lambda: region.touch(3, 1), name="toucher", daemon=True)
        thread.start()
        until(lambda: region.exports)
        try: region.close()
        except ramster.RegionBusy as error: assert "in use: touch() in thread 'toucher'" in str(error)
        else: raise AssertionError
        assert not region.closed
        region.check()
        print("done", flush=True)
        os._exit(0)
        """),
        node.socket,
    )
