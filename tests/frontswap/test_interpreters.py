"""A region in another interpreter of a process that exits."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from tests.frontswap.conftest import Node, finish

StartNode = Callable[..., Node]

pytest.importorskip("_xxsubinterpreters", reason="by this name until Python 3.12")

SCRIPT = """
import sys
import _xxsubinterpreters as interpreters

other = interpreters.create()
interpreters.run_string(other, f'''
import ramster
region = ramster.connect({sys.argv[1]!r}).region(1 << 20)
view = memoryview(region)
view[0] = 1
print("made", flush=True)
''')
"""


def test_a_region_that_is_alive_in_another_interpreter_at_exit(start_node: StartNode) -> None:
    """Python ends its main thread then, in the middle of its exit: the guardian must not stay behind, nor complain."""
    node = start_node("--engine")
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(node.socket)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert finish(script) == (0, "made\n", "")
    assert node.line().startswith("gone")
