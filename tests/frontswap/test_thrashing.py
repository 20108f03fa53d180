"""What a region says of a program that uses more than its budget holds, again and again."""

from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Node, run_script

StartNode = Callable[..., Node]


@pytest.mark.parametrize("start_node", ["engine"], indirect=True)
def test_a_walk_over_more_than_the_budget_thrashes_until_it_fits(start_node: StartNode) -> None:
    """Walks that fit go on beside it and are looked at as often: one thrashes neither when it brings its pages in nor
    later, and so does the same walk with the budget that was said to be enough.
    """
    run_script(
        """
client = ramster.connect(sys.argv[1])
BUDGET, PAGES, MORE, FITS = 512, 4096, 800, 400
walks = []
def make(resident, used):
    a = client.empty((PAGES, 512), np.uint64, resident=resident * PAGE)
    region = ramster.region_of(a)
    region.advise("random")                 # each fault brings in its page alone
    walks.append((a, region, used))
    return a, region
def walk(a, used):
    for page in range(used):
        assert a[page, 0] == first_word(page), page
def walk_until(used, condition):
    end = time.monotonic() + 25
    while not condition(large.statistics()):
        assert time.monotonic() < end, large.statistics()
        walk(a, used)
        for other, region, its in walks[1:]:
            walk(other, its)
            now = region.statistics()
            assert not now.thrashing and now.enough_pages == 0 and now.evictions == 0, now

a, large = make(BUDGET, MORE)
make(BUDGET, FITS)
walk_until(MORE, lambda now: now.thrashing)
enough = large.statistics().enough_pages
assert BUDGET < enough < PAGES
make(enough, MORE)
walk_until(FITS, lambda now: not now.thrashing)
assert large.statistics().enough_pages == 0
walk_until(MORE, lambda now: now.thrashing)
print(enough)
""",
        start_node("--pattern").socket,
    )
