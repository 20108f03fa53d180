"""Sizes and limits that several packages share, each with its reason; the relations between them hold at import.

Units are in the names. What belongs to one package alone (frame types, entry headers) is declared there.
"""

import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# The page of every kernel and userfaultfd that we serve; larger kernel pages are refused, not emulated.
PAGE_BYTES: Final = 4096

# Shipping a segment takes 2 ms at 1 Gbit/s: long enough to keep a link busy with a few, short enough to stop at once.
SEGMENT_BYTES_DEFAULT: Final = 256 * KIB
# Below, headers and half-filled tails cost more than 5 % of the arena.
SEGMENT_BYTES_MIN: Final = 64 * KIB
# A directory entry of the store has 15 bits for an offset in 8-byte units.
SEGMENT_BYTES_MAX: Final = 256 * KIB

# Open segments of every class, the cleaner's reserve and a few sealed ones to choose from.
ARENA_BYTES_MIN: Final = 4 * MIB
ARENA_BYTES_DEFAULT: Final = 256 * MIB
ARENA_SEGMENTS_MIN: Final = 16

# tmem's key: the widths of the original contract.
OBJECT_ID_BITS: Final = 192
INDEX_BITS: Final = 32
# A dense pool is addressed by a tmem index.
POOL_PAGES_MAX: Final = 1 << INDEX_BITS

NODE_NUMBER_MAX: Final = 254
# In orders and tables this number stands for the spill file of the node itself.
SPILL_PEER: Final = 255

# A DNS label: it stands in certificates (SAN), in file names and in log lines without any quoting.
NAME_BYTES_MAX: Final = 63
NAME_PATTERN: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NAME_RULE: Final = f"1 to {NAME_BYTES_MAX} of a-z, 0-9 and -, neither first nor last a -"

PORT_DEFAULT: Final = 7777

# One region message; far above the largest (a list of lost runs), far below a socket buffer.
REGION_MESSAGE_BYTES_MAX: Final = 64 * KIB
# sun_path with its terminating NUL, in every Linux.
SOCKET_PATH_BYTES_MAX: Final = 107
REGION_SOCKET: Final = "region.sock"
NBD_SOCKET: Final = "nbd.sock"
CONTROL_SOCKET: Final = "control.sock"

assert PAGE_BYTES & (PAGE_BYTES - 1) == 0
assert all(
    n & (n - 1) == 0 and n % PAGE_BYTES == 0 for n in (SEGMENT_BYTES_MIN, SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MAX)
)
assert SEGMENT_BYTES_MIN <= SEGMENT_BYTES_DEFAULT <= SEGMENT_BYTES_MAX
assert SEGMENT_BYTES_MIN >= 8 * PAGE_BYTES, "a segment must hold several pages that do not compress"
assert ARENA_SEGMENTS_MIN * SEGMENT_BYTES_MAX <= ARENA_BYTES_MIN <= ARENA_BYTES_DEFAULT
assert NODE_NUMBER_MAX < SPILL_PEER <= 0xFF, "no node has the number of the spill file"
assert NAME_BYTES_MAX <= 64, "X.509 limits an organisation name to 64 characters"
