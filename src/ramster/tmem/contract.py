"""The contract of tmem, which every front end speaks and `engine.store.Store` and `tmem.model.Model` keep.

A page is named by (pool, object id, index): the object id three unsigned 64-bit integers, the index 32 bits. A pool
is persistent or ephemeral, and dense (one object, (0, 0, 0), of a fixed number of pages) or sparse (any object).

=============  ========================================================================================================
operation      promise
=============  ========================================================================================================
create pool    gives an id that no pool ever had before: whoever still has one of a destroyed pool is told so
put            copies the page before it returns: the caller may change its buffer at once; replaces what was there
get            the page, or a miss; never other bytes. By mode the page stays or goes (`GetMode`)
flush page     the page is gone, here and on every lender; says whether there was one
flush object   the same for every page of an object; says how many there were
destroy pool   the same for every object
=============  ========================================================================================================

Coherency, in the numbering of the original:

1. Put, put, get: after two puts on a key, a get never returns the first page.
2. Get, get: after a miss, the key keeps missing until it is put again.
3. A put that is refused changes nothing in a persistent pool: an existing page stays, and whoever must not have it
   taken for the newer one flushes it. In an ephemeral pool the old page is gone too (the original: in either kind),
   since a cache must not give out what was before.
4. A put may be refused at any time, in any kind of pool; that is normal and not an error of the store.
5. Racing operations on one key take effect in some order, each at one moment between its call and its return. A get
   that races a put returns one of the two pages, whole.
6. A page of an ephemeral pool may be gone at any time. A page of a persistent pool stays until it is flushed, replaced,
   or removed by a get; when its only copy is lost or damaged, a get says so (PageLost) until the key is put or flushed.
"""

from enum import Enum, IntEnum, unique

from ramster.constants import INDEX_BITS, PAGE_BYTES

__all__ = ["INDEX_LIMIT", "PAGE_BYTES", "WORD_LIMIT", "GetMode", "ObjectId", "Operation", "Result"]

ObjectId = tuple[int, int, int]

INDEX_LIMIT = 1 << INDEX_BITS
WORD_LIMIT = 1 << 64


@unique
class GetMode(IntEnum):
    """What a get that finds its page does with the stored copy; the values are the original's `get_and_free`."""

    KEEP = -1
    REMOVE_IF_EPHEMERAL = 0
    REMOVE = 1

    def removes(self, *, persistent: bool) -> bool:
        """Whether a hit in a pool of this kind takes the page out."""
        return self is GetMode.REMOVE or (self is GetMode.REMOVE_IF_EPHEMERAL and not persistent)


@unique
class Operation(Enum):
    CREATE_POOL = "create-pool"
    PUT = "put"
    GET = "get"
    FLUSH_PAGE = "flush-page"
    FLUSH_OBJECT = "flush-object"
    DESTROY_POOL = "destroy-pool"


@unique
class Result(Enum):
    """How an operation on a page can end; the last three are exceptions in the Python interface."""

    DONE = "done"
    MISS = "miss"
    REFUSED = "refused"  # StoreFull: nothing was stored, see rule 3
    LOST = "lost"  # PageLost: no copy with the right bytes exists any more
    INVALID = "invalid"  # UsageError: no such pool, or a key outside its pool, PoolGone: no longer; nothing was changed
