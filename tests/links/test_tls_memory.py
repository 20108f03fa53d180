"""Memory that runs out in a TLS handshake is said as such, wherever in it: no certificate is blamed for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ramster.cluster import identity

# OpenSSL takes its memory from functions of ours: in one thread those of a handshake fail from the n-th on.
_HANDSHAKES = """
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None)
for name, arguments in (("malloc", [ctypes.c_size_t]), ("realloc", [ctypes.c_void_p, ctypes.c_size_t])):
    getattr(libc, name).restype = ctypes.c_void_p
    getattr(libc, name).argtypes = arguments
libc.free.argtypes = [ctypes.c_void_p]
free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
realloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
left = None

def granted():
    global left
    if left is None:
        return True
    left -= 1
    return left >= 0

functions = (
    malloc(lambda size, file, line: libc.malloc(size) if granted() else None),
    realloc(lambda old, size, file, line: libc.realloc(old, size) if size == 0 or granted() else None),
    free(lambda old, file, line: libc.free(old)),
)
assert ctypes.CDLL("libcrypto.so.3").CRYPTO_set_mem_functions(*functions) == 1, "OpenSSL has allocated already"

from ramster.engine.links import Connection, TlsContext
from ramster.errors import RamsterError

contexts = [TlsContext(*sys.argv[n:n + 3]) for n in (1, 4)]

def handshake(allowed):
    # Each side in a process of its own: what failed once stays in OpenSSL's tables, and may loop for ever.
    global left
    near, far = socket.socketpair()
    result, says = os.pipe()
    sides = []
    for mine, other, context in ((far, near, contexts[1]), (near, far, contexts[0])):
        sides.append(os.fork())
        if sides[-1]:
            continue
        other.close()
        said = b"done"
        signal.alarm(3)
        try:
            end = Connection(context, mine.detach(), context is contexts[1])
            if context is contexts[0]:
                left = allowed
            end.handshake(2)
        except RamsterError as error:
            said = f"{error.code} {error}".encode()
        left = None
        if context is contexts[0]:
            os.write(says, said)
        os._exit(0)
    near.close(), far.close(), os.close(says)
    for side in sides:
        os.waitpid(side, 0)
    with os.fdopen(result) as result:
        return result.read() or "ended by the alarm"

for allowed in range(0, 4000, 131):
    print(allowed, handshake(allowed))
print("all", handshake(10 ** 6))
sys.stdout.flush()
os._exit(0)
"""


def test_a_handshake_without_memory_blames_memory(tmp_path: Path) -> None:
    near, far = identity.create_cluster(tmp_path, "short", ["a", "b"])
    paths = [str(path) for each in (near, far) for path in (each.ca, each.cert, each.key)]
    done = subprocess.run(
        [sys.executable, "-c", _HANDSHAKES, *paths], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    *short, last = done.stdout.splitlines()
    assert last == "all done"
    assert any(" limit-reached cannot speak TLS: " in each for each in short), short
    assert not [each for each in short if "certificate is not of this cluster" in each]
