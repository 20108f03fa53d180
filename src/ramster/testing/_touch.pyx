"""The application's side of a page fault, and the floors of faults, remote gets and shipping.

Covers: loops that touch pages and note what each touch took; a bare userfaultfd handler that decodes LZ4 or asks over TLS
before it maps a page; a TLS ping-pong and a one-way TLS stream between two native threads; writing pages out without a
store; remote gets of a `Links` without Python in the loop.
Does not cover: the store's floors (_floors).

Nothing here holds the GIL while it measures. Times are CLOCK_MONOTONIC, in ns. Where a thread runs decides more than what
it does (a wake-up across cores costs a virtual machine 15 to 40 us), so helper threads can be put on a core.
"""
from libc.errno cimport EAGAIN, EEXIST, EINTR, EPERM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strerror

from ramster.engine._c.atomic cimport RELAXED, load64
from ramster.engine._c.codec cimport LZ4_compress_default, LZ4_decompress_safe
from ramster.engine._c.linux cimport (
    EFD_CLOEXEC, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, MADV_NOHUGEPAGE, MAP_FAILED, MAP_SHARED, MFD_CLOEXEC, O_CLOEXEC,
    O_NONBLOCK, POLLIN, PROT_READ, PROT_WRITE, SHUT_RDWR, SYS_userfaultfd, UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_USER_MODE_ONLY,
    UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_WAKE, close, eventfd, eventfd_write,
    fallocate, ftruncate, ioctl, madvise, memfd_create, mmap, munmap, poll, pollfd, pread, read, shutdown, syscall, touch_page,
    uffd_msg_t, uffdio_api_t, uffdio_copy_t, uffdio_range_t, uffdio_register_t)
from ramster.engine._c.openssl cimport *
from ramster.engine._c.pthread cimport now_ns, pthread_join, pthread_t, start_thread
from ramster.engine._link cimport Links, Links_t, get_page
from ramster.engine._store cimport OK, PAGE

import os

import numpy as np

from ramster import errors

cdef enum:
    RAW_LIMIT = 3584        # the store's: a longer block is stored raw
    WINDOW_MAX = 64
    REQUEST = 48            # bytes of a request frame on the wire
    RECORD = 16384


