"""What a region makes of the way in which it is used, counted through a real region."""

from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Node, run_script

StartNode = Callable[..., Node]
engine = pytest.mark.parametrize("start_node", ["engine"], indirect=True)

PASSES = """
client = ramster.connect(sys.argv[1])
def make(pages, resident):
    a = client.empty((pages, 512), np.uint64, resident=resident * PAGE)
    return a, ramster.region_of(a)
def counted(region, work):
    before = region.statistics()
    work()
    after = region.statistics()
    return {name: getattr(after, name) - getattr(before, name) for name in vars(before)}
def right(a, pages):
    for page in pages:
        assert a[page, 0] == first_word(page), page
"""


@engine
def test_a_cyclic_pass_over_twice_the_budget_keeps_a_part(start_node: StartNode) -> None:
    """With LRU or FIFO every pass would bring in, and write out, every page."""
    run_script(
        PASSES
        + """
a, region = make(4096, 2048)
for _ in range(4):
    right(a, range(4096))
done = counted(region, lambda: [right(a, range(4096)) for _ in range(4)])
assert 4 * 2048 < done["evictions"] < 0.7 * 4 * 4096, done
assert done["evictions_clean"] == done["evictions"], done
""",
        start_node("--pattern").socket,
    )


@engine
def test_random_touches_bring_in_one_page_each(start_node: StartNode) -> None:
    run_script(
        PASSES
        + """
a, region = make(16384, 4096)
order = np.random.default_rng(1).permutation(16384)[:6000].tolist()
done = counted(region, lambda: right(a, order))
assert done["faults"] > 5900 and done["prefetched"] < 60, done
""",
        start_node("--pattern").socket,
    )


@engine
def test_a_column_brings_in_its_pages_and_not_what_is_between_them(start_node: StartNode) -> None:
    run_script(
        PASSES
        + """
a, region = make(16000, 4000)
done = counted(region, lambda: right(a, range(3, 16000, 16)))
assert done["faults"] < 300 and done["faults"] + done["prefetched"] < 1100, done
assert done["prefetch_hits"] > 700, done
""",
        start_node("--pattern").socket,
    )


@engine
def test_pages_that_leave_before_they_are_used_make_windows_smaller(start_node: StartNode) -> None:
    """Six readers in turn, with room for a sixth of what each of them would like to have ahead."""
    run_script(
        PASSES
        + """
a, region = make(12000, 256)
done = counted(region, lambda: [right(a, (at + turn for at in range(0, 12000, 2000))) for turn in range(1500)])
assert done["evictions"] < 1.5 * 9000, done
""",
        start_node("--pattern").socket,
    )


@engine
def test_advice(start_node: StartNode) -> None:
    run_script(
        PASSES
        + """
a, region = make(8192, 2048)
before = region.statistics()
region.advise("random", a[:1024])
done = counted(region, lambda: right(a, range(1024)))
assert done["faults"] == 1024 and done["prefetched"] == 0, done

# The first touch of a range that is read in order brings in the widest window there is, and more behind it.
region.advise("sequential", a[2048:4096])
done = counted(region, lambda: right(a, range(2048, 2049)))
assert done["faults"] == 1, done
until(lambda: region.statistics().prefetched == before.prefetched + 127)
# It leaves behind it what it has read, and nothing else has to go.
right(a, range(6000, 7000))
counted(region, lambda: right(a, range(2048, 4096)))
done = counted(region, lambda: right(a, range(6000, 7000)))
assert done["faults"] < 5, done

region.advise("cyclic", a[4096:])
for _ in range(5):
    right(a, range(4096, 8192))
done = counted(region, lambda: [right(a, range(4096, 8192)) for _ in range(2)])
assert done["evictions"] < 0.75 * 2 * 4096, done

region.advise("normal")
for at in range(64):
    region.advise("random", a[4 * at : 4 * at + 1])
try: region.advise("random", a[1000:1001])
except ramster.UsageError as error: assert "64" in str(error)
else: raise AssertionError
region.advise("normal")
region.advise("random", a[1000:1001])
""",
        start_node("--pattern").socket,
    )


@engine
def test_first_writes_in_order_become_writable_together(start_node: StartNode) -> None:
    run_script(
        PASSES
        + """
a, region = make(1024, 1024)
right(a, range(1024))
def write():
    for page in range(1024): a[page, 1] = page
done = counted(region, write)
assert done["faults_wp"] < 40, done
assert all(a[page, 1] == page and a[page, 0] == first_word(page) for page in range(1024))
""",
        start_node("--pattern").socket,
    )
