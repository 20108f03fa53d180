"""POSIX threads: what the page path uses of them."""
from posix.time cimport timespec

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_rwlockattr_t:
        pass
    int PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP
    ctypedef unsigned long pthread_t
    int pthread_mutex_init(pthread_mutex_t *, void *) noexcept
    int pthread_mutex_destroy(pthread_mutex_t *) noexcept
    int pthread_mutex_lock(pthread_mutex_t *) noexcept
    int pthread_mutex_trylock(pthread_mutex_t *) noexcept
    int pthread_mutex_unlock(pthread_mutex_t *) noexcept
    int pthread_condattr_init(pthread_condattr_t *) noexcept
    int pthread_condattr_setclock(pthread_condattr_t *, int clock) noexcept
    int pthread_rwlockattr_init(pthread_rwlockattr_t *) noexcept
    int pthread_rwlockattr_setkind_np(pthread_rwlockattr_t *, int kind) noexcept
    int pthread_rwlock_init(pthread_rwlock_t *, pthread_rwlockattr_t *) noexcept
    int pthread_rwlock_destroy(pthread_rwlock_t *) noexcept
    int pthread_rwlock_rdlock(pthread_rwlock_t *) noexcept
    int pthread_rwlock_wrlock(pthread_rwlock_t *) noexcept
    int pthread_rwlock_unlock(pthread_rwlock_t *) noexcept
    int pthread_cond_init(pthread_cond_t *, pthread_condattr_t *) noexcept
    int pthread_cond_destroy(pthread_cond_t *) noexcept
    int pthread_cond_signal(pthread_cond_t *) noexcept
    int pthread_cond_broadcast(pthread_cond_t *) noexcept
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *) noexcept
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, timespec *) noexcept
    int pthread_create(pthread_t *, pthread_attr_t *, void *(*)(void *) noexcept nogil, void *) noexcept
    int pthread_join(pthread_t, void **) noexcept
    int pthread_setname_np(pthread_t, const char *) noexcept

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigemptyset(sigset_t *) noexcept
    int sigfillset(sigset_t *) noexcept
    int sigaddset(sigset_t *, int number) noexcept
    int SIG_SETMASK
    int SIG_UNBLOCK
    int SIGRTMAX
    int pthread_sigmask(int how, sigset_t *new, sigset_t *old) noexcept
    int pthread_kill(pthread_t, int number) noexcept
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        sigset_t sa_mask
        int sa_flags
    int sigaction(int number, const sigaction_t *new, sigaction_t *old) noexcept

cdef extern from "<time.h>" nogil:
    int CLOCK_MONOTONIC
    int CLOCK_MONOTONIC_COARSE
    int clock_gettime(int clock, timespec *) noexcept


cdef inline int cond_init_monotonic(pthread_cond_t *cond) noexcept nogil:
    """A condition whose timed waits read CLOCK_MONOTONIC, so that a clock change cannot stretch a deadline."""
    cdef pthread_condattr_t attr
    pthread_condattr_init(&attr)
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC)
    return pthread_cond_init(cond, &attr)


cdef inline int rwlock_init_fair(pthread_rwlock_t *lock) noexcept nogil:
    """A lock whose writers are not kept out by readers that come one after the other. Nobody may hold it for reading twice."""
    cdef pthread_rwlockattr_t attr
    pthread_rwlockattr_init(&attr)
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
    return pthread_rwlock_init(lock, &attr)


cdef inline unsigned long long now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <unsigned long long> t.tv_sec * 1000000000ull + <unsigned long long> t.tv_nsec


cdef inline unsigned long long coarse_ms() noexcept nogil:
    """Milliseconds, with the resolution of the timer tick: for ages, never for latencies."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t)
    return <unsigned long long> t.tv_sec * 1000ull + <unsigned long long> t.tv_nsec // 1000000ull


cdef inline int cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex, unsigned long long deadline_ns) noexcept nogil:
    cdef timespec t
    t.tv_sec = <long> (deadline_ns // 1000000000ull)
    t.tv_nsec = <long> (deadline_ns % 1000000000ull)
    return pthread_cond_timedwait(cond, mutex, &t)


cdef inline int start_thread(pthread_t *thread, void *(*body)(void *) noexcept nogil, void *argument, const char *name) noexcept nogil:
    """Start a native thread with every signal blocked (signals belong to Python's main thread)."""
    cdef sigset_t everything, before
    cdef int result
    sigfillset(&everything)
    pthread_sigmask(SIG_SETMASK, &everything, &before)
    result = pthread_create(thread, NULL, body, argument)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if result == 0:
        pthread_setname_np(thread[0], name)
    return result


cdef inline int need_thread(pthread_t *thread, void *(*body)(void *) noexcept nogil, void *argument, const char *name) except -1:
    """As start_thread; an OSError where the system has no more. It is a limit of its own, and not one of memory (ramster.limits)."""
    cdef int failure = start_thread(thread, body, argument, name)
    if failure:
        raise OSError(failure, f"cannot start the thread {name.decode()}")
    return 0


cdef inline int nudge_number() noexcept nogil:
    """The signal that makes a thread return from a system call, and does nothing else."""
    return SIGRTMAX - 2


cdef inline void on_nudge(int number) noexcept nogil:
    pass


cdef inline void take_nudges() noexcept nogil:
    """By a thread that may block in a call on somebody else's descriptor: nudge() makes that call fail with EINTR. No
    SA_RESTART, or it would go on."""
    cdef sigaction_t action
    cdef sigset_t ours
    sigemptyset(&action.sa_mask)
    action.sa_handler = on_nudge
    action.sa_flags = 0
    sigaction(nudge_number(), &action, NULL)
    sigemptyset(&ours)
    sigaddset(&ours, nudge_number())
    pthread_sigmask(SIG_UNBLOCK, &ours, NULL)


cdef inline void nudge(pthread_t thread) noexcept nogil:
    """Again and again until the thread has answered: one may arrive just before the call."""
    pthread_kill(thread, nudge_number())
