"""The application's side against an independent node: buffers, forks, a node that dies, lost pages, permissions."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.frontswap.conftest import Node, finish, run_script, start_script

from ramster.engine.links import Links
from ramster.engine.region import Region as EngineRegion
from ramster.engine.store import Store
from ramster.frontswap.regions import RegionStatistics

StartNode = Callable[..., Node]
both_nodes = pytest.mark.parametrize("start_node", ["reference", "engine"], indirect=True)
both_ways = pytest.mark.parametrize("poison", ["auto", "guard"])
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")


@both_nodes
def test_pages_come_back_right(start_node: StartNode) -> None:
    node = start_node("--pattern")
    run_script(
        """
        client = ramster.connect(sys.argv[1])
        a = client.empty((64, 512), np.uint64, resident="128KiB")
        region = ramster.region_of(a)
        assert region.nbytes == 64 * PAGE and region.resident == 32 * PAGE
        # Scalar indexing faults while it holds the interpreter's lock.
        for page in range(64):
            assert a[page, 5] == first_word(page)
        a[7] = 7
        a[8, 1] = 8
        assert 0 < region.evict() <= 64 * PAGE and region.statistics().resident_pages == 0
        assert (a[7] == 7).all() and a[8, 1] == 8 and a[8, 0] == first_word(8) and a[63, 511] == first_word(63)
        assert region.evict((7 * PAGE, 7 * PAGE + 1)) == PAGE
        assert region.evict(slice(0, 0)) == 0
        assert region.prefetch(a[3:5]) == 2 * PAGE
        assert region.statistics().pages == 64 and not region.statistics().full
        region.check()
        # System calls on away pages.
        region.evict()
        read, write = os.pipe()
        if not region.user_mode_only:
            assert os.write(write, a[7:8]) == PAGE and os.read(read, PAGE) == bytes(np.full(512, 7, np.uint64))
        """,
        node.socket,
    )


@both_nodes
def test_fresh_memory_is_zeros(start_node: StartNode) -> None:
    run_script(
        """
        os.environ["RAMSTER_SOCKET"] = sys.argv[1]
        a = ramster.zeros((3, 1000), np.float32)
        assert a.shape == (3, 1000) and a.dtype == np.float32 and not a.any()
        b = ramster.empty(0)
        assert b.size == 0
        assert ramster.region_of(a) is not ramster.region_of(b)
        """,
        start_node().socket,
    )


@both_nodes
def test_threads_fault_at_once(start_node: StartNode) -> None:
    run_script(
        """
        a = ramster.connect(sys.argv[1]).empty((256, 512), np.uint64)
        region = ramster.region_of(a)
        wrong = []
        def work(seed):
            for page in np.random.default_rng(seed).permutation(256).tolist():
                a[page, seed + 1] = seed
                if a[page, 0] != first_word(page) or a[page, seed + 1] != seed:
                    wrong.append(page)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads: thread.start()
        while any(thread.is_alive() for thread in threads):
            region.evict()
        for thread in threads: thread.join()
        assert not wrong
        assert all((a[:, seed + 1] == seed).all() for seed in range(4))
        """,
        start_node("--pattern").socket,
    )


@both_nodes
def test_close_and_use_after_close(start_node: StartNode) -> None:
    node = start_node("--pattern")
    run_script(
        """
        client = ramster.connect(sys.argv[1])
        region = client.region(10 * PAGE + 1, name="closing")
        assert region.nbytes == 11 * PAGE
        with memoryview(region) as view:
            assert (view.nbytes, view.format, view.readonly, view.itemsize) == (11 * PAGE, "B", False, 1)
            view[0] = 1
            try: region.close()
            except BufferError: pass
            else: raise AssertionError
            assert view[0] == 1 and not region.closed
        a = region.array(10, "<u4", offset=8)
        part = a[3:5]
        del a
        assert ramster.region_of(part) is region and region.exports == 1
        for close in (region.close, client.close):
            try: close()
            except BufferError: pass
            else: raise AssertionError
        region.check()
        del part
        region.close()
        region.close()
        for use in (region.check, region.pin, region.statistics, lambda: memoryview(region), lambda: region.array(1),
                    lambda: region.advise("random"),
                    lambda: region.address, lambda: region.touch(0, 1)):
            try: use()
            except ramster.UsageError: pass
            else: raise AssertionError(use)
        with client.region(1) as other:
            pass
        assert other.closed
        client.close()
        """,
        node.socket,
    )
    assert node.line() == "gone closing"
    assert "regions_made=2, regions_closed=2" in node.stop()


def test_wrong_arguments(start_node: StartNode) -> None:
    run_script(
        """
        client = ramster.connect(sys.argv[1])
        region = client.region(4 * PAGE)
        for wrong in (
            lambda: client.region(0), lambda: client.region(-1), lambda: client.region(PAGE << 33),
            lambda: client.region(1, resident="64 potatoes"), lambda: client.region(1, resident=0),
            lambda: client.region(1, name="n" * 49),
            lambda: client.empty(3, object), lambda: client.empty(-1), lambda: client.empty((2, -1)),
            lambda: region.array(4 * PAGE + 1, "u1"), lambda: region.array(1, offset=-8), lambda: region.array(1, "V0"),
            lambda: region.pin((0, 5 * PAGE)), lambda: region.check((2, 1)), lambda: region.evict(slice(0, 100, 2)),
            lambda: region.advise("willneed"), lambda: region.advise("random", (0, 5 * PAGE)),
            lambda: region.advise(None),
            lambda: region.unpin((0, PAGE)), lambda: region.pin(np.zeros(3)), lambda: ramster.region_of(np.zeros(3)),
        ):
            try: wrong()
            except ramster.UsageError as error: assert str(error)
            else: raise AssertionError(wrong)
        try: region.touch(3, 2)
        except ValueError: pass
        else: raise AssertionError
        """,
        start_node().socket,
    )


def test_no_node(directory: Path) -> None:
    run_script(
        """
        for path in (sys.argv[1] + "/none.sock", sys.argv[1] + "/" + "x" * 200):
            try: ramster.connect(path)
            except ramster.NodeUnreachable as error: assert "ramster node --config" in str(error)
            else: raise AssertionError
        """,
        directory,
    )


@both_nodes
def test_forgotten_regions_are_closed(start_node: StartNode) -> None:
    node = start_node("--pattern")
    script = start_script(
        """
        client = ramster.connect(sys.argv[1])
        a = client.empty(1000, name="dropped")
        a[0] = 1
        del a
        print("dropped", flush=True)
        sys.stdin.readline()
        kept = client.empty(1000, name="kept")       # still there, with its array, when the interpreter ends
        kept[0] = 1
        unused = client.region(1000, name="unused")
        """,
        node.socket,
    )
    assert node.line() == "gone dropped"
    status, _, err = finish(script)
    assert (status, err) == (0, "")
    assert {node.line(), node.line()} == {"gone kept", "gone unused"}


FORK = """
client = ramster.connect(sys.argv[1])
a = client.empty((16, 512), np.uint64, name="parent")
region = ramster.region_of(a)
a[1] = 11
a[2] = 22
address = region.address
region.evict((PAGE, 2 * PAGE))
def child(work):
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(SystemExit):
            os._exit(work() or 0)
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def still_right():
    assert (a[1] == 11).all() and (a[2] == 22).all()
    for page in range(3, 16):
        assert a[page, 0] == first_word(page)
    region.evict()
    assert (a[1] == 11).all() and (a[2] == 22).all()
    region.check()
