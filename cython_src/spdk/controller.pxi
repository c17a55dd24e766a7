# A controller, its namespaces, and the thread that polls its admin queue.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

cdef extern from "<stdlib.h>" nogil:
    int atexit(void (*)() noexcept nogil)

# Between two polls of the admin queue: keep-alives, asynchronous events, removal.
DEF ADMIN_INTERVAL_NS = 50_000_000
# How long the process's exit waits for drivers to park.
DEF EXIT_NS = 1_000_000_000


# Requests that a command may be split into.
DEF MOST_PARTS = 1 << 20
# Between two looks of a Python thread that waits for a controller.
DEF WAIT_US = 200
# How long a PCIe drive may take to become ready: CAP.TO is 127.5 s at most (NVMe Base 2.0, 3.1.3.1);
# and what it is asked meanwhile.
DEF PCIE_CONNECT_MS = 130_000
DEF PCIE_ADMIN_MS = 30_000


cdef void _on_removal(void *context, spdk_nvme_ctrlr *ctrlr) noexcept nogil:
    cdef Admin *a = <Admin *>context
    if a.pci != NULL:
        a.gone = True
    else:
        _request_reset(a, -ENODEV)


cdef void _poll_controller(Admin *a) noexcept nogil:
    """Polls the admin queue and checks that the controller is still there. With `use` held."""
    if a.ctrlr != NULL:
        if a.pci != NULL and not a.out:
            _check_removal(a)
        _poll_admin_queue(a)
        if a.by_register and _is_down(a.line) and not a.gone:
            _request_reset(a, -ENODEV)
    if a.reset_requested and not a.gone:
        _rebuild(a, True)


cdef void *_admin_main(void *argument) noexcept nogil:
    cdef Admin *a = <Admin *>argument
    pthread_mutex_lock(&a.mutex)
    while not a.stopping:
        pthread_mutex_unlock(&a.mutex)
        pthread_mutex_lock(&a.use)
        _poll_controller(a)
        pthread_mutex_unlock(&a.use)
        pthread_mutex_lock(&a.mutex)
        if not a.stopping and not (a.reset_requested and not a.gone):
            wait_until(&a.work, &a.mutex, skv_now_ns() + ADMIN_INTERVAL_NS)
    pthread_mutex_unlock(&a.mutex)
    return NULL


cdef void _stop(Admin *a) noexcept nogil:
    """Ends the controller's thread."""
    pthread_mutex_lock(&a.mutex)
    a.stopping = True
    pthread_cond_broadcast(&a.work)
    pthread_mutex_unlock(&a.mutex)
    pthread_join(a.thread, NULL)


# The open controllers of this process.
cdef Admin *_admins
cdef pthread_mutex_t _admins_mutex
pthread_mutex_init(&_admins_mutex, NULL)
cdef bint _at_exit_is_set
cdef int _exit_pid


cdef void _admins_add(Admin *a) noexcept nogil:
    global _admins, _at_exit_is_set, _exit_pid
    pthread_mutex_lock(&_admins_mutex)
    a.next = _admins
    _admins = a
    if not _at_exit_is_set:
        _at_exit_is_set = True
        _exit_pid = getpid()
        atexit(_stop_all)
    pthread_mutex_unlock(&_admins_mutex)


cdef void _admins_remove(Admin *a) noexcept nogil:
    cdef Admin **at = &_admins
    pthread_mutex_lock(&_admins_mutex)
    while at[0] != NULL and at[0] != a:
        at = &at[0].next
    if at[0] != NULL:
        at[0] = a.next
    pthread_mutex_unlock(&_admins_mutex)


cdef void _stop_all() noexcept nogil:
    """At the process's exit: stops the threads of controllers left open, and the drivers of their
    pairs, because SPDK's clean-up frees what they use."""
    cdef Admin *a
    cdef uint64_t until_ns = skv_now_ns() + EXIT_NS
    if getpid() != _exit_pid:
        return  # a forked child has none of the threads
    pthread_mutex_lock(&_admins_mutex)
    a = _admins
    while a != NULL:
        _stop(a)
        pthread_mutex_lock(&a.mutex)
        a.fate = -ENODEV
        a.resetting = True  # for good
        while not _all_parked(a) and skv_now_ns() < until_ns:
            wait_until(&a.state_changed, &a.mutex, skv_now_ns() + PARKING_NS)
        pthread_mutex_unlock(&a.mutex)
        a = a.next
    pthread_mutex_unlock(&_admins_mutex)


cdef int _lock_use(Admin *a, uint64_t until_ns) noexcept nogil:
    """0, or -ETIMEDOUT: the controller's thread waits for it all the time."""
    while pthread_mutex_trylock(&a.use):
        if skv_now_ns() > until_ns:
            return -ETIMEDOUT
        usleep(WAIT_US)
    return 0


