# Kernel interfaces of the native modules: userfaultfd, memfd, shared memory, eventfd, poll, epoll.
#
# userfaultfd is declared here and not taken from <linux/userfaultfd.h>: distribution headers are older than the
# kernels that we run on (Debian 12 ships 6.1 headers, which lack UFFDIO_POISON and UFFDIO_CONTINUE_MODE_WP). The
# layouts are kernel ABI and cannot change; the assertions keep us honest. Whether the running kernel knows a request
# is probed, never assumed.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport off_t, pid_t


cdef extern from *:
    """
    #ifndef RAMSTER_LINUX_ABI
    #define RAMSTER_LINUX_ABI
    #include <stdint.h>
    #include <assert.h>

    typedef struct { uint64_t api, features, ioctls; } ramster_uffdio_api;
    typedef struct { uint64_t start, len; } ramster_uffdio_range;
    typedef struct { ramster_uffdio_range range; uint64_t mode, ioctls; } ramster_uffdio_register;
    typedef struct { uint64_t dst, src, len, mode; int64_t copy; } ramster_uffdio_copy;
    typedef struct { ramster_uffdio_range range; uint64_t mode; int64_t zeropage; } ramster_uffdio_zeropage;
    typedef struct { ramster_uffdio_range range; uint64_t mode; } ramster_uffdio_writeprotect;
    typedef struct { ramster_uffdio_range range; uint64_t mode; int64_t mapped; } ramster_uffdio_continue;
    typedef struct { ramster_uffdio_range range; uint64_t mode; int64_t updated; } ramster_uffdio_poison;
    /* struct uffd_msg with only the pagefault arm of its union; the kernel always hands over 32 bytes */
    typedef struct __attribute__((packed)) {
        uint8_t event, reserved1; uint16_t reserved2; uint32_t reserved3;
        uint64_t flags, address; uint32_t ptid, reserved4;
    } ramster_uffd_msg;
    static_assert(sizeof(ramster_uffd_msg) == 32, "struct uffd_msg is 32 bytes");

    #define RAMSTER_UFFD_API 0xAAULL
    /* _IOC(direction, 0xAA, number, size): direction 3 = _IOWR, 2 = _IOR, 0 = _IO */
    #define RAMSTER_UFFD_IOC(dir, nr, size) \\
        (((unsigned long)(dir) << 30) | ((unsigned long)(size) << 16) | (0xAAUL << 8) | (unsigned long)(nr))
    #define RAMSTER_USERFAULTFD_IOC_NEW RAMSTER_UFFD_IOC(0, 0x00, 0)
    #define RAMSTER_UFFDIO_API          RAMSTER_UFFD_IOC(3, 0x3F, sizeof(ramster_uffdio_api))
    #define RAMSTER_UFFDIO_REGISTER     RAMSTER_UFFD_IOC(3, 0x00, sizeof(ramster_uffdio_register))
    #define RAMSTER_UFFDIO_UNREGISTER   RAMSTER_UFFD_IOC(2, 0x01, sizeof(ramster_uffdio_range))
    #define RAMSTER_UFFDIO_WAKE         RAMSTER_UFFD_IOC(2, 0x02, sizeof(ramster_uffdio_range))
    #define RAMSTER_UFFDIO_COPY         RAMSTER_UFFD_IOC(3, 0x03, sizeof(ramster_uffdio_copy))
    #define RAMSTER_UFFDIO_ZEROPAGE     RAMSTER_UFFD_IOC(3, 0x04, sizeof(ramster_uffdio_zeropage))
    #define RAMSTER_UFFDIO_WRITEPROTECT RAMSTER_UFFD_IOC(3, 0x06, sizeof(ramster_uffdio_writeprotect))
    #define RAMSTER_UFFDIO_CONTINUE     RAMSTER_UFFD_IOC(3, 0x07, sizeof(ramster_uffdio_continue))
    #define RAMSTER_UFFDIO_POISON       RAMSTER_UFFD_IOC(3, 0x08, sizeof(ramster_uffdio_poison))
    /* literal values, as every 64-bit Linux has them */
    static_assert(RAMSTER_UFFDIO_API == 0xC018AA3FUL, "UFFDIO_API");
    static_assert(RAMSTER_UFFDIO_REGISTER == 0xC020AA00UL, "UFFDIO_REGISTER");
    static_assert(RAMSTER_UFFDIO_UNREGISTER == 0x8010AA01UL, "UFFDIO_UNREGISTER");
    static_assert(RAMSTER_UFFDIO_WAKE == 0x8010AA02UL, "UFFDIO_WAKE");
    static_assert(RAMSTER_UFFDIO_COPY == 0xC028AA03UL, "UFFDIO_COPY");
    static_assert(RAMSTER_UFFDIO_ZEROPAGE == 0xC020AA04UL, "UFFDIO_ZEROPAGE");
    static_assert(RAMSTER_UFFDIO_WRITEPROTECT == 0xC018AA06UL, "UFFDIO_WRITEPROTECT");
    static_assert(RAMSTER_UFFDIO_CONTINUE == 0xC020AA07UL, "UFFDIO_CONTINUE");
    static_assert(RAMSTER_UFFDIO_POISON == 0xC020AA08UL, "UFFDIO_POISON");

    /* A write fault that changes no byte and loses no other thread's store; volatile, because a compiler may turn an
       idempotent atomic into a load. */
    static inline void ramster_touch(void *address)
    {
        (void)__atomic_fetch_or((volatile uint8_t *)address, (uint8_t)0, __ATOMIC_RELAXED);
    }

    static inline int ramster_load_acquire(const int *from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
    static inline void ramster_store_release(int *to, int value) { __atomic_store_n(to, value, __ATOMIC_RELEASE); }

    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    #ifndef MFD_NOEXEC_SEAL
    #define MFD_NOEXEC_SEAL 0x0008U
    #endif
    #endif
    """
    ctypedef struct uffdio_api_t "ramster_uffdio_api":
        uint64_t api
        uint64_t features
        uint64_t ioctls

    ctypedef struct uffdio_range_t "ramster_uffdio_range":
        uint64_t start
        uint64_t len

    ctypedef struct uffdio_register_t "ramster_uffdio_register":
        uffdio_range_t range
        uint64_t mode
        uint64_t ioctls

    ctypedef struct uffdio_copy_t "ramster_uffdio_copy":
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy

    ctypedef struct uffdio_zeropage_t "ramster_uffdio_zeropage":
        uffdio_range_t range
        uint64_t mode
        int64_t zeropage

    ctypedef struct uffdio_writeprotect_t "ramster_uffdio_writeprotect":
        uffdio_range_t range
        uint64_t mode

    ctypedef struct uffdio_continue_t "ramster_uffdio_continue":
        uffdio_range_t range
        uint64_t mode
        int64_t mapped

    ctypedef struct uffdio_poison_t "ramster_uffdio_poison":
        uffdio_range_t range
        uint64_t mode
        int64_t updated

    # one event as read() delivers it; `address` and `flags` mean something only where event == UFFD_EVENT_PAGEFAULT
    ctypedef struct uffd_msg_t "ramster_uffd_msg":
        uint8_t event
        uint64_t flags
        uint64_t address
        uint32_t ptid

    void touch_page "ramster_touch" (void *address) noexcept nogil
    int load_acquire "ramster_load_acquire" (const int *source) noexcept nogil
    void store_release "ramster_store_release" (int *target, int value) noexcept nogil

    const uint64_t UFFD_API "RAMSTER_UFFD_API"
    # on /dev/userfaultfd; its argument: the flags of the syscall
    const unsigned long USERFAULTFD_IOC_NEW "RAMSTER_USERFAULTFD_IOC_NEW"
    const unsigned long UFFDIO_API "RAMSTER_UFFDIO_API"
    const unsigned long UFFDIO_REGISTER "RAMSTER_UFFDIO_REGISTER"
    const unsigned long UFFDIO_UNREGISTER "RAMSTER_UFFDIO_UNREGISTER"
    const unsigned long UFFDIO_WAKE "RAMSTER_UFFDIO_WAKE"
    const unsigned long UFFDIO_COPY "RAMSTER_UFFDIO_COPY"
    const unsigned long UFFDIO_ZEROPAGE "RAMSTER_UFFDIO_ZEROPAGE"
    const unsigned long UFFDIO_WRITEPROTECT "RAMSTER_UFFDIO_WRITEPROTECT"
    const unsigned long UFFDIO_CONTINUE "RAMSTER_UFFDIO_CONTINUE"
    const unsigned long UFFDIO_POISON "RAMSTER_UFFDIO_POISON"


