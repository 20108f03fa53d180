"""GCC atomic builtins under one name per width, spin locks, prefetching, and counts of bits.

Orders are spelled at the call: RELAXED for counters, ACQUIRE and RELEASE for publication, SEQ_CST for epochs.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    int RELAXED "__ATOMIC_RELAXED"
    int ACQUIRE "__ATOMIC_ACQUIRE"
    int RELEASE "__ATOMIC_RELEASE"
    int ACQ_REL "__ATOMIC_ACQ_REL"
    int SEQ_CST "__ATOMIC_SEQ_CST"

    uint8_t load8 "__atomic_load_n"(uint8_t *where, int order) noexcept nogil
    void store8 "__atomic_store_n"(uint8_t *where, uint8_t value, int order) noexcept nogil
    uint32_t load32 "__atomic_load_n"(uint32_t *where, int order) noexcept nogil
    void store32 "__atomic_store_n"(uint32_t *where, uint32_t value, int order) noexcept nogil
    uint32_t swap32 "__atomic_exchange_n"(uint32_t *where, uint32_t value, int order) noexcept nogil
    uint32_t add32 "__atomic_add_fetch"(uint32_t *where, uint32_t value, int order) noexcept nogil
    uint32_t sub32 "__atomic_sub_fetch"(uint32_t *where, uint32_t value, int order) noexcept nogil
    bint cas32 "__atomic_compare_exchange_n"(
        uint32_t *where, uint32_t *expected, uint32_t desired, bint weak, int success, int failure) noexcept nogil
    uint64_t load64 "__atomic_load_n"(uint64_t *where, int order) noexcept nogil
    void store64 "__atomic_store_n"(uint64_t *where, uint64_t value, int order) noexcept nogil
    uint64_t swap64 "__atomic_exchange_n"(uint64_t *where, uint64_t value, int order) noexcept nogil
    uint64_t add64 "__atomic_add_fetch"(uint64_t *where, uint64_t value, int order) noexcept nogil
    uint64_t sub64 "__atomic_sub_fetch"(uint64_t *where, uint64_t value, int order) noexcept nogil
    bint cas64 "__atomic_compare_exchange_n"(
        uint64_t *where, uint64_t *expected, uint64_t desired, bint weak, int success, int failure) noexcept nogil
    void *swap_pointer "__atomic_exchange_n"(void **where, void *value, int order) noexcept nogil
    bint cas_pointer "__atomic_compare_exchange_n"(
        void **where, void **expected, void *desired, bint weak, int success, int failure) noexcept nogil
    void fence "__atomic_thread_fence"(int order) noexcept nogil
    void *load_pointer "__atomic_load_n"(void **where, int order) noexcept nogil
    void store_pointer "__atomic_store_n"(void **where, void *value, int order) noexcept nogil
    void prefetch "__builtin_prefetch"(const void *where, int write) noexcept nogil
    int ctz64 "__builtin_ctzll"(uint64_t value) noexcept nogil
    int popcount64 "__builtin_popcountll"(uint64_t value) noexcept nogil

cdef extern from "<sched.h>" nogil:
    int sched_yield() noexcept
    int sched_getcpu() noexcept


cdef inline void spin_lock(uint32_t *lock) noexcept nogil:
    """Take a lock held for a few dozen instructions. Yields early: a preempted holder needs the core."""
    cdef int spins = 0
    while swap32(lock, 1, ACQUIRE) != 0:
        while load32(lock, RELAXED) != 0:
            spins += 1
            if spins > 64:
                sched_yield()
                spins = 0


cdef inline void spin_unlock(uint32_t *lock) noexcept nogil:
    store32(lock, 0, RELEASE)
