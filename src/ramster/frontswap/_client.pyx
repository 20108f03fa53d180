"""The application's side of a region: the mapping, its userfaultfd, the guardian thread, and the buffer that numpy
sees.

A region is a memfd that the node made. Here it is mapped and registered with userfaultfd; the node answers the
faults. This process keeps its own descriptor of the fault channel until the region is unmapped: were the last one
closed, missing pages would silently read as zeros.

The guardian is one native thread per region. It never takes the interpreter's lock and blocks every signal. It
carries out what only this process can do: on old kernels (no UFFDIO_POISON) it marks lost pages on the node's order,
and once the node stayed away for `node_wait_ms` it answers all faults itself: pages that are in the memfd go on
working, away pages are SIGBUS, never zeros.

Everything acts only in the process that made the mapping. A forked child gets ForkedError from each method; an
access to the memory is SIGSEGV there (the range is reserved without access, so that no later mapping of the child
lands on it), and one line on standard error says why.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.errno cimport EAGAIN, EEXIST, EINTR, EINVAL, EMFILE, ENFILE, ENOMEM, ENOSYS, errno
from libc cimport errno as c_errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport strlen, strncmp, strrchr

from ramster.engine._c.atomic cimport RELAXED, add64, load64, swap32
from ramster.engine._c.linux cimport *
from ramster.engine._c.pthread cimport now_ns

import os

from ramster.errors import ForkedError, KernelUnsupported, PermissionMissing, RegionBusy, UsageError

cdef enum:
    PAGE = 4096
    GUARD_LOST = 1
    GUARD_NOTE = 2
    GUARD_TEXT = NOTE_TEXT
    EVENTS = 16
    LOOK_MS = 1000            # between two looks at whether the process still needs a guardian
    NAMED = 48                # bytes of a region's name that the node has in what it says
    NOTES_S = 10              # a kind of note is written once in so many seconds, the others of it are counted
    STACK = 256 * 1024        # static TLS of other libraries is carved from a thread's stack, so not the bare minimum

cdef uint64_t REQUIRED = (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM
                          | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
# WP_UNPOPULATED: nothing of it is used, but a kernel that has it also has the write-protecting UFFDIO_CONTINUE (both 6.4).
cdef uint64_t OPTIONAL = UFFD_FEATURE_POISON | UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_WP_UNPOPULATED

FEATURES = REQUIRED | OPTIONAL       # all that a mapping's userfaultfd may have
FEATURE_POISON = UFFD_FEATURE_POISON
FEATURE_THREAD_ID = UFFD_FEATURE_THREAD_ID

cdef dict FEATURE_NAMES = {
    UFFD_FEATURE_PAGEFAULT_FLAG_WP: "PAGEFAULT_FLAG_WP (5.7)",
    UFFD_FEATURE_MISSING_SHMEM: "MISSING_SHMEM (4.11)",
    UFFD_FEATURE_MINOR_SHMEM: "MINOR_SHMEM (5.14)",
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM: "WP_HUGETLBFS_SHMEM (5.19)",
}

cdef packed struct GuardMessage:      # <IIQQ128s>
    uint32_t op
    uint32_t flags
    uint64_t first
    uint64_t pages
    char text[GUARD_TEXT]


# -- guardian: a native thread without the interpreter ---------------------------------------------------------------

cdef void say(Guard *guard, const char *text, uint64_t more=0) noexcept nogil:
    """One line, in one write: several processes may share a standard error. more: so many like it were not written."""
    cdef char line[GUARD_TEXT + REGION_NAME + 128]
    cdef char whose[REGION_NAME + 16]
    cdef int size
    whose[0] = 0
    cdef size_t named = min(strlen(guard.name), <size_t> NAMED)
    # What the node says of one page begins with the name.
    if strncmp(text, b"region ", 7) != 0 or strncmp(text + 7, guard.name, named) != 0 or text[7 + named] != c":":
        snprintf(whose, sizeof(whose), b" (region '%s')", guard.name)
    if more == 0:
        size = snprintf(line, sizeof(line), b"ramster: %s%s\n", text, whose)
    else:
        size = snprintf(line, sizeof(line), b"ramster: %llu more like this within %d s, the last: %s%s\n",
                        <unsigned long long> more, <int> NOTES_S, text, whose)
    if size > <int> sizeof(line) - 1:
        size = <int> sizeof(line) - 1
    if size > 0:
        write(STDERR_FILENO, line, <size_t> size)


cdef uint64_t kind_of(const char *text) noexcept nogil:
    """The same for two notes that differ only in their numbers; never 0."""
    cdef uint64_t kind = 0xcbf29ce484222325ull         # FNV-1a
    cdef int i
    for i in range(GUARD_TEXT):
        if text[i] == 0:
            break
        if not c"0" <= text[i] <= c"9":
            kind = (kind ^ <unsigned char> text[i]) * 0x100000001b3ull
    return kind | 1


cdef void settle(Guard *guard, uint64_t now) noexcept nogil:
    """Say how many notes were not written, of each kind whose time is over."""
    cdef Notes *each
    cdef int i
    for i in range(NOTE_KINDS):
        each = &guard.notes[i]
        if each.kind and now >= each.since_ns + NOTES_S * <uint64_t> 1000000000:
            if each.held:
                say(guard, each.last, each.held)
            each.kind = 0


cdef void note(Guard *guard, const char *text) noexcept nogil:
    """Write it, or count it where one of its kind was written a short while ago: a process that survives SIGBUS, or that has
    many threads, must not fill a disk with the same line."""
    cdef uint64_t now = now_ns(), kind = kind_of(text)
    cdef Notes *each = NULL
    cdef int i
    settle(guard, now)
    for i in range(NOTE_KINDS):
        if guard.notes[i].kind == kind:
            each = &guard.notes[i]
            break
        if guard.notes[i].kind == 0 and (each == NULL or each.kind != 0) or each == NULL:
            each = &guard.notes[i]
    if each.kind == 0:
        each.kind, each.since_ns, each.held = kind, now, 0
        say(guard, text)
        return
    each.held += 1
    snprintf(each.last, sizeof(each.last), b"%s", text)


cdef bint process_ends() noexcept nogil:
    """The main thread has ended, and this one is no reason for the process to go on. An interpreter may end its main thread so
    when it exits while another interpreter of the process holds objects."""
    cdef char path[64]
    cdef char text[512]
    cdef int fd
    cdef ssize_t size
    cdef char *at
    snprintf(path, sizeof(path), b"/proc/self/task/%d/stat", <int> getpid())
    fd = open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return False
    size = read(fd, text, sizeof(text) - 1)
    close(fd)
    if size <= 0:
        return False
    text[size] = 0
    at = strrchr(text, c")")            # behind the name, which may hold anything
    return at != NULL and (at[2] == c"Z" or at[2] == c"X")


cdef bint stopped(Guard *guard, int timeout_ms) noexcept nogil:
    """Wait for the stop event; false once the time is over."""
    cdef pollfd waiting
    waiting.fd = guard.stop
    waiting.events = POLLIN
    waiting.revents = 0
    # A signal cannot interrupt: all are blocked in this thread.
    return poll(&waiting, 1, timeout_ms) > 0


cdef void wake(Guard *guard, uint64_t first, uint64_t pages) noexcept nogil:
    cdef uffdio_range_t span
    span.start = <uint64_t> guard.base + first * PAGE
    span.len = pages * PAGE
    ioctl(guard.uffd, UFFDIO_WAKE, &span)


cdef int map_over(Guard *guard, uint64_t first, uint64_t pages) noexcept nogil:
    """Put pages that fail loudly in the place of lost ones; 0 or an errno.

    The offset follows the page number, so that neighbours merge into one mapping of the kernel (there is a limit on
    their number).
    """
    cdef void *at = guard.base + first * PAGE
    cdef int failure = 0
    lock_registry()                 # no fork between the two calls: the child must not inherit the replacement
    if mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, guard.empty,
            <off_t> (first * PAGE)) == MAP_FAILED:
        failure = errno
    else:
        madvise(at, pages * PAGE, MADV_DONTFORK)
        madvise(at, pages * PAGE, MADV_DONTDUMP)
    unlock_registry()
    return failure


cdef void lose(Guard *guard, uint64_t page) noexcept nogil:
    """Make a missing page fail loudly (nobody has its bytes any more)."""
    cdef uffdio_poison_t poison
    cdef int failure
    if guard.poison:
        poison.range.start = <uint64_t> guard.base + page * PAGE
        poison.range.len = PAGE
        poison.mode = 0
        poison.updated = 0
        if ioctl(guard.uffd, UFFDIO_POISON, &poison) == 0:
            add64(&guard.replaced, 1, RELAXED)
            return
        failure = errno
        if failure == EEXIST or failure == EAGAIN:
            # mapped meanwhile, or the address space is changing: the fault comes again
            wake(guard, page, 1)
            return
    if map_over(guard, page, 1) != 0:
        # Neither works: the thread stays asleep rather than see zeros.
        note(guard, b"a lost page cannot be marked (too many mappings, or no memory); its reader stays blocked")
        return
    add64(&guard.replaced, 1, RELAXED)
    wake(guard, page, 1)


cdef void unprotect(Guard *guard, uint64_t first, uint64_t pages) noexcept nogil:
    cdef uffdio_writeprotect_t protect
    protect.range.start = <uint64_t> guard.base + first * PAGE
    protect.range.len = pages * PAGE
    protect.mode = 0
    ioctl(guard.uffd, UFFDIO_WRITEPROTECT, &protect)


cdef void resolve(Guard *guard, uffd_msg_t *event) noexcept nogil:
    """One fault after the node is gone: nothing is evicted any more, so what the memfd holds now is all there is."""
    cdef uint64_t page = (event.address - <uint64_t> guard.base) // PAGE
    cdef uffdio_continue_t present
    if event.flags & UFFD_PAGEFAULT_FLAG_WP:
        unprotect(guard, page, 1)
        wake(guard, page, 1)
    elif lseek(guard.memfd, <off_t> (page * PAGE), SEEK_DATA) == <off_t> (page * PAGE):
        present.range.start = <uint64_t> guard.base + page * PAGE
        present.range.len = PAGE
        present.mode = 0
        present.mapped = 0
        if ioctl(guard.uffd, UFFDIO_CONTINUE, &present) != 0:
            wake(guard, page, 1)          # EEXIST: mapped already; EAGAIN: the fault comes again
    else:
        lose(guard, page)


cdef void serve_alone(Guard *guard) noexcept nogil:
    """Last resort once the node stayed away: resident pages go on working, away ones fail, until the region is
    unmapped.
    """
    cdef pollfd waiting[2]
    cdef uffd_msg_t events[EVENTS]
    cdef ssize_t size
    cdef int i
    cdef uint64_t pages = guard.size // PAGE
    cdef uint64_t first = 0
    cdef uint64_t step = 1 << 18          # 1 GiB at a time: the request holds the address space's lock
    while first < pages:
        unprotect(guard, first, min(step, pages - first))
        first += step
    wake(guard, 0, pages)                 # the node may have read faults that it never answered: they come again
    waiting[0].fd = guard.uffd
    waiting[0].events = POLLIN
    waiting[1].fd = guard.stop
    waiting[1].events = POLLIN
    while True:
        waiting[0].revents = waiting[1].revents = 0
        i = poll(waiting, 2, LOOK_MS)
        if i < 0:
            if errno == EINTR:
                continue
            return
        settle(guard, now_ns())
        if waiting[1].revents or (i == 0 and process_ends()):
            return
        if i == 0:
            continue
        size = read(guard.uffd, events, sizeof(events))
        if size <= 0:
            if size < 0 and (errno == EAGAIN or errno == EINTR):
                continue
            return
        for i in range(<int> (size // <ssize_t> sizeof(uffd_msg_t))):
            if events[i].event == UFFD_EVENT_PAGEFAULT:
                resolve(guard, &events[i])


cdef void obey(Guard *guard, GuardMessage *message) noexcept nogil:
    cdef uint64_t pages = guard.size // PAGE
    cdef int i
    if message.op == GUARD_LOST:
        if message.pages == 0 or message.first >= pages or message.pages > pages - message.first:
            message.flags = EINVAL
        else:
            message.flags = <uint32_t> map_over(guard, message.first, message.pages)
            if message.flags == 0:
                add64(&guard.replaced, message.pages, RELAXED)
                wake(guard, message.first, message.pages)
        send(guard.channel, message, sizeof(GuardMessage), MSG_DONTWAIT | MSG_NOSIGNAL)
    elif message.op == GUARD_NOTE:
        message.text[GUARD_TEXT - 1] = 0
        for i in range(GUARD_TEXT):
            if message.text[i] == 0:
                break
            if 0 < message.text[i] < 32 or message.text[i] == 127:
                message.text[i] = c"?"
        note(guard, message.text)
        send(guard.channel, message, sizeof(GuardMessage), MSG_DONTWAIT | MSG_NOSIGNAL)


cdef void watch(Guard *guard) noexcept nogil:
    cdef pollfd waiting[2]
    cdef GuardMessage message
    cdef ssize_t size
    cdef int ready
    pthread_setname_np(pthread_self(), b"ramster-guard")
    waiting[0].fd = guard.channel
    waiting[0].events = POLLIN
    waiting[1].fd = guard.stop
    waiting[1].events = POLLIN
    while True:
        waiting[0].revents = waiting[1].revents = 0
        ready = poll(waiting, 2, LOOK_MS)
        if ready < 0:
            if errno == EINTR:
                continue
            return
        settle(guard, now_ns())
        if waiting[1].revents or (ready == 0 and process_ends()):
            return
        if ready == 0:
            continue
        size = recv(guard.channel, &message, sizeof(message), MSG_DONTWAIT)
        if size == <ssize_t> sizeof(message):
            obey(guard, &message)
        elif size == 0 or (size < 0 and errno != EAGAIN and errno != EINTR):
            break                       # end of file; or a reset, where the node went with our answers unread
    if stopped(guard, guard.node_wait_ms) or process_ends():
        return
    store_release(&guard.node_gone, 1)
    say(guard, b"the node of a region is gone: pages that were away are lost (SIGBUS), resident pages stay usable")
    serve_alone(guard)


cdef void *guardian(void *argument) noexcept nogil:
    cdef Guard *guard = <Guard *> argument
    watch(guard)
    settle(guard, <uint64_t> -1)        # what was counted and not said
    return NULL


# -- fork ------------------------------------------------------------------------------------------------------------
# A child has neither the mapping (MADV_DONTFORK) nor the guardian. It gives up its copies of the descriptors (or the
# region's memory would live as long as the child) and reserves the address range: otherwise its next mapping may
# land there, and an array of the parent's would read as that mapping's bytes instead of failing.

FORKED_TOUCH = (
    "a forked child touched an array of region '{}' of its parent, has no memory there, and ends with SIGSEGV. "
    "It must attach (ramster.attach) or make its own; or start it with spawn or forkserver"
)

cdef Guard *registry = NULL
cdef pthread_mutex_t registry_lock
pthread_mutex_init(&registry_lock, NULL)


cdef void lock_registry() noexcept nogil:
    pthread_mutex_lock(&registry_lock)


cdef void unlock_registry() noexcept nogil:
    pthread_mutex_unlock(&registry_lock)


cdef void after_fork_in_child() noexcept nogil:
    global registry, inherited
    cdef Guard *guard = registry
    cdef Guard *last = NULL
    while guard != NULL:
        guard.reserved = mmap(guard.base, guard.size, PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == guard.base
        close_all(guard)
        last = guard
        guard = guard.next
    if last != NULL:
        last.next = inherited           # nobody frees them here: their mappings are the parent's
        inherited = registry
        tell_touches()
    registry = NULL                     # the numbers are free for others now: a grandchild must not close them again
    pthread_mutex_init(&registry_lock, NULL)


# A worker of a pool that touches the parent's array would die without a word, and the pool starts the next. So a child says
# why it dies. The handler is there for one signal: it puts back the one that was there before and returns, so that the
# access comes again and ends as it would have ended.

cdef Guard *inherited = NULL            # of the parent, and of its parents
cdef bint telling = False               # once in a line of descent: an earlier handler must never lead back to this one
cdef uint32_t told = 0
cdef sigaction_t before_telling


cdef void tell_touches() noexcept nogil:
    global telling
    cdef sigaction_t action
    if telling or sigaction(SIGSEGV, NULL, &before_telling) != 0:
        return
    if before_telling.sa_handler == SIG_IGN:
        return                          # what is ignored stays ignored through exec, a handler does not
    action.sa_sigaction = on_touch
    action.sa_flags = SA_SIGINFO | SA_ONSTACK
    sigfillset(&action.sa_mask)
    telling = sigaction(SIGSEGV, &action, NULL) == 0


cdef void on_touch(int number, siginfo_t *signal, void *_context) noexcept nogil:
    cdef int failure = errno
    cdef Guard *guard
    cdef char *at
    cdef pollfd waiting
    sigaction(SIGSEGV, &before_telling, NULL)
    if signal.si_code <= 0:
        # Sent, not a fault: it does not come again by itself. Blocked until this returns.
        syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), number, signal)
    else:
        at = <char *> signal.si_addr
        guard = inherited
        while guard != NULL and not (guard.reserved and guard.base <= at < guard.base + guard.size):
            guard = guard.next
        if guard != NULL and swap32(&told, 1, RELAXED) == 0:
            waiting.fd = STDERR_FILENO
            waiting.events = POLLOUT
            waiting.revents = 0
            if poll(&waiting, 1, 1000) > 0:     # a full pipe that nobody reads must not keep it alive
                write(STDERR_FILENO, guard.forked, strlen(guard.forked))
    c_errno.errno = failure


if pthread_atfork(lock_registry, unlock_registry, after_fork_in_child) != 0:
    raise MemoryError("pthread_atfork")


cdef void close_all(Guard *guard) noexcept nogil:
    cdef int *fds[5]
    cdef int i
    fds[0] = &guard.memfd
    fds[1] = &guard.uffd
    fds[2] = &guard.channel
    fds[3] = &guard.stop
    fds[4] = &guard.empty
    for i in range(5):
        if fds[i][0] >= 0:
            close(fds[i][0])
            fds[i][0] = -1


cdef void enlist(Guard *guard) noexcept nogil:
    global registry
    lock_registry()
    guard.next = registry
    registry = guard
    unlock_registry()


cdef void delist(Guard *guard) noexcept nogil:
    global registry
    cdef Guard **at
    lock_registry()
    at = &registry
    while at[0] != NULL:
        if at[0] == guard:
            at[0] = guard.next
            break
        at = &at[0].next
    unlock_registry()


# -- userfaultfd -----------------------------------------------------------------------------------------------------

NO_PERMISSION = (
    "userfaultfd is not permitted for this process: allow it with 'sysctl vm.unprivileged_userfaultfd=1', or give the "
    "process CAP_SYS_PTRACE or access to /dev/userfaultfd ('setfacl -m u:USER:rw /dev/userfaultfd'; in a container also a "
    "seccomp profile that lets it through)"
)
WAYS = ("auto", "syscall", "device", "user-mode")


cdef int open_fault_channel(str way, bint *user_mode_only) except -1:
    """A new userfaultfd: as full a one as this process may have, or made in one of the WAYS alone."""
    cdef int fd, device, failure = 0
    tried = []
    user_mode_only[0] = False
    if way in ("auto", "syscall"):
        fd = <int> syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)
        if fd >= 0:
            return fd
        if errno == ENOSYS:
            raise KernelUnsupported("this kernel has no userfaultfd (CONFIG_USERFAULTFD); regions need Linux 5.19 or later")
        failure = errno
        tried.append(f"userfaultfd: {os.strerror(failure)}")
    if way in ("auto", "device"):
        device = open(b"/dev/userfaultfd", O_RDWR | O_CLOEXEC)
        fd = -1
        if device >= 0:
            fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
            failure = errno
            close(device)
            if fd >= 0:
                return fd
        else:
            failure = errno
        tried.append(f"/dev/userfaultfd: {os.strerror(failure)}")
    if way in ("auto", "user-mode"):
        fd = <int> syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY)
        if fd >= 0:
            user_mode_only[0] = True
            return fd
        failure = errno
        tried.append(f"for faults of user mode alone: {os.strerror(failure)}")
    if failure == EMFILE or failure == ENFILE or failure == ENOMEM:     # of the last way that was tried
        raise OSError(failure, "no userfaultfd")
    raise PermissionMissing(f"{NO_PERMISSION} ({'; '.join(tried)})")


cdef uint64_t handshake(int fd, uint64_t features, int *failure) noexcept nogil:
    cdef uffdio_api_t api
    api.api = UFFD_API
    api.features = features
    api.ioctls = 0
    failure[0] = 0
    if ioctl(fd, UFFDIO_API, &api) != 0:
        failure[0] = errno
    return api.features


cdef int negotiate(uint64_t wanted, uint64_t *enabled, bint *user_mode_only) except -1:
    """Two descriptors: the first learns what the kernel offers, and a descriptor can settle its features only once."""
    cdef int failure = 0
    cdef str way = os.environ.get("RAMSTER_USERFAULTFD", "auto")
    if way not in WAYS:
        raise UsageError(f"RAMSTER_USERFAULTFD: {way!r}, must be one of {', '.join(WAYS)}")
    cdef int fd = open_fault_channel(way, user_mode_only)
    cdef uint64_t offered = handshake(fd, 0, &failure)
    close(fd)
    if failure:
        raise KernelUnsupported(f"the kernel refuses the userfaultfd interface: {os.strerror(failure)}")
    if offered & REQUIRED != REQUIRED:
        missing = ", ".join([name for bit, name in FEATURE_NAMES.items() if not offered & <uint64_t> bit])
        raise KernelUnsupported(f"regions need Linux 5.19 or later: this kernel's userfaultfd lacks {missing}")
    fd = open_fault_channel(way, user_mode_only)
    enabled[0] = REQUIRED | (offered & wanted)
    handshake(fd, enabled[0], &failure)
    if failure:
        close(fd)
        raise KernelUnsupported(f"the kernel refuses the userfaultfd features {enabled[0]:#x}: {os.strerror(failure)}")
    return fd


def probe():
    """Open and close a userfaultfd: (features that a mapping would enable, whether only faults from user mode would
    be served).

    Raises PermissionMissing, KernelUnsupported.
    """
    cdef uint64_t enabled = 0
    cdef bint user_mode_only = False
    cdef int fd = negotiate(OPTIONAL, &enabled, &user_mode_only)
    close(fd)
    return enabled, bool(user_mode_only)


cdef class Entered:
    """A context manager that knows whether it was entered. Natively, since an interrupt (Ctrl-C) may come before the first line
    of a Python function: then __exit__ would not be called, and nobody would know."""
    cdef readonly bint entered

    def __enter__(self):
        self.entered = True
        return self


# -- mapping ---------------------------------------------------------------------------------------------------------

cdef object _os_error(str what):
    cdef int failure = errno
    return OSError(failure, f"{what}: {os.strerror(failure)}")


cdef class Mapping:
    """A region's memory; a writable, contiguous buffer of bytes once `map` was called.

    Dropping the last reference unmaps it. Exported buffers keep it alive.

    creator: the id of the process that made it. features: the userfaultfd feature bits that are enabled; with
    FEATURE_POISON the node may mark lost pages itself. user_mode_only: system calls (read, write, send ...) that
    touch an away page fail with EFAULT.
    """

    def __cinit__(self, *_arguments, **_options):
        self.guard = NULL
        self._exports = 0
        self._closing = False
        self._closed = False
        self.creator = getpid()

    cdef void _check(self) except *:
        if getpid() != self.creator:
            raise ForkedError("a region belongs to the process that made it; a forked child must make its own")
        if self._closed or self._closing:
            raise UsageError("the region is closed")

    def map(self, int memfd, int channel, size, int node_wait_ms, bint poison=True, str name=""):
        """Map `size` bytes (a multiple of 4096) of `memfd`, register them, and start the guardian on `channel`.

        Takes over both descriptors, also where it fails. poison=False leaves UFFDIO_POISON off and exercises the way
        of old kernels. A forked child that touches it says `name`. Raises PermissionMissing, KernelUnsupported, OSError
        (nothing is mapped then), ForkedError.
        """
        cdef Guard *guard
        cdef uint64_t wanted = OPTIONAL
        cdef uffdio_register_t registration
        cdef bint user_mode_only = False
        cdef void *base
        cdef size_t length
        cdef int failure
        cdef sigset_t every, before
        cdef pthread_attr_t attributes
        try:
            self._check()
            if self.guard != NULL:
                raise UsageError("the region is mapped already")
            if size <= 0 or size % PAGE:
                raise ValueError(f"size: {size} bytes, must be a positive multiple of {PAGE}")
            if sysconf(SC_PAGESIZE) != PAGE:
                raise KernelUnsupported(f"regions need a kernel with pages of {PAGE} bytes, not {sysconf(SC_PAGESIZE)}")
            length = size
            guard = <Guard *> calloc(1, sizeof(Guard))
            if guard == NULL:
                raise MemoryError()
        except BaseException:
            close(memfd)
            close(channel)
            raise
        guard.memfd, guard.channel = memfd, channel
        guard.uffd = guard.stop = guard.empty = -1
        guard.node_wait_ms = node_wait_ms
        base = MAP_FAILED
        try:
            if not poison:
                wanted &= ~<uint64_t> UFFD_FEATURE_POISON
            guard.uffd = negotiate(wanted, &self.features, &user_mode_only)
            self.user_mode_only = user_mode_only
            guard.stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            guard.empty = memfd_create(b"ramster-lost", MFD_CLOEXEC)
            if guard.stop < 0 or guard.empty < 0:
                raise _os_error("cannot make the guardian's descriptors")
            # Without access at first: under mlockall(MCL_FUTURE) a readable mapping is filled on the spot, before it
            # is registered.
            base = mmap(NULL, length, PROT_NONE, MAP_SHARED, memfd, 0)
            if base == MAP_FAILED:
                raise _os_error(f"cannot map {size} bytes")
            munlock(base, length)
            # EINVAL where the kernel has no huge pages: then there is nothing to switch off.
            madvise(base, length, MADV_NOHUGEPAGE)
            if madvise(base, length, MADV_DONTFORK) != 0:
                raise _os_error("madvise(MADV_DONTFORK)")
            # A core file of all of it would read every page that is away: minutes, and more than the machine has.
            madvise(base, length, MADV_DONTDUMP)
            registration.range.start = <uint64_t> base
            registration.range.len = length
            registration.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP
            registration.ioctls = 0
            if ioctl(guard.uffd, UFFDIO_REGISTER, &registration) != 0:
                raise _os_error("userfaultfd refuses the mapping")
            if not registration.ioctls >> UFFDIO_NR_POISON & 1:
                self.features &= ~<uint64_t> UFFD_FEATURE_POISON
            if mprotect(base, length, PROT_READ | PROT_WRITE) != 0:
                raise _os_error("mprotect")
            guard.base, guard.size = <char *> base, length
            shown = name.encode(errors="replace")
            snprintf(guard.name, sizeof(guard.name), b"%s", <const char *> shown)
            line = FORKED_TOUCH.format(name).encode(errors="replace")
            snprintf(guard.forked, sizeof(guard.forked), b"ramster: %s\n", <const char *> line)
            guard.poison = self.features & UFFD_FEATURE_POISON != 0
            sigfillset(&every)
            pthread_attr_init(&attributes)
            pthread_attr_setstacksize(&attributes, STACK)
            pthread_sigmask(SIG_SETMASK, &every, &before)  # the application's handlers must never run in the guardian
            failure = pthread_create(&guard.thread, &attributes, guardian, guard)
            pthread_sigmask(SIG_SETMASK, &before, NULL)
            pthread_attr_destroy(&attributes)
            if failure:
                raise OSError(failure, f"cannot start the guardian thread: {os.strerror(failure)}")
        except BaseException:
            if base != MAP_FAILED:
                munmap(base, length)
            close_all(guard)
            free(guard)
            raise
        enlist(guard)
        self.guard = guard

    cdef void _release(self) noexcept:
        cdef Guard *guard = self.guard
        cdef uffdio_range_t span
        self.guard = NULL
        if guard == NULL:
            return
        with nogil:
            # The guardian first: it maps over pages, and after munmap the addresses may be somebody else's.
            eventfd_write(guard.stop, 1)
            pthread_join(guard.thread, NULL)
            # Unmap, then wake: a thread that (wrongly) still waits on a page gets SIGSEGV. Unregistering first would
            # show it zeros.
            munmap(guard.base, guard.size)
            span.start, span.len = <uint64_t> guard.base, guard.size
            ioctl(guard.uffd, UFFDIO_WAKE, &span)
            delist(guard)
            close_all(guard)
            free(guard)

    def begin_close(self):
        """Refuse new buffers from now on; False where the mapping is closed or closing already.

        Raises RegionBusy while buffers exist (nothing changes then), ForkedError.
        """
        if getpid() != self.creator:
            raise ForkedError("a region belongs to the process that made it; a forked child cannot close it")
        if self._closed or self._closing:
            return False
        if self._exports > 0:
            raise RegionBusy(f"the region is in use: arrays or memoryviews of it exist ({self._exports})")
        self._closing = True
        return True

    def unmap(self):
        """Join the guardian, unmap, close the descriptors. Again: does nothing. Raises RegionBusy while buffers
        exist, ForkedError.
        """
        if getpid() != self.creator:
            raise ForkedError("a region belongs to the process that made it; a forked child cannot close it")
        if self._exports > 0:
            raise RegionBusy(f"the region is in use: arrays or memoryviews of it exist ({self._exports})")
        self._closed = True
        self._release()

    def __dealloc__(self):
        # In a forked child the address may belong to another mapping by now, and the descriptor's requests act on
        # the parent.
        if self.guard != NULL and getpid() == self.creator:
            self._release()

    def __getbuffer__(self, Py_buffer *view, int flags):
        self._check()
        if self.guard == NULL:
            raise BufferError("the region is not mapped")
        self._shape[0] = <Py_ssize_t> self.guard.size
        self._strides[0] = 1
        view.obj = self
        view.buf = self.guard.base
        view.len = <Py_ssize_t> self.guard.size
        view.readonly = 0
        view.itemsize = 1
        view.format = NULL
        if flags & PyBUF_FORMAT:
            view.format = b"B"
        view.ndim = 1
        view.shape = self._shape if flags & PyBUF_ND else NULL
        view.strides = self._strides if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self._exports -= 1

    cdef Guard *_mapped(self) except NULL:
        self._check()
        if self.guard == NULL:
            raise UsageError("the region is not mapped")
        return self.guard

    @property
    def address(self):
        """Where the mapping begins in this process. This and the next four raise UsageError once closed."""
        return <uint64_t> self._mapped().base

    @property
    def size(self):
        """Bytes."""
        return self._mapped().size

    @property
    def fault_fd(self):
        """The userfaultfd; stays owned by the mapping."""
        return self._mapped().uffd

    @property
    def node_gone(self):
        """The node stayed away and the guardian answers the faults."""
        return load_acquire(&self._mapped().node_gone) != 0

    @property
    def pages_replaced(self):
        """Pages that the guardian marked as lost."""
        return load64(&self._mapped().replaced, RELAXED)

    @property
    def exports(self):
        """Buffers that exist."""
        return self._exports

    @property
    def closed(self):
        """Whether the memory was given back, or is just going. Never raises."""
        return bool(self._closed or self._closing)

    def touch(self, Py_ssize_t first, Py_ssize_t count):
        """Fault `count` pages in for writing from page `first` on, without the interpreter's lock; their bytes stay
        as they are.

        A lost page is SIGBUS: ask the node first. Raises ValueError outside the region, UsageError once closed, ForkedError.
        """
        cdef Guard *guard = self._mapped()
        cdef Py_ssize_t page
        if first < 0 or count < 0 or first > <Py_ssize_t> (guard.size // PAGE) - count:
            raise ValueError("pages outside the region")
        self._exports += 1               # nobody unmaps while the lock of the interpreter is released
        try:
            with nogil:
                for page in range(first, first + count):
                    touch_page(guard.base + page * PAGE)
        finally:
            self._exports -= 1