cdef enum:
    # uffd_msg_t.event
    UFFD_EVENT_PAGEFAULT = 0x12
    UFFD_EVENT_FORK = 0x13
    UFFD_EVENT_REMAP = 0x14
    UFFD_EVENT_REMOVE = 0x15
    UFFD_EVENT_UNMAP = 0x16
    # uffd_msg_t.flags of a page fault
    UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
    UFFD_PAGEFAULT_FLAG_WP = 1 << 1
    UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2
    # uffdio_api_t.features; in brackets the kernel that brought it
    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0          # 5.7
    UFFD_FEATURE_EVENT_FORK = 1 << 1
    UFFD_FEATURE_EVENT_REMAP = 1 << 2
    UFFD_FEATURE_EVENT_REMOVE = 1 << 3
    UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
    UFFD_FEATURE_MISSING_SHMEM = 1 << 5              # 4.11
    UFFD_FEATURE_EVENT_UNMAP = 1 << 6
    UFFD_FEATURE_SIGBUS = 1 << 7
    UFFD_FEATURE_THREAD_ID = 1 << 8
    UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
    UFFD_FEATURE_MINOR_SHMEM = 1 << 10               # 5.14
    UFFD_FEATURE_EXACT_ADDRESS = 1 << 11             # 5.18
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12        # 5.19
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13            # 6.4
    UFFD_FEATURE_POISON = 1 << 14                    # 6.6
    UFFD_FEATURE_WP_ASYNC = 1 << 15                  # 6.7
    UFFD_FEATURE_MOVE = 1 << 16                      # 6.8
    # uffdio_register_t.mode
    UFFDIO_REGISTER_MODE_MISSING = 1 << 0
    UFFDIO_REGISTER_MODE_WP = 1 << 1
    UFFDIO_REGISTER_MODE_MINOR = 1 << 2
    # bit numbers of the requests in uffdio_register_t.ioctls (1 << number)
    UFFDIO_NR_WAKE = 0x02
    UFFDIO_NR_COPY = 0x03
    UFFDIO_NR_ZEROPAGE = 0x04
    UFFDIO_NR_MOVE = 0x05
    UFFDIO_NR_WRITEPROTECT = 0x06
    UFFDIO_NR_CONTINUE = 0x07
    UFFDIO_NR_POISON = 0x08
    # modes
    UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
    UFFDIO_COPY_MODE_WP = 1 << 1
    UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0
    UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1
    UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0
    UFFDIO_CONTINUE_MODE_WP = 1 << 1                 # 6.4 (with WP_UNPOPULATED)
    UFFDIO_POISON_MODE_DONTWAKE = 1 << 0
    # flags of the userfaultfd syscall; O_CLOEXEC and O_NONBLOCK may be added
    UFFD_USER_MODE_ONLY = 1


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<sys/syscall.h>" nogil:
    const long SYS_userfaultfd
    const long SYS_pidfd_open
    const long SYS_gettid
    const long SYS_rt_tgsigqueueinfo


cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_SET
        SEEK_END
        SEEK_DATA
        SEEK_HOLE
        STDERR_FILENO
    long syscall(long number, ...)
    ssize_t read(int fd, void *buffer, size_t size)
    ssize_t write(int fd, const void *buffer, size_t size)
    ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
    ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset)
    off_t lseek(int fd, off_t offset, int whence)
    int ftruncate(int fd, off_t size)
    int dup(int fd)
    int close(int fd)
    pid_t getpid()
    int gettid()
    long sysconf(int name)
    int SC_PAGESIZE "_SC_PAGESIZE"


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv(int fd, const iovec *parts, int count, off_t offset)
    ssize_t pwritev(int fd, const iovec *parts, int count, off_t offset)


cdef extern from "<fcntl.h>" nogil:
    enum:
        O_RDONLY
        O_RDWR
        O_CREAT
        O_EXCL
        O_TMPFILE
        O_CLOEXEC
        O_NONBLOCK
        O_DIRECT
        F_DUPFD_CLOEXEC
        F_GETFL
        F_SETFL
        F_ADD_SEALS
        F_GET_SEALS
        F_SEAL_SEAL
        F_SEAL_SHRINK
        F_SEAL_GROW
        F_SEAL_WRITE
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_ZERO_RANGE
    int open(const char *path, int flags, ...)
    int fcntl(int fd, int command, ...)
    int fallocate(int fd, int mode, off_t offset, off_t size)
    int posix_fallocate(int fd, off_t offset, off_t size)
    enum:
        POSIX_FADV_DONTNEED
        SYNC_FILE_RANGE_WRITE
    int posix_fadvise(int fd, off_t offset, off_t size, int advice)
    int sync_file_range(int fd, off_t offset, off_t size, unsigned int flags)


cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_FIXED
        MAP_FIXED_NOREPLACE
        MAP_NORESERVE
        MAP_POPULATE
        MADV_DONTFORK
        MADV_DONTDUMP
        MADV_DONTNEED
        MADV_REMOVE
        MADV_WILLNEED
        MADV_HUGEPAGE
        MADV_NOHUGEPAGE
        MADV_POPULATE_READ
        MADV_POPULATE_WRITE
        MCL_CURRENT
        MCL_FUTURE
        MCL_ONFAULT
        MLOCK_ONFAULT
        MFD_CLOEXEC
        MFD_ALLOW_SEALING
        MFD_NOEXEC_SEAL
    void *MAP_FAILED
    void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
    int munmap(void *address, size_t size)
    int mprotect(void *address, size_t size, int protection)
    int madvise(void *address, size_t size, int advice)
    int mlock(const void *address, size_t size)
    int mlock2(const void *address, size_t size, unsigned int flags)
    int munlock(const void *address, size_t size)
    int mlockall(int flags)
    int mincore(void *address, size_t size, unsigned char *vector)
    int memfd_create(const char *name, unsigned int flags)


cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK
        EFD_SEMAPHORE
    int eventfd(unsigned int initial, int flags)
    int eventfd_read(int fd, uint64_t *value)
    int eventfd_write(int fd, uint64_t value)


cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN
        POLLOUT
        POLLERR
        POLLHUP
        POLLNVAL
        POLLRDHUP
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout_ms)


cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
        EPOLLIN
        EPOLLOUT
        EPOLLERR
        EPOLLHUP
        EPOLLRDHUP
        EPOLLET
        EPOLLONESHOT
        EPOLLEXCLUSIVE
    ctypedef union epoll_data_t:
        void *ptr
        int fd
        uint32_t u32
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int count, int timeout_ms)


cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_UNIX
        SOCK_SEQPACKET
        SOCK_CLOEXEC
        SOCK_NONBLOCK
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        SHUT_RDWR
        SOL_SOCKET
        SO_SNDBUF
        SO_RCVBUF
    int socketpair(int domain, int type, int protocol, int *fds)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    int shutdown(int fd, int how)
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int setsockopt(int fd, int level, int option, const void *value, unsigned int size)


cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass
    int sched_getaffinity(pid_t thread, size_t size, cpu_set_t *cpus)
    int sched_setaffinity(pid_t thread, size_t size, const cpu_set_t *cpus)
    void CPU_AND(cpu_set_t *to, const cpu_set_t *one, const cpu_set_t *other)
    int CPU_EQUAL(const cpu_set_t *one, const cpu_set_t *other)
    int CPU_COUNT(const cpu_set_t *cpus)


cdef extern from "<signal.h>" nogil:
    enum:
        SIG_BLOCK
        SIG_SETMASK
        SIGSEGV
        SA_SIGINFO
        SA_ONSTACK
    void (*SIG_IGN)(int) noexcept nogil
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        int si_code            # above 0: by the kernel
        void *si_addr
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        void (*sa_sigaction)(int, siginfo_t *, void *) noexcept nogil
        sigset_t sa_mask
        int sa_flags
    int sigfillset(sigset_t *set)
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
    int sigaction(int number, const sigaction_t *new, sigaction_t *old) noexcept


cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_attr_t:
        pass
    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                       void *(*start)(void *) noexcept nogil, void *argument)
    pthread_t pthread_self()
    int pthread_join(pthread_t thread, void **result)
    int pthread_setname_np(pthread_t thread, const char *name)
    int pthread_attr_init(pthread_attr_t *attributes)
    int pthread_attr_setstacksize(pthread_attr_t *attributes, size_t size)
    int pthread_attr_destroy(pthread_attr_t *attributes)
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)
