# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Floors: the least that each path could cost on this machine, and the store's own paths in the same kind of loop.

Covers: LZ4, memcpy, a bare userfaultfd handler, a TCP ping-pong; put and get of the store without Python in the loop.
Does not cover: TLS.
"""
from libc.errno cimport EAGAIN, EEXIST, EINTR, EPERM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcpy, memset, strerror

from ramster.engine._c.codec cimport LZ4_compress_default, LZ4_decompress_safe, crc32_iscsi
from ramster.engine._c.linux cimport (
    EFD_CLOEXEC, MADV_NOHUGEPAGE, MAP_FAILED, MAP_SHARED, MFD_CLOEXEC, MSG_NOSIGNAL, O_CLOEXEC, O_NONBLOCK, POLLIN,
    PROT_READ, PROT_WRITE, SYS_userfaultfd, UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_USER_MODE_ONLY, UFFDIO_API, UFFDIO_COPY,
    UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_WAKE, close, eventfd, eventfd_write, ftruncate, ioctl, madvise,
    memfd_create, mmap, munmap, poll, pollfd, read, recv, send, shutdown, syscall, touch_page, uffd_msg_t, uffdio_api_t,
    uffdio_copy_t, uffdio_range_t, uffdio_register_t)
from ramster.engine._c.pthread cimport now_ns, pthread_join, pthread_t, start_thread
from ramster.engine._store cimport OK, PAGE, RemoteRef, Store, Store_t, store_get, store_put

from ramster import errors

cdef enum:
    RAW_LIMIT = 3584        # the store's: a longer block is stored raw
    BLOCK_MAX = 4096


cdef uint32_t whole_pages(bytes pages) except 0:
    if len(pages) == 0 or len(pages) % PAGE:
        raise errors.UsageError(f"{len(pages)} bytes are not whole pages")
    return <uint32_t> (len(pages) // PAGE)


def lz4_compress(bytes pages):
    """LZ4 alone, with the store's limit: (ns per page, mean bytes per page that a put would store)."""
    cdef uint32_t n = whole_pages(pages), i
    cdef const char *data = pages
    cdef char block[BLOCK_MAX]
    cdef uint64_t begin, total = 0
    cdef int size
    with nogil:
        begin = now_ns()
        for i in range(n):
            size = LZ4_compress_default(data + <uint64_t> i * PAGE, block, PAGE, RAW_LIMIT)
            total += PAGE if size <= 0 else size
        begin = now_ns() - begin
    return begin / <double> n, total / <double> n


def lz4_decode_and_copy(bytes pages):
    """LZ4 decode (memcpy where a page does not compress) and one memcpy of the page: ns per page."""
    cdef uint32_t n = whole_pages(pages), i
    cdef const char *data = pages
    cdef char *blocks = <char *> malloc(<size_t> n * BLOCK_MAX)
    cdef int *sizes = <int *> malloc(<size_t> n * sizeof(int))
    cdef char page[PAGE]
    cdef char target[PAGE]
    cdef uint64_t begin = 0, wrong = 0, at = 0
    if blocks == NULL or sizes == NULL:
        free(blocks)
        free(sizes)
        raise MemoryError
    with nogil:
        for i in range(n):
            sizes[i] = LZ4_compress_default(data + <uint64_t> i * PAGE, blocks + at, PAGE, RAW_LIMIT)
            if sizes[i] <= 0:
                memcpy(blocks + at, data + <uint64_t> i * PAGE, PAGE)
                sizes[i] = PAGE
            at += sizes[i]
        at = 0
        begin = now_ns()
        for i in range(n):
            if sizes[i] == PAGE:
                memcpy(page, blocks + at, PAGE)
            elif LZ4_decompress_safe(blocks + at, page, sizes[i], PAGE) != PAGE:
                wrong += 1
            at += sizes[i]
            memcpy(target, page, PAGE)
            wrong += target[i & 4095] != data[<uint64_t> i * PAGE + (i & 4095)]     # and keeps the copy from being left out
        begin = now_ns() - begin
    free(blocks)
    free(sizes)
    if wrong:
        raise AssertionError(f"{wrong} pages came back wrong")
    return begin / <double> n


def copy_and_checksum(bytes pages):
    """What a put of a page that does not compress cannot do without: one memcpy and one CRC32C; ns per page."""
    cdef uint32_t n = whole_pages(pages), i, crc = 0
    cdef const uint8_t *data = pages
    cdef uint8_t *target = <uint8_t *> malloc(len(pages))
    cdef uint64_t begin
    if target == NULL:
        raise MemoryError
    memset(target, 1, len(pages))
    with nogil:
        begin = now_ns()
        for i in range(n):
            memcpy(target + <uint64_t> i * PAGE, data + <uint64_t> i * PAGE, PAGE)
            crc ^= crc32_iscsi(target + <uint64_t> i * PAGE, PAGE, 0)
        begin = now_ns() - begin
    free(target)
    return begin / <double> n if crc != 1 else 0.0      # uses crc, so that it is not left out


