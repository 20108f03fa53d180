"""The NBD protocol's transmission phase: layouts, numbers, byte order. Its source is the NBD project's doc/proto.md.

The same numbers for people and tests are in ramster.wire.nbd. Everything on the wire is big-endian.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from *:
    uint16_t swap16 "__builtin_bswap16"(uint16_t) noexcept nogil
    uint32_t swap32_bytes "__builtin_bswap32"(uint32_t) noexcept nogil
    uint64_t swap64_bytes "__builtin_bswap64"(uint64_t) noexcept nogil

cdef enum:
    REQUEST_MAGIC = 0x25609513
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668e33ef

cdef enum:                              # commands
    CMD_READ = 0
    CMD_WRITE = 1
    CMD_DISC = 2
    CMD_FLUSH = 3
    CMD_TRIM = 4
    CMD_CACHE = 5
    CMD_WRITE_ZEROES = 6
    CMD_BLOCK_STATUS = 7

cdef enum:                              # flags of a command
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2
    FLAG_DF = 4
    FLAG_REQ_ONE = 8
    FLAG_FAST_ZERO = 16

cdef enum:                              # structured replies
    REPLY_DONE = 1
    REPLY_NONE = 0
    REPLY_OFFSET_DATA = 1
    REPLY_OFFSET_HOLE = 2
    REPLY_BLOCK_STATUS = 5
    REPLY_ERROR = 32769
    REPLY_ERROR_OFFSET = 32770

cdef enum:                              # extents of base:allocation
    STATE_HOLE = 1
    STATE_ZERO = 2

cdef enum:                              # errors: the protocol's own numbers, which are those of Linux
    NBD_EPERM = 1
    NBD_EIO = 5
    NBD_ENOMEM = 12
    NBD_EINVAL = 22
    NBD_ENOSPC = 28

cdef packed struct Request:
    uint32_t magic
    uint16_t flags
    uint16_t type
    uint64_t cookie
    uint64_t offset
    uint32_t length

cdef packed struct SimpleReply:
    uint32_t magic
    uint32_t error
    uint64_t cookie

cdef packed struct Chunk:               # of a structured reply
    uint32_t magic
    uint16_t flags
    uint16_t type
    uint64_t cookie
    uint32_t length
