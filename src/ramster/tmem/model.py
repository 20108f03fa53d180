"""The contract of tmem in the fewest lines: a dictionary. The oracle that tests hold the store against.

Covers: pools, keys, put, get, flush, every coherency rule. Does not cover: limits of memory (the caller says when the
real store refused, with `refused`), loss, concurrency.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import Buffer

from ramster import errors
from ramster.tmem.contract import INDEX_LIMIT, PAGE_BYTES, WORD_LIMIT, GetMode, ObjectId

ZERO: ObjectId = (0, 0, 0)


@dataclass
class _Pool:
    pages: int | None
    persistent: bool
    stored: dict[tuple[ObjectId, int], bytes] = field(default_factory=dict)


class Model:
    """Names, arguments and errors of `engine.store.Store`; ephemeral pages stay until `observe_*` says otherwise."""

    def __init__(self, pools_max: int = 4096) -> None:
        self._pools: dict[int, _Pool] = {}
        self._pools_max = pools_max
        self._made = 0

    def create_pool(self, *, pages: int | None = None, persistent: bool = True) -> int:
        """The lowest free place, and a number that no pool had before.

        pages=N: dense; None: sparse. UsageError for a size that cannot be.
        """
        if pages is not None and not 0 < pages <= INDEX_LIMIT:
            raise errors.UsageError(f"a pool of {pages} pages")
        taken = {pool % self._pools_max for pool in self._pools}
        place = next((i for i in range(self._pools_max) if i not in taken), None)
        if place is None:
            raise errors.StoreFull(f"all {self._pools_max} pools are in use")
        self._made += 1
        pool = self._made * self._pools_max + place
        self._pools[pool] = _Pool(pages, persistent)
        return pool

    def destroy_pool(self, pool: int) -> None:
        self._pool(pool)
        del self._pools[pool]

    def put(self, pool: int, index: int, page: Buffer, oid: ObjectId = ZERO) -> None:
        chosen, key = self._find(pool, index, oid)
        copy = bytes(page)
        if len(copy) != PAGE_BYTES:
            raise errors.UsageError(f"a page is {PAGE_BYTES} bytes, got {len(copy)}")
        chosen.stored[key] = copy

    def refused(self, pool: int, index: int, oid: ObjectId = ZERO) -> None:
        """The store refused a put on this key: rule 3, an older page stays where pages do."""
        chosen, key = self._find(pool, index, oid)
        if not chosen.persistent:
            chosen.stored.pop(key, None)

    def get(self, pool: int, index: int, oid: ObjectId = ZERO, mode: int = GetMode.KEEP) -> bytes | None:
        chosen, key = self._find(pool, index, oid)
        if mode not in list(GetMode):
            raise errors.UsageError(f"get mode {mode}")
        if GetMode(mode).removes(persistent=chosen.persistent):
            return chosen.stored.pop(key, None)
        return chosen.stored.get(key)

    def flush_page(self, pool: int, index: int, oid: ObjectId = ZERO) -> bool:
        chosen, key = self._find(pool, index, oid)
        return chosen.stored.pop(key, None) is not None

    def flush_object(self, pool: int, oid: ObjectId) -> int:
        chosen = self._pool(pool)
        if chosen.pages is not None:
            raise errors.UsageError(f"pool {pool} is dense")
        doomed = [key for key in chosen.stored if key[0] == oid]
        for key in doomed:
            del chosen.stored[key]
        return len(doomed)

    # --- as an oracle ---

    def allows(self, got: bytes | None, pool: int, index: int, oid: ObjectId = ZERO) -> bool:
        """Whether a get of this key may return `got` now. A miss is always right for an ephemeral page."""
        chosen, key = self._find(pool, index, oid)
        return got == chosen.stored.get(key) or (got is None and not chosen.persistent)

    def observe_get(
        self, got: bytes | None, pool: int, index: int, oid: ObjectId = ZERO, mode: int = GetMode.KEEP
    ) -> bool:
        """`allows`, and takes note: a page that was missed or removed has to keep missing (rule 2)."""
        allowed = self.allows(got, pool, index, oid)
        chosen, key = self._find(pool, index, oid)
        if got is None or GetMode(mode).removes(persistent=chosen.persistent):
            chosen.stored.pop(key, None)
        return allowed

    def observe_flush(self, found: bool, pool: int, index: int, oid: ObjectId = ZERO) -> bool:
        """Whether flush_page may say `found`; the page is gone afterwards."""
        expected, persistent = self.flush_page(pool, index, oid), self._pool(pool).persistent
        return found == expected or (not found and not persistent)

    def observe_flush_object(self, dropped: int, pool: int, oid: ObjectId) -> bool:
        """Whether flush_object may say `dropped`."""
        expected, persistent = self.flush_object(pool, oid), self._pool(pool).persistent
        return dropped == expected or (dropped < expected and not persistent)

    def keys(self, pool: int) -> list[tuple[ObjectId, int]]:
        """Every (object id, index) that holds a page, unless it is ephemeral and gone."""
        return list(self._pool(pool).stored)

    def pools(self) -> list[int]:
        return list(self._pools)

    def _pool(self, pool: int) -> _Pool:
        if pool not in self._pools:
            if 0 < pool // self._pools_max <= self._made:
                raise errors.PoolGone(f"pool {pool} was destroyed")
            raise errors.UsageError(f"there is no pool {pool}")
        return self._pools[pool]

    def _find(self, pool: int, index: int, oid: ObjectId) -> tuple[_Pool, tuple[ObjectId, int]]:
        chosen = self._pool(pool)
        if not 0 <= index < (INDEX_LIMIT if chosen.pages is None else chosen.pages):
            raise errors.UsageError(f"index {index} is out of range")
        if not all(0 <= word < WORD_LIMIT for word in oid):
            raise errors.UsageError(f"object id {oid}")
        if chosen.pages is not None and oid != ZERO:
            raise errors.UsageError(f"pool {pool} is dense: its only object id is {ZERO}")
        return chosen, (oid, index)
