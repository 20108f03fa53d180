"""Ctrl-C in a request: it ends at once, and nothing that the node granted meanwhile stays behind."""

from collections.abc import Callable

from tests.frontswap.conftest import Node, run_script

StartNode = Callable[..., Node]

# Raises KeyboardInterrupt before the n-th instruction of the API's own files, for n = 0, 1, 2 ... until the call ends
# first.
EVERYWHERE = """
import dis
from ramster.frontswap import messages, region, region_control, regions
TRACED = {module.__file__ for module in (region, region_control, regions)}
messages.SPAN_MAX = 4
client = ramster.connect(sys.argv[1])
region = client.region(64 * PAGE)
region.array(64 * PAGE, "u1")[:] = 1

def interrupted_after(n, call):
    "Whether the interrupt came before the call had ended."
    left, fired = n, False
    def trace(frame, event, argument):
        nonlocal left, fired
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not fired:
            if dis.opname[frame.f_code.co_code[frame.f_lasti]] == "RETURN_VALUE":
                return trace                # the interpreter looks for signals at calls, not there
            left -= 1
            if left < 0:
                fired = True
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert fired
    finally:
        sys.settrace(None)
    return fired

def everywhere(call, check):
    n = 0
    while interrupted_after(n, call):
        check(n)
        n += 1
    return n

def pinned():
    return region.statistics().pinned_pages
"""


def test_an_interrupted_pin_leaves_nothing_pinned(start_node: StartNode) -> None:
    out = run_script(
        EVERYWHERE
        + """
def pin():
    with region.pin((0, 10 * PAGE)) as pin:
        assert pin.entered

def check(n):
    assert pinned() == 4, (n, pinned())     # those that nobody interrupted

with region.pin((8 * PAGE, 12 * PAGE)):     # in part the same pages
    print(everywhere(pin, check))
assert pinned() == 0
""",
        start_node("--engine").socket,
    )
    assert int(out) > 300, "it ends in every part of it"


def test_an_interrupted_unpin_has_unpinned(start_node: StartNode) -> None:
    run_script(
        EVERYWHERE
        + """
def unpin():
    global pin
    pin.unpin()

n = 0
while True:
    pin = region.pin((0, 10 * PAGE))
    assert pinned() == 10
    if not interrupted_after(n, unpin):
        break
    pin.unpin()                             # an interrupt in the very first lines: as if never called
    assert pinned() == 0, n
    n += 1
assert n > 100 and pinned() == 0
""",
        start_node("--engine").socket,
    )


def test_an_interrupted_create_or_attach_leaves_no_region(start_node: StartNode) -> None:
    run_script(
        EVERYWHERE
        + """
region.close()
def create():
    with client.region(8 * PAGE, name="short"):
        with client.attach("short"):
            pass
def check(n):
    gc.collect()
for n in range(0, 3000, 7):
    if not interrupted_after(n, create):
        break
    gc.collect()
else:
    raise AssertionError("it never ends by itself")
def none_left():
    try: client.attach("short").close()
    except ramster.UsageError: return True
    return False
until(none_left)
""",
        start_node("--engine").socket,
    )