"""


@pytest.mark.parametrize("page", [1, 2, 3], ids=["away", "resident", "untouched"])
def test_fork_touch_is_a_clear_failure(start_node: StartNode, page: int) -> None:
    run_script(
        FORK
        + """
page = int(sys.argv[2])
assert child(lambda: int(a[page, 0]) & 0) == -signal.SIGSEGV
def write(): a[page, 0] = 1
assert child(write) == -signal.SIGSEGV
# Nothing of the child's lands on the address range either.
def grab():
    taken = [mmap.mmap(-1, 16 * PAGE) for _ in range(200)]
    return int(a[page, 0]) & 0
assert child(grab) == -signal.SIGSEGV
# Nor in its own children.
assert child(lambda: 0 if child(lambda: int(a[page, 0]) & 0) == -signal.SIGSEGV else 1) == 0
still_right()
""",
        start_node("--pattern").socket,
        page,
    )


@both_nodes
def test_fork_methods_refuse_and_destructors_do_nothing(start_node: StartNode) -> None:
    node = start_node("--pattern")
    run_script(
        FORK
        + """
def methods():
    for use in (region.pin, region.unpin, region.prefetch, region.evict, region.check, region.statistics, region.close,
                lambda: region.advise("random"),
                region.unmap, region.begin_close, lambda: memoryview(region), lambda: region.array(1),
                lambda: region.touch(0, 1), lambda: region.address, lambda: region.fault_fd,
                lambda: client.region(1), lambda: client.empty(1)):
        try: use()
        except ramster.ForkedError: pass
        else: return 1
