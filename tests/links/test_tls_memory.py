"""Memory that runs out in a TLS handshake is said as such, wherever in it: no certificate is blamed for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ramster.cluster import identity

# OpenSSL takes its memory from functions of ours: in one thread those of a handshake fail from the n-th on.
_HANDSHAKES = """
import ctypes, socket, sys, threading
libc = ctypes.CDLL(None)
for name, arguments in (("malloc", [ctypes.c_size_t]), ("realloc", [ctypes.c_void_p, ctypes.c_size_t])):
    getattr(libc, name).restype = ctypes.c_void_p
    getattr(libc, name).argtypes = arguments
libc.free.argtypes = [ctypes.c_void_p]
free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
realloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
left, whose = None, None

def granted():
    global left
    if left is None or threading.get_ident() != whose:
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
    global left, whose
    near, far = socket.socketpair()
    ends = [Connection(contexts[0], near.detach(), False), Connection(contexts[1], far.detach(), True)]

    def greet():
        try:
            ends[1].handshake(5)
        except RamsterError:
            pass

    other = threading.Thread(target=greet)
    other.start()
    left, whose = allowed, threading.get_ident()
    try:
        ends[0].handshake(5)
        return "done"
    except RamsterError as error:
        return f"{error.code} {error}"
    finally:
        used, left = allowed - left, None
        ends[0].close()
        other.join()
        ends[1].close()
        if allowed == MANY:
            print("allocations", used)

MANY = 10 ** 6
handshake(MANY)
for allowed in range(0, 400, 1):
    said = handshake(allowed)
    print(allowed, said)
    if said == "done":
        break
import os
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
    print(done.stdout)