cdef int start_on(object core, pthread_t *thread, void *(*body)(void *) noexcept nogil, void *argument, const char *name) except -1:
    """A thread inherits where it may run: on 'core' alone, or wherever its maker may."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        if start_thread(thread, body, argument, name) != 0:
            raise MemoryError("cannot start a thread")
    finally:
        os.sched_setaffinity(0, before)
    return 0


# --- touching ------------------------------------------------------------------------------------------------------

cdef const int64_t[::1] pages_within(const int64_t[::1] order, uint64_t bytes_):
    cdef Py_ssize_t i
    if bytes_ % PAGE or order.shape[0] == 0:
        raise errors.UsageError("whole pages, and at least one of them to touch")
    for i in range(order.shape[0]):
        if not 0 <= order[i] < <int64_t> (bytes_ // PAGE):
            raise errors.UsageError(f"page {order[i]} is not one of {bytes_ // PAGE}")
    return order


cdef void touch_all(const uint8_t *memory, const int64_t *order, Py_ssize_t n, bint write, uint64_t *took,
                    uint64_t *words) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint64_t begin = now_ns(), end
    for i in range(n):
        if write:
            touch_page(<void *> (memory + order[i] * PAGE))
        words[i] = load64(<uint64_t *> (memory + order[i] * PAGE), RELAXED)     # another thread may be writing it
        end = now_ns()
        took[i] = end - begin
        begin = end


def read_pages(const uint8_t[::1] memory, const int64_t[::1] order):
    """Read the first word of each page in this order: (ns of each touch, the words)."""
    order = pages_within(order, memory.shape[0])
    took, words = np.empty(order.shape[0], np.uint64), np.empty(order.shape[0], np.uint64)
    cdef uint64_t[::1] t = took, w = words
    with nogil:
        touch_all(&memory[0], &order[0], order.shape[0], False, &t[0], &w[0])
    return took, words


def write_pages(uint8_t[::1] memory, const int64_t[::1] order):
    """The same with a write that changes nothing."""
    order = pages_within(order, memory.shape[0])
    took, words = np.empty(order.shape[0], np.uint64), np.empty(order.shape[0], np.uint64)
    cdef uint64_t[::1] t = took, w = words
    with nogil:
        touch_all(&memory[0], &order[0], order.shape[0], True, &t[0], &w[0])
    return took, words


# --- pages compressed, without a store ------------------------------------------------------------------------------

cdef class Blocks:
    """Pages as LZ4 blocks (raw where LZ4 does not pay), one after the other in plain memory."""
    cdef uint8_t *data
    cdef uint64_t *at           # pages + 1 offsets
    cdef readonly uint64_t pages

    def __cinit__(self, const uint8_t[::1] pages):
        cdef uint64_t i, end = 0
        cdef int size
        if pages.shape[0] == 0 or pages.shape[0] % PAGE:
            raise errors.UsageError(f"{pages.shape[0]} bytes are not whole pages")
        self.pages = <uint64_t> pages.shape[0] // PAGE
        self.data = <uint8_t *> malloc(pages.shape[0])
        self.at = <uint64_t *> malloc((self.pages + 1) * sizeof(uint64_t))
        if self.data == NULL or self.at == NULL:
            raise MemoryError
        with nogil:
            for i in range(self.pages):
                self.at[i] = end
                size = LZ4_compress_default(<const char *> &pages[i * PAGE], <char *> self.data + end, PAGE, RAW_LIMIT)
                if size <= 0:
                    size = PAGE
                    memcpy(self.data + end, &pages[i * PAGE], PAGE)
                end += <uint64_t> size
            self.at[self.pages] = end

    def __dealloc__(self):
        free(self.data)
        free(self.at)

    @property
    def stored(self):
        """Mean bytes of a page."""
        return self.at[self.pages] / <double> self.pages

    cdef bint decode(self, uint64_t page, uint8_t *out) noexcept nogil:
        cdef uint64_t size = self.at[page + 1] - self.at[page]
        if size == PAGE:
            memcpy(out, self.data + self.at[page], PAGE)
            return True
        return LZ4_decompress_safe(<const char *> self.data + self.at[page], <char *> out, <int> size, PAGE) == PAGE


def write_out(const uint8_t[::1] pages, uint32_t batch=64, bint compress=True):
    """Pages of a mapped memfd read and compressed (or not), and punched out, in batches: ns per page."""
    cdef uint64_t length = pages.shape[0], at = 0, begin = 0
    cdef uint32_t i
    cdef int memfd = -1
    cdef void *area = MAP_FAILED
    cdef uint8_t *buffer = <uint8_t *> malloc(batch * PAGE)
    cdef char block[4096]
    cdef bint failed = False
    if length == 0 or length % (batch * PAGE):
        free(buffer)
        raise errors.UsageError(f"whole batches of {batch} pages")
    try:
        memfd = memfd_create(b"ramster-floor", MFD_CLOEXEC)
        if buffer == NULL or memfd < 0 or ftruncate(memfd, <long> length) != 0:
            raise MemoryError
        area = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0)
        if area == MAP_FAILED:
            raise MemoryError
        with nogil:
            madvise(area, length, MADV_NOHUGEPAGE)
            memcpy(area, &pages[0], length)
            memset(buffer, 0, batch * PAGE)
            begin = now_ns()
            while at < length and not failed:
                if compress:
                    failed = pread(memfd, buffer, batch * PAGE, <long> at) != <ssize_t> (batch * PAGE)
                    for i in range(batch):
                        LZ4_compress_default(<const char *> buffer + i * PAGE, block, PAGE, RAW_LIMIT)
                failed |= fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> at, batch * PAGE) != 0
                at += batch * PAGE
            begin = now_ns() - begin
        if failed:
            raise OSError(errno, strerror(errno).decode())
        return begin / (<double> length / PAGE)
    finally:
        if area != MAP_FAILED:
            munmap(area, length)
        if memfd >= 0:
            close(memfd)
        free(buffer)


# --- TLS -----------------------------------------------------------------------------------------------------------

OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, NULL)

cdef struct End:                # the far end of a connection: what its thread does, and how that went
    SSL *ssl
    uint32_t reply_bytes
    uint64_t expected           # bytes of a stream
    bint ok
    uint64_t done_ns
    pthread_t thread


cdef bint read_all(SSL *ssl, uint8_t *buffer, uint32_t size) noexcept nogil:
    cdef uint32_t done = 0
    cdef int n
    while done < size:
        n = SSL_read(ssl, buffer + done, <int> (size - done))
        if n <= 0:
            return False
        done += <uint32_t> n
    return True


cdef void *far_handshake(void *argument) noexcept nogil:
    cdef End *e = <End *> argument
    e.ok = SSL_do_handshake(e.ssl) == 1
    return NULL


cdef void *far_echo(void *argument) noexcept nogil:
    """Answers requests until one begins with a zero."""
    cdef End *e = <End *> argument
    cdef uint8_t buffer[RECORD]
    cdef uint8_t request[REQUEST]
    memset(buffer, 0x77, RECORD)
    while read_all(e.ssl, request, REQUEST):
        if request[0] == 0:
            e.ok = True
            break
        if SSL_write(e.ssl, buffer, <int> e.reply_bytes) != <int> e.reply_bytes:
            break
    return NULL


cdef void *far_sink(void *argument) noexcept nogil:
    cdef End *e = <End *> argument
    cdef uint8_t buffer[RECORD]
    cdef uint64_t got = 0
    cdef int n
    while got < e.expected:
        n = SSL_read(e.ssl, buffer, RECORD)
        if n <= 0:
            break
        got += <uint64_t> n
    e.done_ns = now_ns()
    e.ok = got == e.expected
    return NULL


cdef bint exchange(SSL *ssl, uint8_t *request, uint8_t *reply, uint32_t bytes_) noexcept nogil:
    return SSL_write(ssl, request, REQUEST) == REQUEST and read_all(ssl, reply, bytes_)


cdef class TlsPair:
    """A TLS 1.3 connection with certificates on both sides between two connected, blocking sockets of this process.

    Takes both descriptors over. The far end is a native thread of its own in each measurement, on `far_core` if that is not
    None; one measurement at a time.
    Settings are those of the product's links. CertificateError when the handshake fails.
    """
    cdef SSL_CTX *context
    cdef SSL *near
    cdef End far
    cdef int fds[2]
    cdef bint owns              # an object that was never made has descriptors 0 and 0
    cdef public object far_core

    def __cinit__(self, int near, int far, str ca, str certificate, str key):
        cdef SSL_CTX *c
        cdef int result
        self.fds[0], self.fds[1] = near, far
        self.owns = True
        os.set_blocking(near, True)
        os.set_blocking(far, True)
        c = self.context = SSL_CTX_new(TLS_method())
        if c == NULL:
            raise MemoryError
        SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION)
        SSL_CTX_set_num_tickets(c, 0)
        SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF)
        SSL_CTX_set_ciphersuites(c, b"TLS_AES_128_GCM_SHA256")
        SSL_CTX_set_read_ahead(c, 1)
        SSL_CTX_set_verify(c, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)
        ERR_clear_error()
        if SSL_CTX_load_verify_locations(c, os.fsencode(ca), NULL) != 1 or \
                SSL_CTX_use_certificate_chain_file(c, os.fsencode(certificate)) != 1 or \
                SSL_CTX_use_PrivateKey_file(c, os.fsencode(key), SSL_FILETYPE_PEM) != 1:
            raise errors.CertificateError(f"cannot use {ca}, {certificate} and {key}")
        self.near = SSL_new(c)
        self.far.ssl = SSL_new(c)
        if self.near == NULL or self.far.ssl == NULL or SSL_set_fd(self.near, near) != 1 or SSL_set_fd(self.far.ssl, far) != 1:
            raise MemoryError
        SSL_set_connect_state(self.near)
        SSL_set_accept_state(self.far.ssl)
        self.begin(far_handshake)
        with nogil:
            result = SSL_do_handshake(self.near)
        if not self.end(result == 1):
            raise errors.CertificateError("the TLS handshake failed")

    def __dealloc__(self):
        self.close()
        SSL_CTX_free(self.context)

    cpdef close(self):
        SSL_free(self.near)
        SSL_free(self.far.ssl)
        self.near = self.far.ssl = NULL
        if self.owns:
            close(self.fds[0])
            close(self.fds[1])
            self.owns = False

    cdef int begin(self, void *(*body)(void *) noexcept nogil) except -1:
        if self.near == NULL or self.far.ssl == NULL:
            raise errors.UsageError("the connection is closed")
        self.far.ok = False
        return start_on(self.far_core, &self.far.thread, body, &self.far, b"floor-tls")

    cdef bint end(self, bint ok):
        """Join the far end; what failed on this side breaks the connection first, or it would wait for ever."""
        with nogil:
            if not ok:
                shutdown(self.fds[0], SHUT_RDWR)
            pthread_join(self.far.thread, NULL)
        return ok and self.far.ok

    cdef int begin_echo(self, uint32_t reply_bytes) except -1:
        if not 0 < reply_bytes <= RECORD:
            raise errors.UsageError(f"a reply of 1 to {RECORD} bytes")
        self.far.reply_bytes = reply_bytes
        return self.begin(far_echo)

    cdef int end_echo(self, bint ok) except -1:
        cdef uint8_t request[REQUEST]
        memset(request, 0, REQUEST)
        if not self.end(ok and SSL_write(self.near, request, REQUEST) == REQUEST):
            raise ConnectionError("the TLS connection broke")
        return 0

    def ping_pong(self, uint32_t reply_bytes, uint32_t rounds):
        """A request of 48 bytes and a reply of so many, one at a time: ns of each."""
        if rounds == 0:
            raise errors.UsageError("at least one round")
        took = np.empty(rounds, np.uint64)
        cdef uint64_t[::1] t = took
        cdef uint8_t request[REQUEST]
        cdef uint8_t reply[RECORD]
        cdef uint64_t begin
        cdef uint32_t i
        cdef bint ok = True
        memset(request, 1, REQUEST)
        self.begin_echo(reply_bytes)
        with nogil:
            for i in range(rounds):
                begin = now_ns()
                ok = exchange(self.near, request, reply, reply_bytes)
                t[i] = now_ns() - begin
                if not ok:
                    break
        self.end_echo(ok)
        return took

    def stream(self, uint64_t total_bytes, uint32_t write_bytes=262144):
        """One way, in writes of so many bytes, until the far end has all of it: bytes per second."""
        cdef uint64_t sent = 0, begin
        cdef uint8_t *buffer = <uint8_t *> malloc(write_bytes)
        cdef bint ok = True
        if buffer == NULL or total_bytes == 0 or total_bytes % write_bytes:
            free(buffer)
            raise errors.UsageError(f"{total_bytes} bytes are not whole writes of {write_bytes}")
        memset(buffer, 0x77, write_bytes)
        self.far.expected = total_bytes
        try:
            self.begin(far_sink)
            begin = now_ns()
            with nogil:
                while ok and sent < total_bytes:
                    ok = SSL_write(self.near, buffer, <int> write_bytes) == <int> write_bytes
                    sent += write_bytes
            if not self.end(ok):
                raise ConnectionError("the TLS connection broke")
        finally:
            free(buffer)
        return total_bytes * 1e9 / (self.far.done_ns - begin)


# --- a bare userfaultfd handler ---------------------------------------------------------------------------------------

cdef struct Handler:
    int uffd
    int stop
    uint64_t base
    uint64_t pages
    uint64_t window             # pages per COPY
    uint8_t *buffer
    void *blocks                # Blocks, or NULL
    SSL *ssl                    # or NULL
    int failed                  # errno of the first failure
    pthread_t thread


cdef void serve(Handler *h, uint64_t address) noexcept nogil:
    cdef uffdio_copy_t copy
    cdef uffdio_range_t wake
    cdef uint8_t request[REQUEST]
    cdef uint64_t first = (address - h.base) // PAGE // h.window * h.window, i
    cdef uint64_t count = min(h.window, h.pages - first)
    if h.ssl != NULL:
        memset(request, 1, REQUEST)
        for i in range(count):
            if not exchange(h.ssl, request, h.buffer + i * PAGE, PAGE) and not h.failed:
                h.failed = EPERM
    if h.blocks != NULL:
        for i in range(count):
            if not (<Blocks> h.blocks).decode(first + i, h.buffer + i * PAGE) and not h.failed:
                h.failed = EPERM
    copy.dst = h.base + first * PAGE
    copy.src = <uint64_t> h.buffer
    copy.len = count * PAGE
    copy.mode = 0
    copy.copy = 0
    if ioctl(h.uffd, UFFDIO_COPY, &copy) != 0:
        if errno != EEXIST and errno != EAGAIN and not h.failed:
            h.failed = errno
        wake.start = copy.dst
        wake.len = copy.len
        ioctl(h.uffd, UFFDIO_WAKE, &wake)


cdef void *handle(void *argument) noexcept nogil:
    cdef Handler *h = <Handler *> argument
    cdef pollfd fds[2]
    cdef uffd_msg_t message
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
            if message.event == UFFD_EVENT_PAGEFAULT:
                serve(h, message.address)


cdef int open_userfaultfd() except -1:
    cdef int fd = <int> syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)
    if fd < 0 and errno == EPERM:
        fd = <int> syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY)
    if fd < 0:
        raise errors.PermissionMissing(f"userfaultfd: {strerror(errno).decode()}")
    return fd


def bare_fault(const int64_t[::1] order, uint64_t pages, uint64_t window=1, Blocks blocks=None, TlsPair tls=None, core=None):
    """Touch these of `pages` away pages, served by a bare userfaultfd handler thread of this process: (ns of each touch, the
    words read). `window`: aligned pages per UFFDIO_COPY. `blocks`: the handler decodes them. `tls`: it asks for a page of
    4 KiB over this connection first. `core`: where the handler runs. PermissionMissing without userfaultfd."""
    cdef Handler h
    cdef uint64_t length = pages * PAGE
    cdef void *area = MAP_FAILED
    cdef int memfd = -1
    cdef uffdio_api_t api
    cdef uffdio_register_t reg
    cdef bint started = False, asking = False
    order = pages_within(order, length)
    if not 0 < window <= WINDOW_MAX or (blocks is not None and blocks.pages < pages):
        raise errors.UsageError(f"1 to {WINDOW_MAX} pages per copy, a block for each page")
    took, words = np.empty(order.shape[0], np.uint64), np.empty(order.shape[0], np.uint64)
    cdef uint64_t[::1] t = took, w = words
    memset(&h, 0, sizeof(h))
    h.uffd = h.stop = -1
    h.pages = pages
    h.window = window
    h.blocks = <void *> blocks if blocks is not None else NULL
    h.ssl = tls.near if tls is not None else NULL
    try:
        h.buffer = <uint8_t *> malloc(window * PAGE)
        if h.buffer == NULL:
            raise MemoryError
        memset(h.buffer, 0, window * PAGE)
        h.uffd = open_userfaultfd()
        api.api = UFFD_API
        api.features = 0
        memfd = memfd_create(b"ramster-floor", MFD_CLOEXEC)
        h.stop = eventfd(0, EFD_CLOEXEC)
        if memfd < 0 or h.stop < 0 or ftruncate(memfd, <long> length) != 0 or ioctl(h.uffd, UFFDIO_API, &api) != 0:
            raise OSError(errno, strerror(errno).decode())
        area = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0)
        if area == MAP_FAILED:
            raise OSError(errno, strerror(errno).decode())
        madvise(area, length, MADV_NOHUGEPAGE)
        h.base = <uint64_t> area
        reg.range.start = h.base
        reg.range.len = length
        reg.mode = UFFDIO_REGISTER_MODE_MISSING
        reg.ioctls = 0
        if ioctl(h.uffd, UFFDIO_REGISTER, &reg) != 0:
            raise OSError(errno, strerror(errno).decode())
        if tls is not None:
            tls.begin_echo(PAGE)
            asking = True
        start_on(core, &h.thread, handle, &h, b"floor-fault")
        started = True
        with nogil:
            touch_all(<uint8_t *> area, &order[0], order.shape[0], False, &t[0], &w[0])
    finally:
        if started:
            eventfd_write(h.stop, 1)
            with nogil:
                pthread_join(h.thread, NULL)
        if asking:
            tls.end_echo(not h.failed)
        if area != MAP_FAILED:
            munmap(area, length)
        for fd in (h.uffd, h.stop, memfd):
            if fd >= 0:
                close(fd)
        free(h.buffer)
    if h.failed:
        raise OSError(h.failed, strerror(h.failed).decode())
    return took, words


# --- the product's remote get -----------------------------------------------------------------------------------------

def get_pages(Links links, uint64_t pool, const int64_t[::1] order):
    """Get pages of a dense pool, wherever they are, one at a time: (ns of each get, their first words)."""
    cdef Links_t *l = links.live()
    if order.shape[0] == 0:
        raise errors.UsageError("at least one page to get")
    took, words = np.empty(order.shape[0], np.uint64), np.empty(order.shape[0], np.uint64)
    cdef uint64_t[::1] t = took, w = words
    cdef uint64_t oid[3]
    cdef uint8_t page[PAGE]
    cdef uint64_t begin, failed = 0
    cdef Py_ssize_t i
    memset(oid, 0, 24)
    with nogil:
        for i in range(order.shape[0]):
            begin = now_ns()
            failed += get_page(l, pool, oid, <uint32_t> order[i], page, -1) != OK
            t[i] = now_ns() - begin
            memcpy(&w[i], page, 8)
    if failed:
        raise errors.PageLost(f"{failed} of {order.shape[0]} pages could not be had")
    return took, words
