"""Whatever is given to the region API is accepted as numpy would, or refused with one UsageError that names it."""

import re
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.frontswap.conftest import Node, run_script

import ramster
from ramster.constants import PAGE_BYTES, POOL_PAGES_MAX
from ramster.errors import RamsterError, UsageError
from ramster.frontswap import arguments, messages

StartNode = Callable[..., Node]


class Index:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __index__(self) -> Any:
        return self.value


class Rude:
    """Fails at whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __bool__(self) -> bool:
        raise RuntimeError("no")


def refused(what: str) -> pytest.RaisesExc[UsageError]:
    """Fails unless a UsageError names this argument."""
    return pytest.raises(UsageError, match=rf"^{what}: ")


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        (3, (3,)),
        ((), ()),
        ([3, 4], (3, 4)),
        (np.array([3, 4]), (3, 4)),
        (np.array(5), (5,)),
        (np.int8(5), (5,)),
        (range(3), (0, 1, 2)),
        (Index(6), (6,)),
        ((np.int64(2), Index(3)), (2, 3)),
    ],
)
def test_shapes_are_those_of_numpy(shape: Any, sides: tuple[int, ...]) -> None:
    assert arguments.layout(shape, "u1") == (sides, np.dtype("u1"))
    assert np.empty(shape, "u1").shape == sides


@pytest.mark.parametrize(
    "shape",
    [
        "34",
        b"34",
        3.7,
        (3.0,),
        -1,
        (2, -1),
        None,
        True,
        {3, 4},
        {3: 4},
        np.array([3.0]),
        np.array([[3]]),
        (1,) * 100,
        np.ones(2000, "i8"),
        ((1,), 2),
        Rude(),
        Index("3"),
        1 << 80,
        (1 << 62, 1 << 62),
        "x" * 10_000,
        [None],
    ],
    ids=lambda shape: type(shape).__name__,
)
def test_other_shapes_are_refused(shape: Any) -> None:
    with refused("shape") as caught:
        arguments.layout(shape, "u1")
    assert len(str(caught.value)) < 400


def test_a_type_of_sub_arrays_adds_their_sides() -> None:
    assert arguments.layout((2,), np.dtype(("f4", (3, 5)))) == ((2, 3, 5), np.dtype("f4"))


@pytest.mark.parametrize(
    "dtype",
    ["nonsense", object, "O", "V0", "S", [("a", "O")], {"names": 3}, 7, "f4,,", "(2,", b"\xff", Rude(), "x" * 9999],
)
def test_types_without_bytes_are_refused(dtype: Any) -> None:
    with refused("dtype"):
        arguments.kind(dtype)


@pytest.mark.parametrize(
    ("value", "found"),
    [("1MiB", 1 << 20), ("1.5KiB", 1536), ("4096", 4096), (np.int32(7), 7), (0, 0), (Index(9), 9), ("0B", 0)],
)
def test_sizes(value: Any, found: int) -> None:
    assert arguments.size("nbytes", value) == found


@pytest.mark.parametrize(
    "value", [1.5, "1 potato", "-1", -1, None, True, b"1", [1], np.float64(1), np.array([1, 2]), Rude()]
)
def test_other_sizes_are_refused(value: Any) -> None:
    with refused("resident"):
        arguments.size("resident", value)


@pytest.mark.parametrize(
    "value", [0, "0B", POOL_PAGES_MAX * PAGE_BYTES + 1, 10**5000, "9" * 5000 + "TiB"], ids=range(5)
)
def test_regions_of_no_possible_size_are_refused(value: Any) -> None:
    with refused("nbytes") as caught:
        arguments.region_pages("nbytes", value)
    assert len(str(caught.value)) < 300
    assert arguments.region_pages("nbytes", "1TiB") == 1 << 28


@pytest.mark.parametrize(
    "value",
    [
        *("", "n" * 49, 5, b"name", ("a",), "\ud800", Rude()),
        # Shown in tables and logs, so nothing that moves a cursor, hides or colours.
        *("a\nb", "a\tb", "\x1b[31m", "\x7f", "\x00", "\x9b31m", "a\u202eb", "a\u2028b", "a\u200bb", "\ufeff"),
        *("[red]", "x[/red]", "[bold red]x[/]", "[link=http://x]", "[#ff0000]", "[@click=f]"),
    ],
)
def test_names(value: Any) -> None:
    with refused("name"):
        arguments.name(value)


@pytest.mark.parametrize(
    "value", ["a b", "a/b", "layer[0]", "x[", "]", "[]", "[1:2]", "{a: 1}", "naïve", "\N{SNOWMAN}"]
)
def test_names_of_every_kind_that_harm_nobody(value: str) -> None:
    assert arguments.name(value) == value


def test_no_name_and_the_longest() -> None:
    assert arguments.name(None) is None and arguments.name("ä" * 48) == "ä" * 48


@pytest.mark.parametrize("value", ["", 1.5, -1, 1 << 63, True, None, [1], "n" * 49, b"7"])
def test_what_to_attach_to(value: Any) -> None:
    with refused("name"):
        arguments.which(value)
    assert arguments.which(np.int16(7)) == 7 and arguments.which("7") == "7"


@pytest.mark.parametrize("value", [5, "a\0b", "", None, 1.5, b"", ["a"], "\ud800", Rude()])
def test_paths(value: Any) -> None:
    with refused("socket"):
        arguments.path("socket", value)
    assert arguments.path("socket", b"/a/b") == arguments.path("socket", Path("/a/b")) == Path("/a/b")


MEMORY = np.zeros((16, 4096), "u1")
AT, SIZE = MEMORY.ctypes.data, MEMORY.nbytes


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (None, (0, SIZE)),
        (slice(None), (0, SIZE)),
        (slice(-4096, None), (SIZE - 4096, SIZE)),
        (slice("4KiB", "8KiB"), (4096, 8192)),
        (slice(0, 1 << 60), (0, SIZE)),
        (slice(5, 2), (5, 5)),
        (range(10, 20), (10, 20)),
        ((10, np.int64(20)), (10, 20)),
        ((0, "4KiB"), (0, 4096)),
        (MEMORY[2], (8192, 12288)),
        (MEMORY[3, :0], (12288, 12288)),
        (MEMORY[2:4, ::-1], (8192, 16384)),
        (MEMORY[::-5, 10:20], (10, 15 * 4096 + 20)),
        (MEMORY[1].view("M8[s]"), (4096, 8192)),
        (memoryview(MEMORY)[1:3], (4096, 12288)),  # type: ignore[arg-type]
        (memoryview(MEMORY[1]).cast("B")[::-2], (4097, 8192)),
    ],
)
def test_ranges(where: Any, found: tuple[int, int]) -> None:
    assert arguments.byte_range(where, AT, SIZE) == found


@pytest.mark.parametrize(
    "where",
    [
        5,
        1.5,
        "all",
        "4KiB",
        (1,),
        (1, 2, 3),
        (2, 1),
        (-1, 5),
        (0, SIZE + 1),
        (0.5, 2),
        (None, 5),
        [0, 4096],
        slice(0, 10, 2),
        slice(0, 10, 0),
        slice(1.5, 3),
        slice("x", None),
        range(0, 10, 2),
        range(SIZE + 1),
        np.zeros(3),
        np.zeros(0),
        MEMORY[0:0][:, :0] + 1,
        b"abc",
        bytearray(10),
        Rude(),
        {1: 2},
        object,
        np.float64(3),
    ],
    ids=lambda where: type(where).__name__,
)
def test_other_ranges_are_refused(where: Any) -> None:
    with refused("range"):
        arguments.byte_range(where, AT, SIZE)


def test_a_released_memoryview_is_refused() -> None:
    view = memoryview(bytearray(10))
    view.release()
    with refused("range"):
        arguments.byte_range(view, AT, SIZE)


def test_an_array_is_shown_without_being_read() -> None:
    class Unreadable(np.ndarray[Any, Any]):
        def __repr__(self) -> str:
            raise AssertionError("read")

    unreadable = np.zeros(3).view(Unreadable)
    assert arguments.shown(unreadable) == "Unreadable of shape (3,)"
    assert arguments.shown((unreadable, "x")) == "(Unreadable of shape (3,), 'x')"


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 20)
    | st.floats()
    | st.text(max_size=60)
    | st.binary(max_size=20)
    | st.sampled_from(["1MiB", "4KiB", "C", "F", "i4", "f8", "random", "O"])
    | st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers(-2, 2))
    | st.builds(range, st.integers(-5, 50), st.integers(-5, 50))
    | st.sampled_from(
        [np.zeros(3), np.array([3, 4]), np.float32(3), np.int8(3), np.bool_(True), MEMORY[3], object, int]
    )
    | st.builds(Index, st.integers() | st.none())
    | st.builds(Rude),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=500)
@given(value=ODD, other=ODD)
def test_an_argument_gives_a_result_or_one_of_our_errors(value: Any, other: Any) -> None:
    for take in (
        lambda: arguments.size("size", value),
        lambda: arguments.region_pages("nbytes", value),
        lambda: arguments.resident_pages(value, 10),
        lambda: arguments.name(value),
        lambda: arguments.which(value),
        lambda: arguments.order(value),
        lambda: arguments.word("word", value, ("random",)),
        lambda: arguments.path("path", value),
        lambda: arguments.layout(value, other),
        lambda: arguments.byte_range(value, AT, SIZE),
    ):
        try:
            take()
        except RamsterError as error:
            assert len(str(error)) < 1000


def test_each_call_refuses_plainly(start_node: StartNode) -> None:
    """The whole interface with odd arguments: a result or one of ours, and the region goes on."""
    run_script(
        textwrap.dedent("""
        import itertools, socket
        client = ramster.connect(sys.argv[1])
        region = client.region("64KiB", resident="64KiB", name="odd")
        a = region.array((16, 512), np.uint64)
        assert region.nbytes == 1 << 16 and (region.resident, region.name) == (1 << 16, "odd")
        assert client.empty(np.array([3, 4])).shape == (3, 4)
        assert region.evict(memoryview(a)) >= 0
        assert region.prefetch(range(0, 4096)) == PAGE == region.prefetch((0, "4KiB"))
        with region.pin(memoryview(a)[2:4]), region.pin(region): assert region.statistics().pinned_pages == 16
        odd = [None, True, -1, 5, 1.5, 1 << 70, "", "34", "1MiB", "x" * 100, "\\ud800", b"12", [], [3, "a"], (1, 2, 3),
               {}, {1}, object(), object, np.zeros(3), np.array([1, 2]), np.array([[1]]), np.float32(2), slice(1.5),
               slice(9, 1, 2), range(5, 900000), memoryview(b"abc"), a[3], region, client, lambda: 1]
        calls = {
            "client.region": client.region, "resident": lambda x: client.region(1, resident=x),
            "name": lambda x: client.region(1, name=x), "client.attach": client.attach,
            "shape": client.empty, "dtype": lambda x: client.empty(3, x), "order": lambda x: client.zeros(3, order=x),
            "array": region.array, "its type": lambda x: region.array(1, x),
            "offset": lambda x: region.array(1, "u1", x),
            "evict": region.evict, "pin": lambda x: region.pin(x).unpin(), "unpin": region.unpin, "check": region.check,
            "prefetch": region.prefetch, "kind": region.advise, "advise": lambda x: region.advise("random", x),
            "touch": lambda x: region.touch(x, 1), "pages": lambda x: region.touch(0, x),
            "connect": ramster.connect, "region_of": ramster.region_of,
        }
        for name, call in calls.items():
            for value in odd:
                try: call(value)
                except ramster.RamsterError as error: assert not isinstance(error, ramster.ProtocolError), (name, value)
                except BufferError: assert name == "connect"
                except BaseException as error: raise AssertionError(f"{name}, {type(value)}: {error!r}") from error
        # A control socket, a file, a directory: each says what it is.
        place = os.path.dirname(sys.argv[1])
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(place + "/control.sock"); control.listen()
            try: ramster.connect(place + "/control.sock")
            except ramster.UsageError as error: assert "control.sock" in str(error) and "region.sock" in str(error)
            else: raise AssertionError
        for path in (place, sys.executable):
            try: ramster.connect(path)
            except ramster.UsageError as error: assert "region.sock" in str(error)
            else: raise AssertionError
        a[:] = 7
        assert (a == 7).all()
        """),
        start_node("--engine").socket,
    )


def test_the_hints_say_what_is_accepted() -> None:
    """The words of the hints are those that are compared with."""
    assert typing.get_args(arguments.Order) == ("C", "F")
    assert [arguments.order(word) for word in typing.get_args(arguments.Order)] == ["C", "F"]


def _documented() -> list[tuple[str, Any]]:
    named = [(f"ramster.{name}", getattr(ramster, name)) for name in ramster.__all__]
    parts = [
        (f"{each.__name__}.{name}", value)
        for each in (ramster.Region, ramster.Client, ramster.Pin)
        for name, value in vars(each).items()
        if not name.startswith("_")
    ]
    return [(name, value) for name, value in named + parts if callable(value) or isinstance(value, classmethod)]


@pytest.mark.parametrize(("name", "value"), _documented(), ids=lambda each: each if isinstance(each, str) else "")
def test_help_says_what_it_does_and_what_it_raises(name: str, value: Any) -> None:
    text = value.__doc__ or ""
    assert len(text) > 40, f"{name} has no docstring"
    if not isinstance(value, type) or not issubclass(value, Exception | ramster.Capacity | ramster.RegionStatistics):
        assert re.search(r"Raises|raises|errors", text) or value is ramster.Pin, f"{name}: not a word on errors"


def test_what_is_given_up_is_contiguous_and_writable() -> None:
    whole = np.zeros(8192, "u1")
    address = whole.__array_interface__["data"][0]
    assert arguments.whole_range(whole[4096:], address, 8192) == (4096, 8192)
    assert arguments.whole_range(whole.view("M8[s]"), address, 8192) == (0, 8192)  # which has no buffer
    with pytest.raises(UsageError, match="must be contiguous"):
        arguments.whole_range(whole[::2], address, 8192)
    whole.flags.writeable = False
    for array in (whole, whole.view("M8[s]"), memoryview(whole.data)):
        with pytest.raises(UsageError, match="is read-only") as caught:
            arguments.whole_range(array, address, 8192)
        assert isinstance(caught.value, ValueError)  # as numpy's own


@pytest.mark.parametrize(
    ("runs", "count", "words"),
    [
        ([(4, 1)], 8, "1 of 8 pages is lost or out of reach (`ramster status` says which), the first is page 4"),
        ([(4, 1), (9, 2)], 16, "3 of 16 pages are lost or out of reach"),
    ],
)
def test_lost_pages_may_only_be_out_of_reach(runs: list[tuple[int, int]], count: int, words: str) -> None:
    assert messages.lost_words(runs, count).startswith(words)
