"""One region in several processes: nothing written is lost, nothing old is read, and no process holds up another."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.frontswap.conftest import Agent, Engines, finish, start_script
from tests.frontswap.test_region_service import Talker

from ramster.errors import StoreFull, UsageError
from ramster.frontswap import messages
from ramster.testing.proxy import wait_until

MakeEngines = Callable[..., Engines]
EHWPOISON = 133
PIDFD_GETFD = 438
libc = ctypes.CDLL(None, use_errno=True)
FLAG_MINOR = 4
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
both_ways = pytest.mark.parametrize("poison", ["auto", "guard"])

# As on a kernel before 6.4: no UFFDIO_CONTINUE that write-protects.
OLD_KERNEL = """
from ramster.frontswap import messages
def attach(real=messages.Attach, **fields):
    return real(**{**fields, "features": fields["features"] & ~(1 << 13)})
messages.Attach = attach
"""


def statistics(engines: Engines) -> dict[str, int]:
    return engines.regions["shared"].statistics()


def pair(engines: Engines, pages: int = 64, resident: int = 32, options: str = "") -> tuple[Agent, Agent]:
    a, b = engines.agent(options), engines.agent(options)
    a.create(pages, resident)
    b.attach()
    return a, b


@pytest.mark.parametrize("options", ["", OLD_KERNEL], ids=["protected", "old-kernel"])
def test_clean_means_clean_in_all(engines: MakeEngines, options: str) -> None:
    served = engines()
    a, b = pair(served, options=options)
    a.run("a[:32] = np.arange(100, 132, dtype=np.uint64)[:, None]; region.evict()")
    assert a.ask("a[5, 0].item()") == 105  # brought in clean by one process
    before = statistics(served)
    assert b.ask("a[5, 511].item()") == 105  # mapped by the other, from the memfd
    assert statistics(served)["faults_minor"] == before["faults_minor"] + 1
    b.run("a[5] = 6")
    assert a.ask("a[5].tolist()") == [6] * 512
    assert a.ask("region.evict()") >= 4096
    assert a.ask("a[5].tolist()") == [6] * 512, "a write to a page that counted as clean is lost"
    # And in the other direction: what one process has made dirty is protected still in the other.
    assert b.ask("a[7, 0].item()") == a.ask("a[7, 0].item()") == 107
    a.run("a[7] = 8")
    b.run("a[7, 1] = 9")
    a.run("region.evict()")
    assert b.ask("a[7, :3].tolist()") == [8, 9, 8] == a.ask("a[7, :3].tolist()")


def test_what_nobody_wrote_is_not_stored_again(engines: MakeEngines) -> None:
    served = engines()
    a, b = pair(served, pages=32)
    a.run("a[:] = np.arange(32, dtype=np.uint64)[:, None] + 1; region.evict()")
    stored = served.store.statistics().puts
    for reader in (a, b, a):
        assert reader.ask("a[:32, 9].tolist()") == list(range(1, 33))
        other = b if reader is a else a
        assert other.ask("a[:32, 9].tolist()") == list(range(1, 33))
        assert reader.ask("region.evict()") == 32 * 4096
    assert served.store.statistics().puts == stored
    assert statistics(served)["evictions_clean"] >= 96


@contextmanager
def held_eviction(served: Engines, page: int, owner: Agent) -> Iterator[None]:
    """Inside, an evictor has a page that `owner` has written: protected everywhere and read, but nowhere to put it."""
    region = served.regions["shared"]
    owner.run(f"a[{page}] = np.frombuffer(os.urandom(PAGE), np.uint64)")
    pool = served.store.create_pool(pages=1 << 14)
    index = 0
    with pytest.raises(StoreFull):
        while True:
            served.store.put(pool, index, os.urandom(4096))
            index += 1
    done: list[int] = []
    evictor = threading.Thread(target=lambda: done.append(region.evict(page, 1)))
    assert not owner.protected(page)
    evictor.start()
    wait_until(lambda: owner.protected(page), "the evictor has the page")
    try:
        yield
        assert not done, "the eviction did not wait"
    finally:
        served.store.destroy_pool(pool)
        evictor.join()
        assert done == [1]


HOLD = {"arena_bytes": 4 << 20, "store_full_wait_ms": 0, "full_wait_ms": 60_000}


def faults(served: Engines) -> int:
    counters = statistics(served)
    return counters["faults"] + counters["faults_wp"] + counters["faults_minor"]


def ask_and_wait_for_its_fault(served: Engines, agent: Agent, code: str) -> None:
    before = faults(served)
    agent.send(code)
    wait_until(lambda: faults(served) > before, "the fault is read")


def test_faults_of_two_processes_on_a_page_that_is_being_evicted(engines: MakeEngines) -> None:
    served = engines(**HOLD)
    a, b = pair(served)
    with held_eviction(served, 3, a):
        word = a.ask("a[3, 9].item()")
        assert a.ask("a[4].any().item()") is False, "other pages do not wait"
        ask_and_wait_for_its_fault(served, b, "a[3, 9].item()")  # a minor fault: b has never mapped it
        ask_and_wait_for_its_fault(served, a, "a.__setitem__((3, 9), 77)")  # a write to what is being read
    assert b.answer() in (word, 77)
    assert a.answer() is None
    assert a.ask("a[3, 9].item()") == b.ask("a[3, 9].item()") == 77
    b.run("region.evict()")
    assert b.ask("a[3, 9].item()") == a.ask("a[3, 9].item()") == 77


def test_an_event_that_is_older_than_the_eviction(engines: MakeEngines) -> None:
    """A page was in RAM when a thread faulted, and is away when the fault is read: its stored copy stays."""
    served = engines()
    a = served.agent()
    a.create(64, 32)
    a.run("a[3] = 33; region.evict()")
    region = served.regions["shared"]
    number, guard = region.join()
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    base = 1 << 40
    region.attach(number, ours.detach(), base, 0)
    theirs.send(struct.pack("<B7xQQ8x", 0x12, FLAG_MINOR, base + 3 * 4096))
    wait_until(lambda: statistics(served)["faults_minor"] == 1, "the fault is read")
    region.detach(number)
    theirs.close()
    os.close(guard)
    assert a.ask("a[3].tolist()") == [33] * 512


def test_attach_while_evicting(engines: MakeEngines) -> None:
    """An evictor that has protected a page everywhere does not know who comes then."""
    served = engines(**HOLD)
    a = served.agent()
    a.create(64, 32)
    with held_eviction(served, 3, a):
        b = served.agent()
        b.attach()
        ask_and_wait_for_its_fault(served, b, "a.__setitem__((3, 9), 77)")
        words = a.ask("a[3].tolist()")
    assert b.answer() is None
    words[9] = 77
    assert b.ask("a[3].tolist()") == a.ask("a[3].tolist()") == words
    a.run("region.evict()")
    assert b.ask("a[3].tolist()") == a.ask("a[3].tolist()") == words


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_ends_or_stops_in_the_middle_of_a_fault(engines: MakeEngines, how: signal.Signals) -> None:
    served = engines(**HOLD)
    a, b = pair(served)
    with held_eviction(served, 3, a):
        words = a.ask("a[3].tolist()")
        words[9] = 77
        ask_and_wait_for_its_fault(served, b, "a.__setitem__((3, 8), 66)")
        ask_and_wait_for_its_fault(served, a, "a.__setitem__((3, 9), 77)")
        b.process.send_signal(how)
        if how == signal.SIGKILL:
            b.process.wait(30)
    assert a.answer() is None
    if how == signal.SIGKILL:
        wait_until(lambda: statistics(served)["attached_processes"] == 1, "the dead process is detached")
        assert a.ask("a[3].tolist()") == words
    # The other one reads, writes and evicts as if nothing were.
    for turn in range(3):
        a.run(f"a[:] = np.arange(64, dtype=np.uint64)[:, None] * 10 + {turn}")
        a.run("region.evict()")
        assert a.ask("a[:, 5].tolist()") == [page * 10 + turn for page in range(64)]
    if how == signal.SIGSTOP:
        b.process.send_signal(signal.SIGCONT)
        assert b.answer() is None
        assert a.ask("a[3, 7:10].tolist()") == b.ask("a[3, 7:10].tolist()") == [32, 66, 32]
        assert b.ask("a[:, 5].tolist()") == [page * 10 + 2 for page in range(64)]


def test_a_dead_process_that_nobody_has_missed_yet(engines: MakeEngines) -> None:
    """The kernel says ESRCH to whoever has to do with it: nobody fails because of that."""
    served = engines()
    a, b = pair(served)
    base, theirs = b.ask("region.address"), b.ask("region.fault_fd")
    with_pidfd = os.pidfd_open(b.process.pid)
    uffd = libc.syscall(PIDFD_GETFD, with_pidfd, theirs, 0)
    os.close(with_pidfd)
    assert uffd >= 0
    region = served.regions["shared"]
    b.kill()
    wait_until(lambda: statistics(served)["attached_processes"] == 1, "detached")
    number, guard = region.join()
    region.attach(number, uffd, base, 1 << 14 | 1 << 13)  # as if it were not
    a.run("a[:] = 7")
    assert a.ask("region.evict()") > 0
    assert a.ask("(a == 7).all().item()") is True
    a.run("region.evict()")
    with pytest.raises(UsageError):
        region.prefetch(number, 0, 8)
    assert a.ask("(a == 7).all().item()") is True
    region.detach(number)
    os.close(guard)


def test_pins_belong_to_a_process(engines: MakeEngines) -> None:
    served = engines()
    a, b = pair(served)
    a.run("a[:8] = 3; pin = region.pin(a[:8])")
    b.run("pin = region.pin(a[4:12])")
    assert statistics(served)["pinned_pages"] == 12
    assert b.ask("region.unpin(a[:4])") == ["usage", "pages 0 to 4 are not all pinned"]
    assert a.ask("region.evict(a[:12])") == 0
    a.kill()
    wait_until(lambda: statistics(served)["pinned_pages"] == 8, "its pins are gone, those of the other are not")
    assert b.ask("region.evict(a[:12])") == 4 * 4096
    b.run("pin.unpin()")
    assert statistics(served)["pinned_pages"] == 0
    assert b.ask("region.evict(a[:12])") == 8 * 4096
    assert b.ask("a[:8].tolist() == [[3] * 512] * 8") is True


def test_the_region_lives_while_one_process_has_it(engines: MakeEngines) -> None:
    served = engines()
    a, b = pair(served)
    c = served.agent()
    c.attach()
    a.run("a[:] = np.arange(64, dtype=np.uint64)[:, None]; region.evict()")
    (info,) = served.describe()
    assert info.pids == (a.process.pid, b.process.pid, c.process.pid) and info.pid == a.process.pid
    a.run("del a; region.close()")  # in order, and the one that made it
    assert [each.pids for each in served.describe()] == [(b.process.pid, c.process.pid)]
    b.kill()
    wait_until(lambda: statistics(served)["attached_processes"] == 1, "b is gone")
    assert c.ask("a[:, 3].tolist()") == list(range(64))
    d = served.agent()
    d.attach(c.ask("region.number"))
    assert d.ask("(region.name, region.nbytes, region.resident)") == ["shared", 64 * 4096, 32 * 4096]
    c.run("region.evict()")
    c.end()
    assert d.ask("a[:, 3].tolist()") == list(range(64))
    d.run("del a; region.close()")
    assert served.describe() == [] and served.store.statistics().pages_stored == 0
    assert served.service.made.total() == served.service.reserved_pages == 0
    code, message = d.ask("client.attach('shared')")
    assert code == "usage" and "yours: none" in message


def test_what_attach_refuses(engines: MakeEngines) -> None:
    served = engines()
    a, b = served.agent(), served.agent()
    a.create(64, 32, "one")
    a.run("other = client.region(PAGE, name='two'); third = client.region(PAGE, name='two')")
    code, message = b.ask("client.attach('three')")
    assert code == "usage" and "'three'" in message
    assert "'one' (number 1), 'two' (number 2), 'two' (number 3)" in message
    code, message = b.ask("client.attach('two')")
    assert code == "usage" and "2 or 3" in message
    assert b.ask("client.attach(3).number") == 3
    assert b.ask("client.attach('')")[0] == b.ask("client.attach('n' * 49)")[0] == "usage"
    assert b.ask("client.attach(4)")[0] == "usage"
    b.run("""
        os.environ["RAMSTER_SOCKET"] = sys.argv[1]
        with ramster.attach("one") as region:
            memoryview(region)[0] = 9
        assert region.closed
        pid = os.fork()
        if pid == 0:
            try: client.attach("one")
            except ramster.ForkedError: os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    """)
    assert a.ask("a[0, 0].item()") == 9


def test_too_many_processes(engines: MakeEngines) -> None:
    served = engines()
    a = served.agent()
    a.create(64, 32)
    talkers = [Talker(served) for _ in range(32)]
    try:
        answers = [each.say({"op": "join", "version": messages.VERSION, "region": "shared"}) for each in talkers]
        assert all(answer["ok"] and answer["name"] == "shared" for answer in answers[:31])
        assert answers[31]["error"] == "refused" and "32 processes" in answers[31]["message"]
        assert talkers[0].say({"op": "join", "version": messages.VERSION, "region": "shared"})["error"] == "usage"
        assert talkers[31].ended()
        with Talker(served) as late:
            answer = late.say({"op": "join", "version": messages.VERSION + 1, "region": "shared"})
            assert answer["error"] == "protocol"
        assert a.ask("a[3, 3].item()") == 0
    finally:
        for each in talkers:
            each.socket.close()
    wait_until(lambda: len(served.describe()[0].pids) == 1, "gone")
    b = served.agent()
    b.attach()
    b.run("a[3] = 4")
    assert a.ask("a[3, 3].item()") == 4


@needs_root
def test_a_region_of_another_user_is_refused(engines: MakeEngines, directory: Path) -> None:
    served = engines()
    for path, mode in ((directory, 0o755), (directory / "run", 0o755), (served.socket, 0o666)):
        path.chmod(mode)
    drop = "os.setgroups([]); os.setgid({0}); os.setuid({0})\nimport warnings; warnings.simplefilter('ignore')\n"
    root, alice, bob = served.agent(), served.agent(drop.format(65533)), served.agent(drop.format(65534))
    alice.create(64, 32)
    code, message = bob.ask("client.attach('shared')")
    assert code == "permission-missing" and "user 65533" in message
    assert bob.ask("client.attach(1)")[0] == "permission-missing"
    code, message = bob.ask("client.attach('else')")
    assert code == "usage" and "shared" not in message, "what others have is not for him"
    code, message = root.ask("client.attach('shared')")
    assert code == "permission-missing" and "1 (user 65533)" in message, "a name is no invitation to a stranger's pages"
    root.attach(1)
    alice.run("a[9] = 9")
    assert root.ask("a[9, 9].item()") == 9
    mine = served.agent()
    mine.create(64, 32)
    mine.run("a[9] = 5")
    another = served.agent()
    another.attach()
    assert another.ask("a[9, 9].item()") == 5, "two users may use one name"


@both_ways
def test_lost_pages_are_lost_for_whoever_comes_later(engines: MakeEngines, poison: str) -> None:
    served = engines(poison=poison)
    a, b = pair(served)
    a.run("a[:] = np.frombuffer(os.urandom(64 * PAGE), np.uint64).reshape(64, 512); region.evict()")
    served.store.corrupt(served.regions["shared"].pool, 7, 500)
    assert b.ask("errno_of(6)") == 0
    assert b.ask("errno_of(7)") in (errno.EFAULT, EHWPOISON)
    c = served.agent()
    c.attach()
    for each in (c, a, b):
        assert each.ask("region.check(a[7])")[0] == "region-lost"
        assert each.ask("errno_of(7)") in (errno.EFAULT, EHWPOISON)
        assert [page for page in range(64) if page != 7 and each.ask(f"errno_of({page})")] == []
    assert statistics(served)["lost_pages"] == 1
    c.send("a[7, 0].item()")
    with pytest.raises(EOFError, match="-7"):
        c.answer()
    assert a.ask("a[8].any().item()") is True


def test_a_page_refused_to_one_process_comes_back_for_all(engines: MakeEngines) -> None:
    served = engines(arena_bytes=4 << 20, store_full_wait_ms=0, full_wait_ms=50)
    a, b = pair(served, pages=256, resident=16)
    pool = served.store.create_pool(pages=1 << 14)
    index = 0
    with pytest.raises(StoreFull):
        while True:
            served.store.put(pool, index, os.urandom(4096))
            index += 1
    # Dirty pages that nobody takes, until a touch finds no room: EFAULT from a system call.
    a.run("""
        random = open("/dev/urandom", "rb", buffering=0)
        refused = -1
        for page in range(256):
            try: random.readinto(a[page])
            except OSError:
                refused = page
                break
    """)
    page = a.ask("refused")
    assert page >= 12 and statistics(served)["refused"] > 0
    assert a.ask(f"errno_of({page})") != 0, "poisoned where it was refused"
    served.store.destroy_pool(pool)
    assert a.ask(f"errno_of({page})") != 0
    assert b.ask(f"a[{page}].any().item()") is False, "there is room for another process"
    assert a.ask(f"a[{page}].any().item()") is False, "and what is in RAM is there for all"


WORKER = """
region = ramster.connect(sys.argv[1]).attach("shared")
a = region.array((region.nbytes // PAGE, 512), np.uint64)
own, owners, seed, rounds = (int(each) for each in sys.argv[2:6])
rng = np.random.default_rng(seed)
pages = a.shape[0]
sequence = np.zeros(pages, np.uint64)          # what this process wrote, or saw last
steps = np.arange(510, dtype=np.uint64)
def body(page, number):
    # The check of a page: each word follows from the page and the number of the write.
    return (np.uint64(page) << np.uint64(40)) + (np.uint64(number) << np.uint64(16)) + steps
torn = 0
def look(page):
    global torn
    end = a[page, 511].item()                  # the writer writes it last
    words = a[page, 1:511].copy()
    begin = a[page, 0].item()                  # and this first
    if page % owners == own:
        assert begin == end == sequence[page], (page, begin, end, sequence[page])
    elif begin != end:
        torn += 1                              # seen in the middle of a write
        assert begin >= sequence[page]
        return
    assert end >= sequence[page], (page, end, sequence[page])
    assert not end or (words == body(page, end)).all(), (page, end, words)
    sequence[page] = end
for turn in range(rounds):
    page = int(rng.integers(pages))
    if rng.random() < 0.5:
        page += own - page % owners
        if page >= pages: continue
        look(page)
        sequence[page] += np.uint64(1)
        number = sequence[page]
        a[page, 0] = number
        a[page, 1:511] = body(page, number)
        a[page, 511] = number
    else:
        look(page)
    if turn % 200 == own * 50:
        region.evict((page * PAGE, min(page + 64, pages) * PAGE))
    if turn % 100 == 0: print("turn", turn, flush=True)
print("through", torn, flush=True)
"""


def worker(path: Path, own: int, owners: int, rounds: int) -> subprocess.Popen[str]:
    return start_script(WORKER, path, own, owners, own + 7, rounds)


@pytest.mark.parametrize("evictors", [1, 3])
def test_writers_and_readers_under_pressure(engines: MakeEngines, evictors: int) -> None:
    """Five processes, each the only writer of every fifth page, a budget of an eighth: no write is lost, nothing old is
    read. One is killed in the middle of its writes, and its pages stay as consistent as one killed write leaves them.
    """
    served = engines(fault_threads=2, evictor_threads=evictors)
    a = served.agent()
    a.create(1000, 125)
    workers = [worker(served.socket, own, 5, 2500) for own in range(4)]
    victim = worker(served.socket, 4, 5, 10**9)
    try:
        assert victim.stdout is not None
        for _ in range(5):
            assert victim.stdout.readline().startswith("turn"), victim.communicate()
        victim.kill()
        for each in workers:
            status, out, err = finish(each)
            assert status == 0 and "through" in out, err
    finally:
        for each in (*workers, victim):
            each.kill()
            each.communicate()
    wait_until(lambda: statistics(served)["attached_processes"] == 1, "all are gone")
    late = served.agent()
    late.attach()
    late.run("""
        steps = np.arange(510, dtype=np.uint64)
        torn = [page for page in range(1000) if a[page, 0] != a[page, 511]]
        for page in range(1000):
            number = a[page, 0]
            if page not in torn and number:
                assert (a[page, 1:511] == (np.uint64(page) << np.uint64(40)) + (number << np.uint64(16)) + steps).all()
        assert len(torn) <= 1 and all(page % 5 == 4 for page in torn), torn
        assert sum(bool(a[page, 0]) for page in range(1000)) > 300
    """)
    assert statistics(served)["faults_minor"] > 0
    assert statistics(served)["lost_pages"] == statistics(served)["refused"] == 0
