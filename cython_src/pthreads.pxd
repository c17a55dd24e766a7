# The part of POSIX threads that the extensions use; declarations only.
from posix.time cimport clock_gettime, clockid_t, timespec

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    ctypedef unsigned long pthread_t

    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, int)
    int pthread_condattr_destroy(pthread_condattr_t *)
    int pthread_cond_init(pthread_cond_t *, const pthread_condattr_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_create(pthread_t *, const void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_join(pthread_t, void **)
    int pthread_detach(pthread_t)
    pthread_t pthread_self()
    int pthread_getcpuclockid(pthread_t, clockid_t *)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t *)
    int SIG_SETMASK
    int pthread_sigmask(int how, const sigset_t *new, sigset_t *old)

cdef extern from "<time.h>" nogil:
    int CLOCK_MONOTONIC


cdef inline void init_cond(pthread_cond_t *cond) noexcept nogil:
    # Monotonic, so that setting the wall clock changes no wait.
    cdef pthread_condattr_t attributes
    pthread_condattr_init(&attributes)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    pthread_cond_init(cond, &attributes)
    pthread_condattr_destroy(&attributes)


cdef inline int wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex,
                           unsigned long long when_ns) noexcept nogil:
    cdef timespec when
    when.tv_sec = <long>(when_ns // 1000000000)
    when.tv_nsec = <long>(when_ns % 1000000000)
    return pthread_cond_timedwait(cond, mutex, &when)


cdef inline int start_thread(pthread_t *thread, void *(*body)(void *) noexcept nogil,
                             void *argument) noexcept nogil:
    # All signals blocked: Python's handlers have to run in Python's threads.
    cdef sigset_t every, before
    cdef int rc
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &before)
    rc = pthread_create(thread, NULL, body, argument)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return rc


cdef inline clockid_t own_cpu_clock() noexcept nogil:
    """The clock of this thread's CPU time, which other threads may read."""
    cdef clockid_t clock = 0
    pthread_getcpuclockid(pthread_self(), &clock)
    return clock


cdef inline unsigned long long cpu_clock_ns(clockid_t clock) noexcept nogil:
    """What it shows; 0 once its thread has ended."""
    cdef timespec at
    if clock_gettime(clock, &at):
        return 0
    return <unsigned long long>at.tv_sec * 1000000000 + <unsigned long long>at.tv_nsec
