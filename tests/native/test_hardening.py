"""What the linker and the compiler put into the native modules of a release build, read from the files themselves."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

MODULES = (
    "ramster.engine._store",
    "ramster.engine._link",
    "ramster.engine._spill",
    "ramster.engine._region",
    "ramster.engine._nbd",
    "ramster.frontswap._client",
)
PT_DYNAMIC, PT_GNU_STACK, PT_GNU_RELRO = 2, 0x6474E551, 0x6474E552
DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_FLAGS, DT_FLAGS_1, DT_BIND_NOW, DT_TEXTREL = 5, 6, 10, 30, 0x6FFFFFFB, 24, 22
DF_BIND_NOW, DF_1_NOW, PF_X = 8, 1, 1
X86_64 = 62
ENDBR64 = b"\xf3\x0f\x1e\xfa"


class Elf:
    """As much of a shared object of 64 bits, little-endian, as is asked about here."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()
        assert self.bytes[:6] == b"\x7fELF\x02\x01"
        self.machine = struct.unpack_from("<H", self.bytes, 18)[0]
        at, size, count = (
            struct.unpack_from("<Q", self.bytes, 32)[0],
            *struct.unpack_from("<HH", self.bytes, 54),
        )
        # (type, flags, offset, address, bytes in the file)
        self.segments = [struct.unpack_from("<IIQQ8xQ", self.bytes, at + n * size) for n in range(count)]
        (dynamic,) = [each for each in self.segments if each[0] == PT_DYNAMIC]
        entries = struct.iter_unpack("<QQ", self.bytes[dynamic[2] : dynamic[2] + dynamic[4]])
        self.dynamic = dict(entries)

    def offset(self, address: int) -> int:
        return int(next(s[2] + address - s[3] for s in self.segments if s[0] == 1 and s[3] <= address < s[3] + s[4]))

    def symbols(self) -> dict[str, int]:
        """Name and address, 0 of what comes from elsewhere. The names' table follows the symbols'."""
        first, names = self.offset(self.dynamic[DT_SYMTAB]), self.offset(self.dynamic[DT_STRTAB])
        text = self.bytes[names : names + self.dynamic[DT_STRSZ]]
        found = {}
        for at in range(first, names - 23, 24):
            name, address = struct.unpack_from("<I4xQ", self.bytes, at)
            found[text[name : text.index(b"\0", name)].decode()] = address
        return found


@pytest.fixture(scope="module", params=MODULES)
def module(request: pytest.FixtureRequest) -> Elf:
    spec = importlib.util.find_spec(request.param)
    assert spec is not None and spec.origin is not None
    found = Elf(Path(spec.origin))
    if any(name.startswith(("__asan_", "__tsan_", "__ubsan_")) for name in found.symbols()):
        pytest.skip("a build under a sanitizer is not hardened")
    return found


def test_everything_is_bound_and_read_only_before_the_first_call(module: Elf) -> None:
    assert any(each[0] == PT_GNU_RELRO for each in module.segments)
    now = module.dynamic.get(DT_FLAGS, 0) & DF_BIND_NOW or module.dynamic.get(DT_FLAGS_1, 0) & DF_1_NOW
    assert now or DT_BIND_NOW in module.dynamic
    assert DT_TEXTREL not in module.dynamic


def test_no_stack_is_executable(module: Elf) -> None:
    assert [each[1] & PF_X for each in module.segments if each[0] == PT_GNU_STACK] == [0]


def test_the_stack_is_protected_and_copies_are_checked(module: Elf) -> None:
    names = module.symbols()
    assert "__stack_chk_fail" in names
    assert any(name.startswith("__") and name.endswith("_chk") for name in names), "_FORTIFY_SOURCE"


def test_functions_may_be_jumped_to_at_their_beginning_alone(module: Elf) -> None:
    if module.machine != X86_64:
        pytest.skip("CET is x86's")
    (start,) = [at for name, at in module.symbols().items() if name.startswith("PyInit_")]
    at = module.offset(start)
    assert module.bytes[at : at + 4] == ENDBR64
