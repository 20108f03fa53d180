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
