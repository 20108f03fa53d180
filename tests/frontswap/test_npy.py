"""Arrays in .npy files: the bytes of numpy's own, in every process, whole or not at all."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.frontswap.conftest import Node, run_script

from ramster.errors import UsageError
from ramster.frontswap.npy import load, save

StartNode = Callable[..., Node]

DTYPES = (
    npst.scalar_dtypes()
    | npst.unicode_string_dtypes(max_len=3)
    | npst.byte_string_dtypes(max_len=3)
    | st.sampled_from([np.dtype([("a", ">i2"), ("b", "f8", (2,))]), np.dtype([("ä", "i4")]), np.dtype([("ʒ", "i4")])])
)


@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@settings(deadline=None, max_examples=150)
@given(
    dtype=DTYPES,
    shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    order=st.sampled_from("CF"),
    cut=st.sampled_from([np.s_[...], np.s_[..., ::2], np.s_[::-1], np.s_[1:]]),
    seed=st.integers(0, 99),
)
def test_the_bytes_are_those_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, shape: Any, order: Any, cut: Any, seed: int
) -> None:
    a = np.zeros(shape, dtype, order)
    if a.ndim:
        a = a[cut]
    noise = np.random.default_rng(seed).integers(0, 2, a.nbytes, np.uint8)
    if a.size and a.dtype.kind != "U":
        a[...] = np.frombuffer(noise.tobytes(), a.dtype, a.size).reshape(a.shape)
    folder = tmp_path_factory.mktemp("npy")
    save(folder / "ours", a)
    np.save(folder / "theirs", a)
    ours, theirs = (folder / "ours.npy").read_bytes(), (folder / "theirs.npy").read_bytes()
    if theirs[6] < 3:
        assert ours == theirs
    found = np.load(folder / "ours.npy")
    theirs = np.load(folder / "theirs.npy")
    assert (found.shape, found.dtype, found.strides) == (theirs.shape, theirs.dtype, theirs.strides)
    assert found.tobytes() == a.tobytes()
    assert sorted(path.name for path in folder.iterdir()) == ["ours.npy", "theirs.npy"]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    save(path, [1, 2, 3])
    path.chmod(0o640)
    link = tmp_path / "link.npy"
    link.symlink_to("a.npy")
    save(link, np.arange(4))
    assert link.is_symlink() and np.load(path).tolist() == [0, 1, 2, 3] and path.stat().st_mode & 0o777 == 0o640
    before = path.read_bytes()

    class Failing(np.ndarray[Any, Any]):
        @property
        def T(self) -> Any:  # noqa: N802
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(path, np.zeros((3, 4), order="F").view(Failing))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    wrong: list[tuple[Any, Any]] = [(path, np.array([object()])), (5, [1]), ("a\0b", [1])]
    for file, array in wrong:
        with pytest.raises(UsageError):
            save(file, array)
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "a", [1])


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"garbage",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        b"\x93NUMPY\x03\x00\x02\0\0\0{}",
    ],
)
def test_what_is_no_npy_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(damage)
    with pytest.raises(UsageError, match=r"^file: .*is no \.npy file"):
        load(path)
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(UsageError, match="Python objects"):
        load(path)
    np.save(path, np.arange(10))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UsageError, match="ends after 79 of its array's 80 bytes"):
        load(path)


@pytest.mark.parametrize("way", ["auto", "user-mode"])
def test_regions_in_every_process(start_node: StartNode, tmp_path: Path, way: str) -> None:
    """Where system calls on away pages fail, numpy's own save fails and ours does not."""
    run_script(
        textwrap.dedent("""
        import warnings
        os.environ["RAMSTER_USERFAULTFD"] = way = sys.argv[2]
        os.environ["RAMSTER_SOCKET"] = sys.argv[1]
        folder = sys.argv[3]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client = ramster.connect()
            client.region(1)
        assert way != "user-mode" or "pin()" in str(caught[0].message) and caught[0].filename == "<string>"
        rng = np.random.default_rng(3)
        for dtype, shape, order in (("f8", (700, 512), "C"), (">i4", (300, 700), "F"), ("M8[s]", (9, 7), "C"),
                                    ("?", 5000, "C"),
                                    ([("a", "i1"), ("b", ">f8")], 60_000, "C"), ("i2", (3, 0), "C"), ("f4", (), "C")):
            a = client.empty(shape, dtype, order, resident="256KiB")
            twin = np.zeros(shape, dtype, order)
            if twin.dtype.names is None: twin[...] = rng.integers(0, 100, twin.shape).astype(twin.dtype)
            else: twin["b"] = rng.random(twin.shape)
            a[...] = twin
            for part, same in ((a, twin), (a[1:], twin[1:]) if a.ndim and len(a) else (a, twin),
                               (a[..., ::2], twin[..., ::2]) if a.ndim else (a, twin)):
                ramster.region_of(a).evict()
                ramster.save(folder + "/a", part)
                np.save(folder + "/b", same)
                ours, theirs = open(folder + "/a.npy", "rb").read(), open(folder + "/b.npy", "rb").read()
                assert ours == theirs, (dtype, shape, order)
                b = ramster.load(folder + "/b.npy", resident="256KiB", name="loaded")
                assert (b.dtype, b.shape) == (same.dtype, same.shape) and (b == same).all()
                assert b.flags.f_contiguous == np.load(folder + "/b.npy").flags.f_contiguous
                assert ramster.region_of(b).name == "loaded"
                for each in (a, b):
                    assert ramster.region_of(each).statistics().pinned_pages == 0
        if way == "user-mode":
            a = client.zeros((700, 512), resident="256KiB")
            a[:] = 1
            ramster.region_of(a).evict()
            try: np.save(folder + "/c", a)
            except OSError: pass
            else: raise AssertionError("the kernel serves it after all")
        """),
        start_node("--engine").socket,
        way,
        tmp_path,
    )


def test_a_lost_page_is_an_error_and_no_file(start_node: StartNode, tmp_path: Path) -> None:
    run_script(
        textwrap.dedent("""
        a = ramster.connect(sys.argv[1]).empty((16, 512), np.uint64)
        a[:] = 1
        ramster.region_of(a).evict()
        for part in (a, a[::2, ::2]):
            try: ramster.save(sys.argv[2] + "/a.npy", part)
            except ramster.RegionLost as error: assert error.runs
            else: raise AssertionError
        ramster.save(sys.argv[2] + "/b.npy", a[:3])
        assert os.listdir(sys.argv[2]) == ["b.npy"]
        """),
        start_node("--lost", "4:3").socket,
        tmp_path,
    )


def test_the_version() -> None:
    run_script("""
        from importlib.metadata import version
        assert ramster.__version__ == version("ramster") and "__version__" in dir(ramster)
        import inspect
        for name in ramster.__all__:
            thing = getattr(ramster, name)
            assert thing.__doc__ and len(inspect.getdoc(thing)) > 40, name
            for part, member in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(member) and part[0] != "_": assert inspect.getdoc(member), (name, part)
        for function in (ramster.empty, ramster.load, ramster.save):
            for each in inspect.signature(function).parameters: assert each in function.__doc__, each
        """)