assert child(methods) == 0
def destructors():
    # Another mapping of the child at the region's address, as if nothing had been reserved there.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    size = 16 * PAGE
    assert libc.mmap(address, size, 3, 0x32, -1, 0) == address         # MAP_PRIVATE|FIXED|ANONYMOUS
    ctypes.memset(address, 0xAB, size)
    global a, region
    del a, region
    gc.collect()
    return 0 if ctypes.string_at(address, size) == bytes([0xAB]) * size else 1
assert child(destructors) == 0
# A child that ends in the ordinary way runs atexit handlers and every destructor.
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
# A child may have regions of its own.
def own():
    b = ramster.connect(sys.argv[1]).empty((2, 512), np.uint64, name="child")
    return 0 if b[1, 0] == first_word(1) else 1
assert child(own) == 0
still_right()
print("end", flush=True)
""",
        node.socket,
    )
    assert {node.line(), node.line()} == {"gone child", "gone parent"}


@both_nodes
def test_fork_while_threads_fault(start_node: StartNode) -> None:
    run_script(
        FORK
        + """
stop = threading.Event()
wrong = []
def work():
    while not stop.is_set():
        region.evict((3 * PAGE, 16 * PAGE))
        wrong.extend(page for page in range(3, 16) if a[page, 0] != first_word(page))
thread = threading.Thread(target=work)
thread.start()
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
thread.join()
assert not wrong
still_right()
""",
        start_node("--pattern").socket,
    )


@both_nodes
def test_child_does_not_keep_the_region(start_node: StartNode) -> None:
    """The application ends while its forked child lives on with a copy of every descriptor."""
    node = start_node("--pattern")
    script = start_script(
        FORK
        + """
ready, told = os.pipe()
if os.fork() == 0:
    os.write(told, b"x")
    sys.stdin.readline()
    os._exit(0)
