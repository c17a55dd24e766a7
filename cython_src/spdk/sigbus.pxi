# SIGBUS. SPDK's environment library installs a handler when it is loaded, and ignores faults that
# are not its own: a process that touches a truncated mapping would then loop for ever. The handler
# here lets SPDK try first (a removed drive's registers fault, and SPDK maps other memory there) and
# passes a repeated fault to the handler from before.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        void *si_addr
    struct sigaction_t "sigaction":
        void (*sa_sigaction)(int, siginfo_t *, void *) noexcept nogil
        void (*sa_handler)(int) noexcept nogil
        int sa_flags
    int SIGBUS
    int SA_SIGINFO
    int sigaction(int signum, const sigaction_t *action, sigaction_t *old)

cdef extern from "<unistd.h>" nogil:
    int gettid()

# The last fault of each thread, by the low bits of its thread ID.
DEF FAULTS = 256
cdef void *_faulted[FAULTS]
cdef sigaction_t _sigbus_before
cdef sigaction_t _sigbus_of_spdk


cdef void _on_sigbus(int signum, siginfo_t *info, void *context) noexcept nogil:
    cdef int slot = gettid() % FAULTS
    if _faulted[slot] != info.si_addr:
        _faulted[slot] = info.si_addr
        _sigbus_of_spdk.sa_sigaction(signum, info, context)
        return
    # SPDK did not resolve it: the instruction faulted again. It runs once more on return, and then
    # the handler from before (by default: the end of the process) gets the fault.
    sigaction(SIGBUS, &_sigbus_before, NULL)


def chain_sigbus(const unsigned char[::1] before not None):
    """Installs the handler above SPDK's; ``before``: the ``struct sigaction`` from before SPDK was
    loaded."""
    cdef sigaction_t ours
    if <size_t>before.shape[0] < sizeof(sigaction_t):
        raise ValueError("not a struct sigaction")
    memcpy(&_sigbus_before, &before[0], sizeof(sigaction_t))
    sigaction(SIGBUS, NULL, &_sigbus_of_spdk)
    memcpy(&ours, &_sigbus_of_spdk, sizeof(sigaction_t))
    ours.sa_sigaction = _on_sigbus
    ours.sa_flags = SA_SIGINFO
    sigaction(SIGBUS, &ours, NULL)
