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
assert done["faults_local"] < 300 and done["faults_local"] + done["prefetched"] < 1100, done
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


@engine
@pytest.mark.parametrize("threads", [2, 4])
def test_several_evictors_work_side_by_side(start_node: StartNode, threads: int) -> None:
    """Eight writers at random places: no page is lost or old, and the budget holds."""
    run_script(
        PASSES
        + """
a, region = make(4096, 512)
wrong = []
def work(seed):
    dice = np.random.default_rng(seed)
    mine = np.arange(seed, 4096, 8)
    for turn in range(1, 5):
        for page in dice.permutation(mine).tolist():
            if a[page, 1] != (turn - 1 if turn > 1 else first_word(page)) or a[page, 2] != first_word(page):
                wrong.append(page)
            a[page, 1] = turn
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads: thread.start()
while any(thread.is_alive() for thread in threads):
    assert region.statistics().resident_pages <= 512
for thread in threads: thread.join()
assert not wrong
s = region.statistics()
assert s.evictions > 3 * 3584 and s.refused == 0, s
assert s.faults_parked < s.faults // 2, s
""",
        start_node("--pattern", "--threads", str(threads)).socket,
    )


@engine
def test_a_hundred_gibibytes_of_addresses_cost_what_is_touched(start_node: StartNode) -> None:
    """The node's memory follows the budget and the pages that were touched, not the size of the region."""
    node = start_node()
    run_script(
        PASSES
        + """
def used():
    with open(f"/proc/{sys.argv[2]}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024
slack = (64 if "san" in os.environ.get("LD_PRELOAD", "") else 4) << 20      # a sanitizer has memory of its own
small, _ = make(4096, 1024)
small[:, 0] = 1
before = used()
a, region = make(26_214_400, 1024)
made = used()
assert made - before < slack, made - before
order = np.arange(20_000) * 1301
for page in order.tolist(): a[page, 0] = page + 1
# 8 bytes a slot and a byte of state, in pages of 4096, since each page that was touched is far from the others; and the
# compressed pages themselves.
assert used() - made < 20_000 * 4096 * 3 + slack, used() - made
assert all(a[page, 0] == page + 1 for page in order.tolist())
once = used()
for page in order.tolist(): a[page, 0]
assert used() - once < slack, used() - once
assert region.statistics().resident_pages <= 1024
""",
        node.socket,
        node.process.pid,
    )


@engine
def test_polling_is_counted_and_stops_when_idle(start_node: StartNode) -> None:
    run_script(
        PASSES
        + """
a, region = make(8192, 4096)
turn = np.random.default_rng(1).permutation(8192).tolist()
busy = counted(region, lambda: right(a, turn[:4000]))
assert 0 < busy["polled_us"], busy

def idle():
    end = time.monotonic() + 0.3
    while time.monotonic() < end: region.statistics()
idle()
assert counted(region, idle)["polled_us"] == 0
""",
        start_node("--pattern", "--busy-poll", "1000").socket,
    )