os.read(ready, 1)
os._exit(0)
""",
        node.socket,
    )
    assert node.line() == "gone parent"
    assert finish(script)[0] == 0


@both_ways
def test_node_killed_while_faulting(start_node: StartNode, poison: str) -> None:
    """The node has read the fault and dies: the reader (which holds the interpreter's lock) must not see zeros."""
    node = start_node("--pattern", "--stalled", "5:1", "--poison", poison)
    script = start_script(
        """
        a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64)
        print("value", a[5, 0], flush=True)
        """,
        node.socket,
    )
    assert node.line() == "stalled 5"
    node.kill()
    status, out, err = finish(script)
    assert (status, out) == (-signal.SIGBUS, "")
    assert "the node of a region is gone" in err


@both_ways
@both_nodes
def test_resident_pages_outlive_the_node(start_node: StartNode, poison: str) -> None:
    node = start_node("--pattern", "--poison", poison)
    script = start_script(
        """
        a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64)
        region = ramster.region_of(a)
        assert bool(region.features & 1 << 14) == (sys.argv[2] == "auto")
        a[2] = 77
        clean = a[1, 0]
        assert a[3, 0] == first_word(3) and a[4, 0] == first_word(4)
        # Page 4 stays in the memfd, but this process has to fault to see it.
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert libc.madvise(region.address + 4 * PAGE, PAGE, mmap.MADV_DONTNEED) == 0
        print("filled", flush=True)
        sys.stdin.readline()
        until(lambda: region.node_gone)
        assert (a[2] == 77).all() and a[1, 0] == clean == first_word(1) and (a[4] == first_word(4)).all()
        a[1], a[2], a[3], a[4] = 1, 2, 3, 4       # 1 and 3 were mapped clean, write-protected
        assert [a[page, 9] for page in (1, 2, 3, 4)] == [1, 2, 3, 4]
        for ask in (region.check, region.pin, region.statistics):
            try: ask()
            except ramster.NodeUnreachable: pass
            else: raise AssertionError
        pid = os.fork()
        if pid == 0:
            print(a[2, 0], flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
        print("right", flush=True)
        print("value", a[9, 0], flush=True)
        """,
        node.socket,
        poison,
    )
    assert script.stdout is not None and script.stdin is not None
    assert script.stdout.readline() == "filled\n"
    node.kill()
    script.stdin.write("killed\n")
    status, out, err = finish(script)
    assert (status, out) == (-signal.SIGBUS, "right\n"), err


@both_nodes
def test_close_after_the_node_died(start_node: StartNode) -> None:
    node = start_node("--pattern", "--node-wait-ms", "600000")
    script = start_script(
        """
        client = ramster.connect(sys.argv[1])
        region, other = client.region(PAGE), client.region(PAGE)
        memoryview(region)[0]
        print("made", flush=True)
        sys.stdin.readline()
        region.close()
        try: ramster.connect(sys.argv[1])
        except ramster.NodeUnreachable: print("closed")
        """,
        node.socket,
    )
    assert script.stdout is not None and script.stdin is not None
    assert script.stdout.readline() == "made\n"
    node.kill()
    script.stdin.write("killed\n")
    # Neither waits for the ten minutes that the guardian would give the node.
    assert finish(script) == (0, "closed\n", "")


@both_ways
def test_lost_page_is_sigbus_and_reported(start_node: StartNode, poison: str) -> None:
    node = start_node("--pattern", "--lost", "5:2", "--poison", poison)
    script = start_script(
        """
        a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64)
        region = ramster.region_of(a)
        a[:] = np.arange(16, dtype=np.uint64)[:, None]
        region.check()
        region.evict()
        for ask in (region.check, region.prefetch, region.pin, lambda: region.check(a[6:8])):
            try: ask()
            except ramster.RegionLost as error: assert error.runs[-1] == (6, 1), error.runs
            else: raise AssertionError
        region.check(a[:5])
        region.check(a[7:])
        good = [0, 1, 2, 3, 4, 7, 8, 15]
        assert [a[page, 3] for page in good] == good
        # In a child it would be SIGSEGV, so lose one page here, through a system call, and go on.
        read, write = os.pipe()
        if not region.user_mode_only:
            try: os.write(write, a[5:6])
            except OSError: pass
            else: raise AssertionError("a lost page was written out")
            assert region.pages_replaced == (1 if sys.argv[2] == "guard" else 0)
        assert [a[page, 3] for page in good] == good
        print("right", flush=True)
        print("value", a[6, 0], flush=True)
        """,
        node.socket,
        poison,
    )
    status, out, err = finish(script)
    assert (status, out) == (-signal.SIGBUS, "right\n"), err


def test_notes_of_the_node_reach_the_user(start_node: StartNode) -> None:
    script = start_script(
        """
        region = ramster.connect(sys.argv[1]).region(1, name="matrix")
        memoryview(region)[0]
        region.check()
        sys.stdin.readline()
        """,
        start_node("--note", "the arena is\tfull \N{SNOWMAN}").socket,
    )
    assert script.stderr is not None and script.stdin is not None
    assert script.stderr.readline() == "ramster: the arena is?full \N{SNOWMAN} (region 'matrix')\n"
    script.stdin.write("read\n")
    assert finish(script) == (0, "", "")


def test_a_note_that_comes_again_and_again_is_counted(start_node: StartNode) -> None:
    """A process that survives SIGBUS wrote a line for each refused write, and none said which region it was."""
    said = [f"region matrix: page {page} is lost; SIGBUS" for page in range(40)]
    said += ["region full: no room; SIGBUS"] * 3 + ["region f: page 1 is of another one"]
    said += [f"{c} of another kind" for c in "abcdef"]
    script = start_script(
        'region = ramster.connect(sys.argv[1]).region(1, name="matrix"); memoryview(region)[0]; region.close()',
        start_node(*(word for note in said for word in ("--note", note))).socket,
    )
    status, out, err = finish(script)
    assert (status, out) == (0, "")
    more = "more like this within 10 s, the last:"
    assert err.splitlines() == [
        "ramster: region matrix: page 0 is lost; SIGBUS",
        "ramster: region full: no room; SIGBUS (region 'matrix')",
        "ramster: region f: page 1 is of another one (region 'matrix')",
        *(f"ramster: {c} of another kind (region 'matrix')" for c in "abc"),
        # Six kinds are told apart; what comes beyond is counted all the same. The region's end says what was counted.
        f"ramster: 42 {more} f of another kind (region 'matrix')",
        f"ramster: 2 {more} region full: no room; SIGBUS (region 'matrix')",
    ]


@needs_root
@both_nodes
def test_locked_process(start_node: StartNode) -> None:
    """mlockall(MCL_FUTURE) fills new mappings at once: not this one, or its pages would be zeros."""
    run_script(
        """
        assert ctypes.CDLL(None).mlockall(1 | 2) == 0
        a = ramster.connect(sys.argv[1]).empty((64, 512), np.uint64)
        assert [a[page, 9] for page in range(64)] == [first_word(page) for page in range(64)]
        """,
        start_node("--pattern").socket,
    )


@both_nodes
def test_pin(start_node: StartNode) -> None:
    run_script(
        """
        region = ramster.connect(sys.argv[1]).region(64 * PAGE, resident=16 * PAGE)
        with region.pin((0, 8 * PAGE)) as pin, region.pin((4 * PAGE, 8 * PAGE)):
            assert region.statistics().pinned_pages == 8
            assert region.evict((0, 8 * PAGE)) == 0
        assert region.statistics().pinned_pages == 0
        pin.unpin()
        try: region.pin()
        except ramster.RegionFull: pass
        else: raise AssertionError
        assert region.statistics().pinned_pages == 0
        region.pin((0, PAGE))
        region.unpin((0, PAGE))
        assert region.evict((0, 8 * PAGE)) == 8 * PAGE
        """,
        start_node().socket,
    )


@both_nodes
def test_pin_for_o_direct(start_node: StartNode, tmp_path: Path) -> None:
    """The kernel writes to pinned pages behind the process's back; an eviction afterwards keeps what was written."""
    file = tmp_path / "data"
    file.write_bytes(os.urandom(8 * 4096))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    run_script(
        """
        region = ramster.connect(sys.argv[1]).region(64 * PAGE)
        view = memoryview(region)
        data = open(sys.argv[2], "rb").read()
        fd = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT)
        span = slice(3 * PAGE, 11 * PAGE)
        with region.pin(span):
            assert os.preadv(fd, [view[span]], 0) == 8 * PAGE
            assert region.evict() == 0
        assert region.evict() == 8 * PAGE
        assert view[span] == data
        """,
        start_node().socket,
        file,
    )


def drop_to_nobody() -> str:
    return "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"


@needs_root
def test_no_permission_says_what_to_do() -> None:
    run_script(
        """
        from ramster.frontswap import _client
        libc = ctypes.CDLL(None, use_errno=True)
        number = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
        rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
        filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        libc.prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]
        assert libc.prctl(38, 1, 0, 0, 0) == 0                             # no new privileges
        assert libc.prctl(22, 2, ctypes.addressof(filter), 0, 0) == 0      # userfaultfd answers EPERM
        try: _client.probe()
        except ramster.PermissionMissing as error:
            assert "sysctl vm.unprivileged_userfaultfd=1" in str(error) and "CAP_SYS_PTRACE" in str(error)
            assert "/dev/userfaultfd" in str(error) and "\\n" not in str(error)
        else: raise AssertionError
        """
    )


@pytest.mark.parametrize("way", ["syscall", "device", "user-mode"])
def test_ways_to_a_userfaultfd(start_node: StartNode, way: str) -> None:
    """Each serves every fault of the program; that of user mode alone serves system calls in pinned ranges only."""
    run_script(
        """
        import warnings
        from ramster.frontswap import _client
        os.environ["RAMSTER_USERFAULTFD"] = way = sys.argv[2]
        warnings.simplefilter("ignore")
        try: features, user_mode_only = _client.probe()
        except ramster.PermissionMissing as error:
            assert "vm.unprivileged_userfaultfd" in str(error) and "setfacl" in str(error) and os.geteuid() != 0
            sys.exit()
        assert user_mode_only == (way == "user-mode")
        region = ramster.connect(sys.argv[1]).region(64 * PAGE, resident=64 * PAGE)
        a = region.array((64, 512), np.uint64)
        words = np.arange(64 * 512, dtype=np.uint64).reshape(64, 512)
        a[:] = words
        region.evict()
        file = os.memfd_create("file")
        os.write(file, words[::-1].tobytes())
        def read_into(at, pages): return os.preadv(file, [a[at:at + pages]], at * PAGE)
        def refused(call, *arguments):
            try: call(*arguments)
            except OSError as error: return error.errno == 14
        out = os.memfd_create("out")
        assert a[9].tolist() == words[9].tolist() and a[10, 0] == words[10, 0]    # here, and clean
        if user_mode_only:
            assert refused(os.write, out, a[40:41])               # away
            assert refused(read_into, 40, 1)
            assert os.write(out, a[9:10]) == PAGE
            assert refused(read_into, 9, 1)                       # here, but clean
            a[20] = words[20]
            region.evict(a[21:24])
            assert read_into(20, 4) == PAGE, "what it moved before"
            assert (a[9] == words[9]).all() and (a[40:42] == words[40:42]).all(), "a call that fails changes nothing"
        with region.pin(a[40:44]), region.pin(a[9]):
            assert os.pwrite(out, a[40:44], 0) == 4 * PAGE == read_into(40, 4) and read_into(9, 1) == PAGE
        assert os.pread(out, 4 * PAGE, 0) == words[40:44].tobytes()
        region.evict()
        assert (a[40:44] == words[::-1][40:44]).all() and (a[9] == words[::-1][9]).all()
        """,
        start_node("--engine").socket,
        way,
    )


def test_an_unknown_way_to_a_userfaultfd(start_node: StartNode) -> None:
    run_script(
        """
        os.environ["RAMSTER_USERFAULTFD"] = "magic"
        try: ramster.connect(sys.argv[1]).region(1)
        except ramster.UsageError as error: assert "RAMSTER_USERFAULTFD" in str(error) and "user-mode" in str(error)
        else: raise AssertionError
        """,
        start_node().socket,
    )


@needs_root
def test_the_device_is_enough(start_node: StartNode, directory: Path) -> None:
    """A user with nothing but access to /dev/userfaultfd, which only this process's name space gives him."""
    node = start_node("--engine")
    for path, mode in ((directory, 0o755), (directory / "run", 0o755), (node.socket, 0o666)):
        path.chmod(mode)
    (directory / "device").mkdir()
    out = run_script(
        """
        libc = ctypes.CDLL(None, use_errno=True)
        place = sys.argv[2].encode()
        if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
            print("no name space"); sys.exit()
        assert libc.mount(b"none", place, b"tmpfs", 0, None) == 0
        try: os.mknod(place + b"/uffd", 0o20666, os.stat("/dev/userfaultfd").st_rdev)
        except OSError: print("no device"); sys.exit()
        os.chmod(place + b"/uffd", 0o666)
        assert libc.mount(place + b"/uffd", b"/dev/userfaultfd", None, 0x1000, None) == 0
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        region = ramster.connect(sys.argv[1]).region(16 * PAGE)
        assert not region.user_mode_only
        view = memoryview(region)
        view[5 * PAGE] = 5
        region.evict()
        read, write = os.pipe()
        assert os.write(write, view[5 * PAGE:5 * PAGE + 1]) == 1 and os.read(read, 1) == bytes([5])
        """,
        node.socket,
        directory / "device",
    )
    if out:
        pytest.skip(out.strip())


@needs_root
@both_nodes
def test_unprivileged_process(start_node: StartNode, directory: Path) -> None:
    """Without privileges everything works; with vm.unprivileged_userfaultfd=0 system calls need a pin first."""
    node = start_node("--pattern")
    for path, mode in ((directory, 0o755), (directory / "run", 0o755), (node.socket, 0o666)):
        path.chmod(mode)
    run_script(
        """
        import warnings
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64)
            ramster.connect(sys.argv[1]).region(1)
        region = ramster.region_of(a)
        assert len(caught) == region.user_mode_only, caught
        assert all("EFAULT" in str(warning.message) for warning in caught)
        assert [a[page, 0] for page in range(16)] == [first_word(page) for page in range(16)]
        region.evict()
        read, write = os.pipe()
        if region.user_mode_only:
            try: os.write(write, a[3:4])
            except OSError as error: assert error.errno == 14
            else: raise AssertionError
        with region.pin(a[3:5]):
            assert os.write(write, a[3:4]) == PAGE
            data = os.read(read, PAGE)
            assert data == a[3].tobytes() == pattern(3)
            os.write(write, data)
            assert os.readv(read, [a[4:5]]) == PAGE
        region.evict()
        assert (a[4] == a[3]).all()
        """,
        node.socket,
    )


@needs_root
def test_socket_of_somebody_else(start_node: StartNode, directory: Path) -> None:
    node = start_node()
    directory.chmod(0o755)
    (directory / "run").chmod(0o755)
    run_script(
        drop_to_nobody()
        + """
try: ramster.connect(sys.argv[1])
except ramster.PermissionMissing as error: assert sys.argv[1] in str(error)
else: raise AssertionError
""",
        node.socket,
    )


def test_import_is_cheap() -> None:
    out = run_script(
        """
        import subprocess
        code = "import sys, ramster; print([m for m in ('aiohttp', 'typer', 'rich', 'numpy') if m in sys.modules])"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout, end="")
        assert set(ramster.__all__) <= set(dir(ramster)) and all(getattr(ramster, name) for name in ramster.__all__)
        """
    )
    assert out == "[]\n"


def test_the_engines_counters_are_those_that_users_see() -> None:
    """A counter that one side does not know would silently read as zero."""
    store = Store(8 << 20, lock=False)
    links = Links(store, 1)
    region = EngineRegion(links, 64, 16, name="counters")
    try:
        assert set(region.statistics()) == {field.name for field in dataclasses.fields(RegionStatistics)}
    finally:
        region.close()
        links.stop()