@cython.no_gc_clear
cdef class Controller:
    """An NVMe controller, connected by an SPDK transport ID (``trtype:PCIe traddr:0000:01:00.0``).

    Blocks without the GIL while it connects, for ``connect_timeout_s`` at most. Raises OSError if
    none answers (ETIMEDOUT: something is there and does not), and ValueError for an invalid
    transport ID.
    """
    cdef Admin _a
    cdef bint _open
    cdef int _pid
    cdef readonly str transport_id

    def __cinit__(self, str transport_id not None, *, double connect_timeout_s=10.0):
        cdef Admin *a = &self._a
        cdef bytes text = transport_id.encode()
        cdef const char *chars = text
        cdef spdk_nvme_ctrlr_opts *opts
        cdef int rc
        self.transport_id = transport_id
        if spdk_nvme_transport_id_parse(&a.trid, chars):
            raise ValueError(f"not a transport ID: {transport_id!r}")
        opts = &a.attempt.opts
        spdk_nvme_ctrlr_get_default_ctrlr_opts(opts, sizeof(opts[0]))
        opts.fabrics_connect_timeout_us = <uint64_t>(connect_timeout_s * 1e6)
        # SPDK's own waits for an answer, of which there are a few that this can't do in steps.
        opts.admin_timeout_ms = <uint32_t>(connect_timeout_s * 1e3)
        # Each pair has its own; SPDK takes the controller's for what may be waited for, and calls a
        # command invalid that has more parts than that while others have the pair's.
        opts.io_queue_requests = MOST_PARTS
        a.patience_ns = a.connect_ns = <uint64_t>(connect_timeout_s * 1e9)
        if "PCIe" in transport_id:
            opts.admin_timeout_ms = PCIE_ADMIN_MS
            a.connect_ns = _ms(PCIE_CONNECT_MS)
        a.by_register = "VFIOUSER" in transport_id
        a.line = -1
        with nogil:
            rc = _connect(a, skv_now_ns() + a.connect_ns)
        if rc:
            raise OSError(-rc, f"no NVMe controller answers at {transport_id}")
        memcpy(a.serial, spdk_nvme_ctrlr_get_data(a.ctrlr).sn, sizeof(a.serial))
        pthread_mutex_init(&a.use, NULL)
        pthread_mutex_init(&a.mutex, NULL)
        init_cond(&a.work)
        init_cond(&a.state_changed)
        if start_thread(&a.thread, _admin_main, a):
            _detach(a)
            raise MemoryError("the admin queue's thread could not be started")
        self._pid = getpid()
        _admins_add(a)
        self._open = True

    cdef int _use(self, uint64_t until_ns=0) except -1:
        """Locks out the controller's thread until `_used`. OSError if the controller is lost, or
        if that thread waits for it too long."""
        cdef int rc
        with nogil:
            rc = _lock_use(&self._a, until_ns or skv_now_ns() + self._a.patience_ns)
        if rc:
            raise OSError(ETIMEDOUT, f"the NVMe controller at {self.transport_id} does not answer")
        if self._open and self._a.ctrlr != NULL:
            return 0
        pthread_mutex_unlock(&self._a.use)
        raise OSError(ENODEV, f"no NVMe controller answers at {self.transport_id}")

    cdef void _used(self) noexcept:
        pthread_mutex_unlock(&self._a.use)

    @property
    def gone(self):
        """Whether the drive was removed, or does not answer; only the latter can pass."""
        return bool(self._a.gone or self._a.ctrlr == NULL)

    def describe(self):
        """``serial``, ``model``, ``firmware``, ``nqn``, ``max_transfer_nbytes``,
        ``volatile_write_cache`` and optional commands (``compare``, ``deallocate``, ``write_zeroes``)."""
        self._use()
        try:
            return self._describe()
        finally:
            self._used()

    cdef dict _describe(self):
        cdef const spdk_nvme_ctrlr_data *d = spdk_nvme_ctrlr_get_data(self._a.ctrlr)
        # Optional NVM commands, NVMe Base 2.0 figure 275.
        cdef uint16_t optional = (<const uint16_t *>&d.oncs)[0]
        return {
            "serial": (<const char *>d.sn)[:20].decode("ascii", "replace").strip(),
            "model": (<const char *>d.mn)[:40].decode("ascii", "replace").strip(),
            "firmware": (<const char *>d.fr)[:8].decode("ascii", "replace").strip(),
            # SUBNQN (NVMe Base 2.0, figure 275).
            "nqn": (<const char *>d)[768:1024].split(b"\0")[0].decode("utf-8", "replace"),
            "max_transfer_nbytes": spdk_nvme_ctrlr_get_max_xfer_size(self._a.ctrlr),
            "volatile_write_cache": bool(d.vwc.present),
            "compare": bool(optional & 1),
            "deallocate": bool(optional & 4),
            "write_zeroes": bool(optional & 8),
        }

    def namespaces(self):
        """The numbers of the active namespaces."""
        cdef uint32_t nsid
        found = []
        self._use()
        nsid = spdk_nvme_ctrlr_get_first_active_ns(self._a.ctrlr)
        while nsid:
            found.append(nsid)
            nsid = spdk_nvme_ctrlr_get_next_active_ns(self._a.ctrlr, nsid)
        self._used()
        return found

    def namespace(self, uint32_t nsid):
        """Geometry and identity of a namespace: ``block_nbytes``, ``nbytes``, ``metadata_nbytes``
        and ``protection`` type, ``max_transfer_nbytes``, ``boundary_nbytes`` (0: none), ``nguid``,
        ``eui64``, ``uuid`` (hexadecimal, or empty). LookupError."""
        self._use()
        try:
            return self._geometry(nsid)
        finally:
            self._used()

    cdef dict _geometry(self, uint32_t nsid):
        cdef spdk_nvme_ns *ns = self._namespace(nsid)
        cdef uint32_t block = spdk_nvme_ns_get_sector_size(ns)
        cdef const uint8_t *nguid = spdk_nvme_ns_get_nguid(ns)
        cdef const spdk_uuid *uuid = spdk_nvme_ns_get_uuid(ns)
        cdef uint64_t eui64 = spdk_nvme_ns_get_data(ns).eui64
        return {
            "nsid": nsid,
            "block_nbytes": block,
            "nbytes": spdk_nvme_ns_get_size(ns),
            "metadata_nbytes": spdk_nvme_ns_get_md_size(ns),
            "protection": spdk_nvme_ns_get_pi_type(ns),
            "max_transfer_nbytes": spdk_nvme_ns_get_max_io_xfer_size(ns),
            "boundary_nbytes": spdk_nvme_ns_get_optimal_io_boundary(ns) * block,
            "nguid": nguid[:16].hex() if nguid != NULL else "",
            "eui64": (<unsigned char *>&eui64)[:8].hex() if eui64 else "",
            "uuid": (<const unsigned char *>uuid)[:16].hex() if uuid != NULL else "",
        }

    cdef spdk_nvme_ns *_namespace(self, uint32_t nsid) except NULL:
        cdef spdk_nvme_ns *ns = spdk_nvme_ctrlr_get_ns(self._a.ctrlr, nsid)
        if ns == NULL or not spdk_nvme_ns_is_active(ns):
            raise LookupError(f"{self.transport_id} has no namespace {nsid}")
        return ns

    def health(self):
        """Main fields of the SMART / health log page. Blocks without the GIL, for as long as a
        connection may take. Raises OSError (ETIMEDOUT: no answer)."""
        cdef Reply *reply = <Reply *>calloc(1, sizeof(Reply))
        cdef spdk_nvme_health_information_page *page = &reply.log
        cdef uint64_t until_ns = skv_now_ns() + self._a.patience_ns
        cdef int rc
        if reply == NULL:
            raise MemoryError()
        reply.done = True  # until it is asked for
        try:
            self._use(until_ns)
            reply.done = False
            rc = spdk_nvme_ctrlr_cmd_get_log_page(
                self._a.ctrlr, SPDK_NVME_LOG_HEALTH_INFORMATION, SPDK_NVME_GLOBAL_NS_TAG, page,
                sizeof(page[0]), 0, _on_reply, reply)
            if rc:
                reply.done = True
                reply.status = rc
            self._used()
            while not reply.done and skv_now_ns() < until_ns:
                self._use(until_ns)
                with nogil:
                    _poll_admin_queue(&self._a)
                self._used()
                with nogil:
                    usleep(WAIT_US)
            rc = abs(reply.status) if reply.done else ETIMEDOUT
            if rc:
                raise OSError(rc, f"the health log of {self.transport_id} could not be read")
            return {
                "temperature_c": page.temperature - 273,
                "available_spare_percent": page.available_spare,
                "percentage_used": page.percentage_used,
                "read_nbytes": page.data_units_read[0] * 512000,
                "written_nbytes": page.data_units_written[0] * 512000,
                "power_cycles": page.power_cycles[0],
                "power_on_hours": page.power_on_hours[0],
                "unsafe_shutdowns": page.unsafe_shutdowns[0],
                "media_errors": page.media_errors[0],
            }
        finally:
            _leave(reply)

    def reset(self):
        """Resets the controller and its pairs; commands in flight are retried. Blocks without the
        GIL. Raises OSError if the controller does not come back."""
        cdef Admin *a = &self._a
        cdef uint64_t wanted
        cdef bint lost
        with nogil:
            pthread_mutex_lock(&a.mutex)
            wanted = a.rebuilt + 1 + a.resetting
            _request_reset_locked(a, -EAGAIN)
            while a.rebuilt < wanted and not a.gone and not a.stopping:
                wait_until(&a.state_changed, &a.mutex, skv_now_ns() + PARKING_NS)
            lost = a.rebuilt < wanted or a.ctrlr == NULL
            pthread_mutex_unlock(&a.mutex)
        if lost:
            raise OSError(ENODEV, f"{self.transport_id} did not come back from a reset")

    def close(self):
        """Detaches the controller; close its queues first. Blocks without the GIL."""
        if not self._open:
            return
        self._open = False
        with nogil:
            _admins_remove(&self._a)
            _stop(&self._a)
            if self._a.ctrlr != NULL:
                _detach(&self._a)

    def __dealloc__(self):
        # In a forked child the controller is still the parent's.
        if self._pid == getpid():
            self.close()
