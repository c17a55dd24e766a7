# SPDK's environment, on DPDK: set up once per process.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

cdef extern from "<stdarg.h>" nogil:
    ctypedef struct va_list:
        pass

cdef extern from "<stdio.h>" nogil:
    ctypedef struct FILE:
        pass
    FILE *fdopen(int fd, const char *mode)
    void setlinebuf(FILE *)
    int vsnprintf(char *, size_t, const char *format, va_list)
    int snprintf(char *, size_t, const char *format, ...)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *, size_t)
    int rmdir(const char *path)
    int getpid()

cdef extern from "<spdk/log.h>" nogil:
    ctypedef void (*logfunc)(int level, const char *file, const int line, const char *func,
                             const char *format, va_list arguments) noexcept nogil
    void spdk_log_open(logfunc)

cdef extern from "<rte_log.h>" nogil:
    int rte_openlog_stream(FILE *)


cdef extern from "<rte_eal.h>" nogil:
    const char *rte_eal_get_runtime_dir()


cdef int _log_fd = -1


cdef void _log(int level, const char *file, const int line, const char *func, const char *format,
               va_list arguments) noexcept nogil:
    # One write per message, below PIPE_BUF and so atomic: lines do not mix.
    cdef char text[2048]
    cdef int used = snprintf(text, sizeof(text), "%d ", level)
    used += vsnprintf(text + used, sizeof(text) - used, format, arguments)
    write(_log_fd, text, min(<size_t>used, sizeof(text) - 1))


cdef struct Environment:
    spdk_env_opts opts
    int rc


cdef void *_set_up(void *argument) noexcept nogil:
    cdef Environment *e = <Environment *>argument
    e.rc = spdk_env_init(&e.opts)
    return NULL


def set_up_environment(str core not None, *, int memory_mib, bint hugepages, str arguments not None,
                       bint pci, int log_fd):
    """Sets up DPDK's memory and PCI access. Blocks without the GIL, for seconds at most.

    DPDK pins the calling thread, and threads started later would inherit that, so this runs in
    its own thread.

    Args:
        core: Core mask or list.
        memory_mib: Memory reserved at once; -1: as needed.
        hugepages: Whether the memory is on hugepages.
        arguments: More DPDK arguments.
        pci: Whether to use PCI.
        log_fd: Where messages go.

    Returns:
        0 or -errno.
    """
    global _announces, _log_fd
    cdef Environment e
    cdef pthread_t thread
    cdef bytes core_bytes = core.encode(), argument_bytes = arguments.encode()
    cdef FILE *stream
    memset(&e, 0, sizeof(e))
    e.opts.opts_size = sizeof(spdk_env_opts)
    spdk_env_opts_init(&e.opts)
    e.opts.name = "spdk_kv"
    e.opts.core_mask = core_bytes
    e.opts.shm_id = -1
    e.opts.mem_size = memory_mib
    e.opts.no_huge = not hugepages
    # One file per segment (nameless with --in-memory), as vfio-user needs it.
    e.opts.hugepage_single_segments = hugepages
    if hugepages:
        # Without hugepages SPDK sets this itself, and DPDK exits on a repeated option.
        e.opts.iova_mode = "va"
    e.opts.no_pci = not pci
    if arguments:
        e.opts.env_context = <char *>argument_bytes
    _announces = memory_mib < 0
    _log_fd = log_fd
    spdk_log_open(_log)
    stream = fdopen(log_fd, "w")
    if stream != NULL:
        setlinebuf(stream)
        rte_openlog_stream(stream)
    with nogil:
        if start_thread(&thread, _set_up, &e):
            e.rc = -EAGAIN
        else:
            pthread_join(thread, NULL)
        if e.rc == 0:
            # DPDK's folder for data shared between processes; nothing is shared, so it is empty.
            rmdir(rte_eal_get_runtime_dir())
    return e.rc


def set_log_level(int level):
    """Sets what SPDK prints: 0 errors, 1 warnings, 2 notices, 3 info, 4 debug; -1 nothing."""
    spdk_log_set_print_level(<spdk_log_level>level)


def transport_available(str name not None):
    """Whether this SPDK has the transport (PCIE, TCP, VFIOUSER)."""
    return bool(spdk_nvme_transport_available_by_name(name.encode()))


@cython.no_gc_clear
cdef class DmaRegion:
    """SPDK memory, which every controller reaches: ``address``, ``nbytes``; a writable buffer.
    Freed with its last reference. Raises MemoryError."""
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef int _pid

    def __cinit__(self, size_t nbytes):
        cdef void *at
        cdef size_t rounded = (nbytes + 4095) & ~<size_t>4095
        with nogil:
            _hold_for_memory()
            at = spdk_zmalloc(rounded, 4096, NULL, SPDK_ENV_NUMA_ID_ANY,
                              SPDK_MALLOC_DMA | SPDK_MALLOC_SHARE)
            _let_go_for_memory()
        if at == NULL:
            raise MemoryError(f"SPDK cannot allocate {nbytes} bytes of memory")
        self.address = <size_t>at
        self._pid = getpid()
        self.nbytes = rounded

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.address, self.nbytes, 0, flags)

    def __dealloc__(self):
        # In a forked child the memory is still the parent's.
        if self.address and self._pid == getpid():
            with nogil:
                _hold_for_memory()
                spdk_free(<void *>self.address)
                _let_go_for_memory()


def register_memory(size_t address, size_t nbytes):
    """Registers memory with SPDK, so that controllers reach it. Returns 0 or -errno (-EBUSY:
    overlap)."""
    cdef int rc
    with nogil:
        _hold()
        rc = spdk_mem_register(<void *>address, nbytes)
        _let_go()
    return rc


def unregister_memory(size_t address, size_t nbytes):
    """Undoes :func:`register_memory`. Returns 0 or -errno."""
    cdef int rc
    with nogil:
        _hold()
        rc = spdk_mem_unregister(<void *>address, nbytes)
        _let_go()
    return rc
