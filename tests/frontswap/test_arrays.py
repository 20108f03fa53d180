"""Arrays that lie in a region: as numpy's own in every type and order, and taken for their own by other libraries."""

import textwrap
from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Node, run_script

StartNode = Callable[..., Node]

START = """
def anonymous():
    "KiB of RAM that this process has for itself."
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
client = ramster.connect(sys.argv[1])
"""


def run(body: str, *arguments: object) -> str:
    """As run_script, after START."""
    return run_script(START + textwrap.dedent(body), *arguments)


def test_the_base_has_the_items_that_the_array_has(start_node: StartNode) -> None:
    """scipy.sparse copies an array whose base has more than twice its items: a region's were bytes."""
    run(
        """
        for shape, dtype in (
            ((1000,), "f8"), ((20, 50), "i4"), ((7, 11, 13), "c16"), ((), "f4"), (5, ">u2"), (9, "?"), (2, "S5"),
            (4, "M8[ns]"), (3, [("a", "i4"), ("b", "f8")]), ((0, 4), "f8"), ((3, 0, 2), "i2"),
        ):
            for make in (client.empty, lambda *layout: client.region(1 << 16).array(*layout, offset=64)):
                a = make(shape, dtype)
                assert a.base.size == a.size and a.base.dtype == a.dtype == np.dtype(dtype), (shape, dtype)
                part = a.reshape(-1)[: a.size // 2 + 1]
                assert part.base.size == a.size and np.shares_memory(part, a) == bool(a.size)
                region = ramster.region_of(part)
                assert region.exports == 1
                try: region.close()
                except BufferError: pass
                else: raise AssertionError("closed under an array")
                del a, part
                region.close()
        """,
        start_node().socket,
    )


def test_every_type_is_right(start_node: StartNode) -> None:
    run(
        """
        rng = np.random.default_rng(5)
        for dtype in ("u1", "<i8", ">i8", ">f4", "f2", "?", "c8", ">c16", "M8[s]", "m8[us]", "U3", "S7", "V6",
                      [("a", ">i2"), ("b", "f8", (2, 3)), ("c", "S3")],
                      np.dtype({"names": ["x"], "formats": ["i4"], "offsets": [8], "itemsize": 24}),
                      np.dtype([("a", "i1"), ("b", "f8")], align=True), ("f4", (3,))):
            for shape in ((), 5, (3, 700), (2, 0), (4, 5, 6)):
                kind = np.dtype(dtype)
                twin = np.empty(shape, kind)
                a = client.empty(shape, kind, resident=64 * PAGE)
                assert (a.shape, a.dtype) == (twin.shape, twin.dtype) and a.flags.writeable, (dtype, shape)
                assert a.strides == twin.strides or not a.size, (dtype, shape)
                assert not a.tobytes().strip(bytes(1)), "fresh memory is zeros"
                # Bytes of 0 and 1 in every fourth place are a value of each type.
                noise = np.zeros(twin.nbytes, np.uint8)
                noise[:: 4] = rng.integers(0, 2, len(noise[:: 4]))
                twin = np.frombuffer(noise.tobytes(), twin.dtype, twin.size).reshape(twin.shape) if twin.size else twin
                a[...] = twin
                ramster.region_of(a).evict()
                assert a.dtype == twin.dtype and np.array_equal(a, twin), (dtype, shape)
                if a.ndim == 2:
                    assert np.array_equal(a[::2, ::-3], twin[::2, ::-3]) and np.array_equal(a.T, twin.T)
        """,
        start_node("--engine").socket,
    )


def test_a_copy_free_constructor_copies_nothing(start_node: StartNode) -> None:
    """scipy's own where it is installed; what it asks of an array's base is in the test above."""
    out = run(
        """
        try: from scipy import sparse
        except ImportError: print("scipy is not installed"); sys.exit()
        rows, width = 1 << 17, 16
        size = rows * width
        data = client.empty(size, "f8", resident="4MiB")
        indices = client.empty(size, "i4", resident="4MiB")
        starts = client.empty(rows + 1, "i4", resident="1MiB")
        starts[:] = np.arange(0, size + 1, width)
        for at in range(0, size, 1 << 16):
            data[at : at + (1 << 16)] = at
            indices[at : at + (1 << 16)] = np.arange(1 << 16) % width
        shape = (rows, width)
        for make in (
            lambda: sparse.csr_matrix((data, indices, starts), shape, copy=False),
            lambda: sparse.csc_matrix((data, indices, starts), shape[::-1], copy=False),
            lambda: sparse.csr_array((data, indices, starts), shape, copy=False),
            lambda: sparse.bsr_matrix((data.reshape(-1, 1, 1), indices, starts), shape, copy=False),
        ):
            before = anonymous()
            made = make()
            grown = anonymous() - before
            assert np.shares_memory(made.data, data) and np.shares_memory(made.indices, indices), make
            assert np.shares_memory(made.indptr, starts)
            assert grown < data.nbytes // 1024 // 4, (make, grown)
        assert made.sum() == data.sum()
        """,
        start_node("--engine").socket,
    )
    if out:
        pytest.skip(out.strip())


def test_fortran_order(start_node: StartNode) -> None:
    run(
        """
        for shape in (7, (3, 5), (4, 5, 6), (0, 3), ()):
            for order in ("C", "F", "f", None):
                twin = np.empty(shape, "i4", order)
                a = client.empty(shape, "i4", order)
                b = ramster.region_of(client.zeros(shape, "i4", order=order)).array(shape, "i4", order=order)
                for each in (a, b):
                    assert each.strides == twin.strides or not each.size
                    assert each.flags.f_contiguous == twin.flags.f_contiguous
                twin[...] = a[...] = np.arange(twin.size).reshape(shape)
                assert (a == twin).all() and a.tobytes("A") == twin.tobytes("A")
        """,
        start_node().socket,
    )
