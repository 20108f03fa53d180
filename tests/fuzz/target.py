"""The fuzzer: `python -m tests.fuzz.target transmission|handshake [options and folders of libFuzzer]`.

Covers atheris around the two targets; scripts/fuzz.sh starts it. Of the transmission phase only the native parser is
instrumented, by clang; of the handshake, its Python.
"""

from __future__ import annotations

import os
import sys

import atheris  # type: ignore[import-untyped]


def transmission(arguments: list[str]) -> None:
    from tests.fuzz.transmission import Player, mutate

    player = Player()

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        # Now and then libFuzzer's own, which knows what numbers the code has compared with.
        return bytes(atheris.Mutate(data, most)) if seed % 8 == 0 else mutate(data, most, seed)

    atheris.Setup(arguments, player.run, custom_mutator=mutated, enable_python_coverage=False)
    atheris.Fuzz()


def handshake(arguments: list[str]) -> None:
    with atheris.instrument_imports(include=["ramster.wire.nbd"]):
        from tests.fuzz.handshake import run
    atheris.Setup(arguments, run)
    atheris.Fuzz()


if __name__ == "__main__":
    # What was to be loaded first is loaded; the sanitizers' symbolizer is a child that has no use for it.
    os.environ.pop("LD_PRELOAD", None)
    {"transmission": transmission, "handshake": handshake}[sys.argv[1]](sys.argv[:1] + sys.argv[2:])