def store_put_pages(Store store, uint64_t pool, bytes pages, uint64_t shuffle=0):
    """Put each page under its number in a dense pool, native loop: ns per page. StoreFull when one was refused.

    shuffle: not 0: as many puts, of pages drawn at random (with repeats) from this seed.
    """
    cdef Store_t *s = store.live()
    cdef uint32_t n = whole_pages(pages), i, refused = 0
    cdef const uint8_t *data = pages
    cdef uint64_t oid[3]
    cdef uint64_t begin, key
    memset(oid, 0, 24)
    with nogil:
        begin = now_ns()
        for i in range(n):
            key = i
            if shuffle:
                key = (shuffle + i) * 0x9e3779b97f4a7c15ull
                key = (key ^ (key >> 29)) * 0xbf58476d1ce4e5b9ull
                key = (key >> 32) % n
            refused += store_put(s, pool, oid, <uint32_t> key, data + key * PAGE, 1000000000) != OK
        begin = now_ns() - begin
    if refused:
        raise errors.StoreFull(f"{refused} of {n} pages refused: the arena is too small for this measurement")
    return begin / <double> n


def store_get_pages(Store store, uint64_t pool, bytes pages):
    """Get each page again, native loop, one byte of each compared: ns per page."""
    cdef Store_t *s = store.live()
    cdef uint32_t n = whole_pages(pages), i, wrong = 0
    cdef const uint8_t *data = pages
    cdef uint8_t page[PAGE]
    cdef RemoteRef ref
    cdef uint64_t oid[3]
    cdef uint64_t begin
    memset(oid, 0, 24)
    with nogil:
        begin = now_ns()
        for i in range(n):
            wrong += store_get(s, pool, oid, i, page, -1, &ref) != OK
            wrong += page[i & 4095] != data[<uint64_t> i * PAGE + (i & 4095)]
        begin = now_ns() - begin
    if wrong:
        raise AssertionError(f"{wrong} pages came back wrong")
    return begin / <double> n


# --- userfaultfd ---------------------------------------------------------------------------------------------------

cdef struct Handler:
    int uffd
    int stop
    uint32_t window         # bytes per COPY
    uint8_t *source
    uint64_t base
    int failed              # errno of the first failure
    pthread_t thread


cdef int ascending(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<const uint64_t *> a)[0], y = (<const uint64_t *> b)[0]
    return (x > y) - (x < y)


cdef void *handle(void *argument) noexcept nogil:
    cdef Handler *h = <Handler *> argument
    cdef pollfd fds[2]
    cdef uffd_msg_t message
    cdef uffdio_copy_t copy
    cdef uffdio_range_t wake
    fds[0].fd = h.uffd
    fds[1].fd = h.stop
    fds[0].events = fds[1].events = POLLIN
    while True:
        if poll(fds, 2, -1) < 0 and errno != EINTR:
            h.failed = errno
            return NULL
        if fds[1].revents:
            return NULL
        while read(h.uffd, &message, sizeof(message)) == sizeof(message):
            if message.event != UFFD_EVENT_PAGEFAULT:
                continue
            memset(&copy, 0, sizeof(copy))
            copy.dst = h.base + (message.address - h.base) // h.window * h.window
            copy.src = <uint64_t> <size_t> h.source
            copy.len = h.window
            if ioctl(h.uffd, UFFDIO_COPY, &copy) != 0:
                if errno != EEXIST and errno != EAGAIN and not h.failed:
                    h.failed = errno
                wake.start = copy.dst
                wake.len = copy.len
                ioctl(h.uffd, UFFDIO_WAKE, &wake)


