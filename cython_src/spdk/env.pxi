# SPDK's environment (DPDK underneath): set up once per process, never again.

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

# Held by whoever takes or gives SPDK's memory, and by whoever speaks to a controller's registers or
# connects to one: SPDK tells every vfio-user controller of new memory over the socket that also
# carries its registers, and does not keep two threads from taking each other's answers.
cdef pthread_mutex_t _socket
pthread_mutex_init(&_socket, NULL)


cdef void _log(int level, const char *file, const int line, const char *func, const char *format,
               va_list arguments) noexcept nogil:
    # One write per message: it is at most a pipe's atomic size, so lines do not mix.
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
    """Sets DPDK's memory and PCI access up. Blocks, without the GIL; for seconds at most.

    It pins the calling thread to ``core`` (a core mask or list), and threads started later would
    inherit that, so it runs in a thread of its own. ``memory_mib``: set aside at once (-1: as
    needed). ``arguments``: more of DPDK's. ``log_fd``: where DPDK's messages go. Returns 0 or
    -errno.
    """
    global _log_fd
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
    # One file (a nameless one, with --in-memory) per segment: what vfio-user can hand over.
    e.opts.hugepage_single_segments = hugepages
    if hugepages:
        # Without them SPDK says so itself, and DPDK ends the process over an option given twice.
        e.opts.iova_mode = "va"
    e.opts.no_pci = not pci
    if arguments:
        e.opts.env_context = <char *>argument_bytes
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
            # DPDK makes a folder for what processes share; nothing is shared, so it is empty.
            rmdir(rte_eal_get_runtime_dir())
    return e.rc


def set_log_level(int level):
    """What SPDK prints: 0 errors, 1 warnings, 2 notices, 3 info, 4 debug; -1 nothing."""
    spdk_log_set_print_level(<spdk_log_level>level)


def transport_available(str name not None):
    """Whether this SPDK has the transport (PCIE, TCP, VFIOUSER)."""
    return bool(spdk_nvme_transport_available_by_name(name.encode()))


@cython.no_gc_clear
cdef class DmaRegion:
    """Memory of SPDK's own, which every controller reaches: ``address``, ``nbytes``; a writable
    buffer. Freed with its last reference. MemoryError where SPDK has none left."""
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef int _pid

    def __cinit__(self, size_t nbytes):
        cdef void *at
        cdef size_t rounded = (nbytes + 4095) & ~<size_t>4095
        with nogil:
            pthread_mutex_lock(&_socket)
            at = spdk_zmalloc(rounded, 4096, NULL, SPDK_ENV_NUMA_ID_ANY,
                              SPDK_MALLOC_DMA | SPDK_MALLOC_SHARE)
            pthread_mutex_unlock(&_socket)
        if at == NULL:
            raise MemoryError(f"SPDK has no {nbytes} bytes of memory left")
        self.address = <size_t>at
        self._pid = getpid()
        self.nbytes = rounded

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.address, self.nbytes, 0, flags)

    def __dealloc__(self):
        # A forked child has a copy of the books only; the memory is its parent's.
        if self.address and self._pid == getpid():
            with nogil:
                pthread_mutex_lock(&_socket)
                spdk_free(<void *>self.address)
                pthread_mutex_unlock(&_socket)


def register_memory(size_t address, size_t nbytes):
    """Makes foreign memory reachable for controllers. Returns 0 or -errno (-EBUSY: overlaps)."""
    cdef int rc
    with nogil:
        pthread_mutex_lock(&_socket)
        rc = spdk_mem_register(<void *>address, nbytes)
        pthread_mutex_unlock(&_socket)
    return rc


def unregister_memory(size_t address, size_t nbytes):
    """Takes that back. Returns 0 or -errno."""
    cdef int rc
    with nogil:
        pthread_mutex_lock(&_socket)
        rc = spdk_mem_unregister(<void *>address, nbytes)
        pthread_mutex_unlock(&_socket)
    return rc
