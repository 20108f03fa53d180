"""What the engine's frame header looks like in memory, and its checksum: for the tests of the wire format."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from ramster.engine._c.codec cimport crc32_iscsi
from ramster.engine._link cimport FRAME_BYTES, Frame


def frame_layout():
    cdef Frame f
    cdef char *base = <char *> &f
    fields = {
        "magic": (<char *> &f.magic - base, sizeof(f.magic)),
        "version": (<char *> &f.version - base, sizeof(f.version)),
        "type": (<char *> &f.type - base, sizeof(f.type)),
        "status": (<char *> &f.status - base, sizeof(f.status)),
        "request": (<char *> &f.request - base, sizeof(f.request)),
        "length": (<char *> &f.length - base, sizeof(f.length)),
        "credit": (<char *> &f.credit - base, sizeof(f.credit)),
        "segment": (<char *> &f.segment - base, sizeof(f.segment)),
        "generation": (<char *> &f.generation - base, sizeof(f.generation)),
        "handle": (<char *> &f.handle - base, sizeof(f.handle)),
        "left": (<char *> &f.left - base, sizeof(f.left)),
        "reserved": (<char *> &f.reserved - base, sizeof(f.reserved)),
        "crc": (<char *> &f.crc - base, sizeof(f.crc)),
    }
    if sizeof(f) != FRAME_BYTES:
        raise AssertionError(f"the header has {sizeof(f)} bytes, FRAME_BYTES says {FRAME_BYTES}")
    return sizeof(f), fields


def crc32c(bytes data):
    return crc32_iscsi(<unsigned char *> PyBytes_AS_STRING(data), <int> PyBytes_GET_SIZE(data), 0xffffffffu)