def fault(uint32_t pages_per_copy=1, bint idle=False, uint32_t faults=2000):
    """Bare userfaultfd handler thread on a memfd in this process: (p50, p99) in ns of the fault itself.

    idle: 2 ms of sleep before each fault, so that the handler has to be woken from idle. PermissionMissing without
    userfaultfd.
    """
    cdef Handler h
    cdef uint64_t length = <uint64_t> faults * pages_per_copy * PAGE, begin
    cdef uint64_t *took = NULL
    cdef void *area = MAP_FAILED
    cdef int memfd = -1, error = 0
    cdef uint32_t i
    cdef uffdio_api_t api
    cdef uffdio_register_t reg
    cdef bint started = False
    if not 0 < pages_per_copy <= 512 or not 0 < faults <= 100000:
        raise errors.UsageError("1 to 512 pages per copy, 1 to 100000 faults")
    memset(&h, 0, sizeof(h))
    h.uffd = h.stop = -1
    h.window = pages_per_copy * PAGE
    try:
        took = <uint64_t *> malloc(faults * sizeof(uint64_t))
        h.source = <uint8_t *> malloc(h.window)
        if took == NULL or h.source == NULL:
            raise MemoryError
        memset(h.source, 0x77, h.window)
        h.uffd = <int> syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)
        if h.uffd < 0 and errno == EPERM:
            h.uffd = <int> syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY)
        if h.uffd < 0:
            raise errors.PermissionMissing(f"userfaultfd: {strerror(errno).decode()}")
        api.api = UFFD_API
        api.features = 0
        memfd = memfd_create("ramster-floor", MFD_CLOEXEC)
        if memfd < 0 or ftruncate(memfd, <long> length) != 0 or ioctl(h.uffd, UFFDIO_API, &api) != 0:
            raise OSError(errno, strerror(errno).decode())
        area = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0)
        if area == MAP_FAILED:
            raise OSError(errno, strerror(errno).decode())
        madvise(area, length, MADV_NOHUGEPAGE)
        memset(&reg, 0, sizeof(reg))
        reg.range.start = h.base = <uint64_t> <size_t> area
        reg.range.len = length
        reg.mode = UFFDIO_REGISTER_MODE_MISSING
        h.stop = eventfd(0, EFD_CLOEXEC)
        if ioctl(h.uffd, UFFDIO_REGISTER, &reg) != 0 or h.stop < 0:
            raise OSError(errno, strerror(errno).decode())
        if start_thread(&h.thread, handle, &h, "floor-fault") != 0:
            raise MemoryError("cannot start a thread")
        started = True
        with nogil:
            for i in range(faults):
                if idle:
                    poll(NULL, 0, 2)        # long enough for both cores to fall asleep
                begin = now_ns()
                touch_page(<uint8_t *> area + <uint64_t> i * h.window)
                took[i] = now_ns() - begin
        if h.failed:
            raise OSError(h.failed, strerror(h.failed).decode())
        qsort(took, faults, sizeof(uint64_t), ascending)
        return took[faults // 2], took[<uint64_t> faults * 99 // 100]
    finally:
        if started:
            eventfd_write(h.stop, 1)
            with nogil:
                pthread_join(h.thread, NULL)
        if area != MAP_FAILED:
            munmap(area, length)
        for fd in (h.uffd, h.stop, memfd):
            if fd >= 0:
                close(fd)
        free(h.source)
        free(took)


# --- TCP -----------------------------------------------------------------------------------------------------------

cdef struct Echo:
    int fd
    uint32_t request_bytes
    uint32_t reply_bytes
    uint32_t rounds
    pthread_t thread


cdef bint receive(int fd, uint8_t *buffer, uint32_t size) noexcept nogil:
    cdef uint32_t done = 0
    cdef ssize_t n
    while done < size:
        n = recv(fd, buffer + done, size - done, 0)
        if n <= 0:
            if n < 0 and errno == EINTR:
                continue
            return False
        done += <uint32_t> n
    return True


cdef bint transmit(int fd, const uint8_t *buffer, uint32_t size) noexcept nogil:
    cdef uint32_t done = 0
    cdef ssize_t n
    while done < size:
        n = send(fd, buffer + done, size - done, MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            return False
        done += <uint32_t> n
    return True


cdef void *echo(void *argument) noexcept nogil:
    cdef Echo *e = <Echo *> argument
    cdef uint8_t buffer[65536]
    cdef uint32_t i
    memset(buffer, 0x77, e.reply_bytes)
    for i in range(e.rounds):
        if not receive(e.fd, buffer, e.request_bytes) or not transmit(e.fd, buffer, e.reply_bytes):
            break
    return NULL


def ping_pong(int near, int far, uint32_t request_bytes=64, uint32_t reply_bytes=4096, uint32_t rounds=5000):
    """A request and a page-sized reply between two connected blocking sockets, two native threads: (p50, p99) in ns."""
    cdef Echo e
    cdef uint8_t buffer[65536]
    cdef uint64_t *took
    cdef uint64_t begin
    cdef uint32_t i, done = 0
    if not 0 < request_bytes <= 65536 or not 0 < reply_bytes <= 65536 or not 0 < rounds <= 1000000:
        raise errors.UsageError("1 to 65536 bytes, 1 to 1000000 rounds")
    took = <uint64_t *> malloc(<size_t> rounds * sizeof(uint64_t))
    if took == NULL:
        raise MemoryError
    e.fd = far
    e.request_bytes = request_bytes
    e.reply_bytes = reply_bytes
    e.rounds = rounds
    memset(buffer, 0x55, request_bytes)
    if start_thread(&e.thread, echo, &e, "floor-echo") != 0:
        free(took)
        raise MemoryError("cannot start a thread")
    with nogil:
        for i in range(rounds):
            begin = now_ns()
            if not transmit(near, buffer, request_bytes) or not receive(near, buffer, reply_bytes):
                break
            took[i] = now_ns() - begin
            done += 1
        if done != rounds:
            shutdown(far, 2)        # the other thread uses this frame's memory: it has to end first
        pthread_join(e.thread, NULL)
        if done == rounds:
            qsort(took, rounds, sizeof(uint64_t), ascending)
    if done != rounds:
        free(took)
        raise ConnectionError("the connection broke")
    result = took[rounds // 2], took[<uint64_t> rounds * 99 // 100]
    free(took)
    return result
