# An I/O queue pair as the backend of a transfer queue. Only the queue's driver touches the pair.

# Completions taken at once, and polls between two looks at the clock.
DEF MOST = 64
DEF POLLS = 256
# How long an abort may take before the controller is reset.
DEF ABORT_GRACE_NS = 2_000_000_000
# Between two attempts to bring a failed connection back.
DEF RECONNECT_NS = 1_000_000_000


cdef struct Reachable:
    size_t address
    size_t nbytes


cdef struct Pair:
    skv_backend backend
    Admin *admin
    spdk_nvme_ns *ns
    spdk_nvme_qpair *pair
    uint32_t block_nbytes
    uint32_t depth
    uint32_t in_flight
    skv_io *done
    skv_io *done_tail
    uint64_t reset_at_ns     # a cancelled command is overdue then; 0: none is
    uint64_t tried_ns        # the last attempt to reconnect
    bint can_abort
    bint woken
    bint broken              # the pair is disconnected; nothing of it is in flight
    # Memory that the controller reaches: changed by Python threads, read by those that submit.
    pthread_mutex_t mutex
    Reachable *reachable
    uint32_t reachable_count
    uint32_t reachable_room


cdef void _finish(Pair *p, skv_io *io, int result) noexcept nogil:
    io.result = result
    io.next = NULL
    p.in_flight -= 1
    if p.done == NULL:
        p.done = io
    else:
        p.done_tail.next = io
    p.done_tail = io


cdef void _on_io(void *argument, const spdk_nvme_cpl *cpl) noexcept nogil:
    cdef skv_io *io = <skv_io *>argument
    cdef Pair *p = <Pair *>io.owner
    cdef int status = _status_of(cpl)
    if status and (p.admin.gone or p.broken):
        _finish(p, io, -ENODEV)
    else:
        _finish(p, io, -status if status else <int>io.nbytes)


cdef void _reconnect(Pair *p) noexcept nogil:
    """Tries to bring a failed pair back, at most once in RECONNECT_NS. Blocks for a connect."""
    cdef uint64_t now = skv_now_ns()
    if p.admin.gone or (p.tried_ns and now - p.tried_ns < RECONNECT_NS):
        return
    p.tried_ns = now
    if spdk_nvme_ctrlr_is_failed(p.admin.ctrlr) and spdk_nvme_ctrlr_reset(p.admin.ctrlr):
        return
    if spdk_nvme_ctrlr_reconnect_io_qpair(p.pair) == 0:
        p.broken = False
    elif spdk_nvme_ctrlr_reset(p.admin.ctrlr) == 0:
        # A PCIe controller keeps the old queues until it is reset.
        p.broken = spdk_nvme_ctrlr_reconnect_io_qpair(p.pair) != 0


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Pair *p = <Pair *>self
    cdef uint64_t lba = io.offset // p.block_nbytes
    cdef uint32_t count = io.nbytes // p.block_nbytes
    cdef spdk_nvme_dsm_range area
    cdef int rc
    if p.in_flight >= p.depth:
        return -EAGAIN
    if p.broken and p.in_flight == 0:
        _reconnect(p)
    if p.admin.gone or p.broken:
        return -ENODEV
    io.owner = p
    if io.op == SKV_READ:
        rc = spdk_nvme_ns_cmd_read(p.ns, p.pair, io.addr, lba, count, _on_io, io, 0)
    elif io.op == SKV_WRITE:
        rc = spdk_nvme_ns_cmd_write(p.ns, p.pair, io.addr, lba, count, _on_io, io, 0)
    elif io.op == SKV_FLUSH:
        rc = spdk_nvme_ns_cmd_flush(p.ns, p.pair, _on_io, io)
    else:
        memset(&area, 0, sizeof(area))
        area.starting_lba = lba
        area.length = count
        rc = spdk_nvme_ns_cmd_dataset_management(p.ns, p.pair, SPDK_NVME_DSM_ATTR_DEALLOCATE, &area,
                                                 1, _on_io, io)
    if rc == 0:
        p.in_flight += 1
        return 0
    if rc == -ENOMEM and p.in_flight:
        return -EAGAIN
    if rc == -ENXIO:
        p.broken = True
        return -ENODEV
    return rc


cdef void _take_back(Pair *p) noexcept nogil:
    """The pair failed: everything in flight comes back as failed, and the device lets go of it."""
    p.broken = True
    spdk_nvme_ctrlr_disconnect_io_qpair(p.pair)
    spdk_nvme_qpair_process_completions(p.pair, 0)


cdef void _give_up(Pair *p) noexcept nogil:
    """The drive is out. Only the end of a pair brings back all that was in flight on PCIe."""
    p.broken = True
    spdk_nvme_ctrlr_free_io_qpair(p.pair)
    p.pair = NULL


cdef int _poll(void *self, skv_io **done, int most, int64_t wait_ns) noexcept nogil:
    cdef Pair *p = <Pair *>self
    cdef uint64_t until_ns = 0, now
    cdef int n = 0, polls = 0, rc
    while True:
        if p.admin.out and p.in_flight:
            _give_up(p)
        elif not p.broken and spdk_nvme_qpair_process_completions(p.pair, 0) < 0:
            _take_back(p)
        if p.done != NULL or wait_ns == 0 or p.woken:
            break
        polls += 1
        if polls % POLLS == 0 or until_ns == 0:
            now = skv_now_ns()
            if until_ns == 0:
                until_ns = now + <uint64_t>wait_ns
            elif now >= until_ns:
                break
            if p.reset_at_ns and now >= p.reset_at_ns:
                # The abort did not help: only a reset makes the device let go of the memory.
                p.reset_at_ns = 0
                # It fails what was in flight, and connects the pairs of a PCIe controller again.
                if p.in_flight:
                    rc = spdk_nvme_ctrlr_reset(p.admin.ctrlr)
                    if rc or spdk_nvme_qpair_process_completions(p.pair, 0) < 0 or p.in_flight:
                        _take_back(p)
    p.woken = False
    while p.done != NULL and n < most:
        done[n] = p.done
        p.done = p.done.next
        n += 1
    if p.in_flight == 0:
        p.reset_at_ns = 0
    return n


cdef void _wake(void *self) noexcept nogil:
    (<Pair *>self).woken = True


cdef int _reaches(void *self, const void *addr, uint64_t nbytes) noexcept nogil:
    cdef Pair *p = <Pair *>self
    cdef size_t at = <size_t>addr
    cdef uint32_t i
    cdef int found = 0
    pthread_mutex_lock(&p.mutex)
    for i in range(p.reachable_count):
        if at >= p.reachable[i].address and (
                at + nbytes <= p.reachable[i].address + p.reachable[i].nbytes):
            found = 1
            break
    pthread_mutex_unlock(&p.mutex)
    return found


cdef void _ignore(void *argument, const spdk_nvme_cpl *cpl) noexcept nogil:
    pass


cdef void _cancel(void *self, skv_io *io) noexcept nogil:
    cdef Pair *p = <Pair *>self
    # Without a pair the abort would mean the admin queue.
    if p.can_abort and p.pair != NULL:
        spdk_nvme_ctrlr_cmd_abort_ext(p.admin.ctrlr, p.pair, io, _ignore, NULL)
    if p.reset_at_ns == 0:
        p.reset_at_ns = skv_now_ns() + ABORT_GRACE_NS


@cython.no_gc_clear
cdef class QueuePair:
    """An I/O queue pair of ``controller`` on namespace ``nsid``, for ``depth`` commands.

    ``backend`` is the capsule for a queue. OSError where the controller gives none.
    """
    cdef Pair _p
    cdef Controller _controller
    cdef readonly object backend

    def __cinit__(self, Controller controller not None, uint32_t nsid, uint32_t depth):
        cdef spdk_nvme_io_qpair_opts opts
        self._controller = controller
        self._p.ns = controller._namespace(nsid)
        self._p.admin = &controller._a
        self._p.block_nbytes = spdk_nvme_ns_get_sector_size(self._p.ns)
        self._p.depth = depth
        # SPDK's vfio-user transport cannot walk its requests, and an abort would call through a
        # null pointer there (seen with 26.09): a reset has to do.
        self._p.can_abort = "VFIOUSER" not in controller.transport_id
        spdk_nvme_ctrlr_get_default_io_qpair_opts(controller._a.ctrlr, &opts, sizeof(opts))
        # Each of our commands may be split at MDTS or a boundary: SPDK then needs more requests
        # than we have commands, and queues in software what the hardware queue cannot hold.
        opts.io_queue_size = max(opts.io_queue_size, 2 * depth)
        opts.io_queue_requests = max(opts.io_queue_requests, 16 * depth)
        opts.delay_cmd_submit = True
        with nogil:
            self._p.pair = spdk_nvme_ctrlr_alloc_io_qpair(controller._a.ctrlr, &opts, sizeof(opts))
        if self._p.pair == NULL:
            raise OSError(ENXIO, f"{controller.transport_id} gives no I/O queue pair")
        self._p.backend.self = &self._p
        self._p.backend.submit = _submit
        self._p.backend.poll = _poll
        self._p.backend.wake = _wake
        self._p.backend.cancel = _cancel
        self._p.backend.reaches = _reaches
        pthread_mutex_init(&self._p.mutex, NULL)
        self.backend = PyCapsule_New(&self._p.backend, SKV_BACKEND_CAPSULE, NULL)

    def add_memory(self, size_t address, size_t nbytes):
        """From now on this memory (SPDK's own, or registered) is used without a copy."""
        cdef Pair *p = &self._p
        cdef void *grown
        cdef uint32_t room = max(64, 2 * p.reachable_room)
        pthread_mutex_lock(&p.mutex)
        if p.reachable_count == p.reachable_room:
            grown = realloc(p.reachable, room * sizeof(Reachable))
            if grown != NULL:
                p.reachable = <Reachable *>grown
                p.reachable_room = room
        if p.reachable_count < p.reachable_room:
            p.reachable[p.reachable_count].address = address
            p.reachable[p.reachable_count].nbytes = nbytes
            p.reachable_count += 1
        pthread_mutex_unlock(&p.mutex)

    def remove_memory(self, size_t address):
        """Takes it back, before it is freed or unregistered."""
        cdef Pair *p = &self._p
        cdef uint32_t i
        pthread_mutex_lock(&p.mutex)
        for i in range(p.reachable_count):
            if p.reachable[i].address == address:
                p.reachable_count -= 1
                p.reachable[i] = p.reachable[p.reachable_count]
                break
        pthread_mutex_unlock(&p.mutex)

    def inject_error(self, int opcode, *, uint32_t count=1, bint do_not_submit=False,
                     uint64_t timeout_us=0, int sct=0, int sc=0):
        """Makes the next ``count`` commands of ``opcode`` fail (tests). The driver must be idle."""
        cdef int rc = spdk_nvme_qpair_add_cmd_error_injection(
            self._controller._a.ctrlr, self._p.pair, opcode, do_not_submit, timeout_us, count, sct,
            sc)
        if rc:
            raise OSError(-rc, "the error could not be injected")

    def clear_error(self, int opcode):
        """Ends :meth:`inject_error` for ``opcode``."""
        spdk_nvme_qpair_remove_cmd_error_injection(self._controller._a.ctrlr, self._p.pair, opcode)

    def close(self):
        """Gives the pair back; nothing may be in flight. Blocks without the GIL."""
        if self._p.pair != NULL:
            with nogil:
                spdk_nvme_ctrlr_free_io_qpair(self._p.pair)
            self._p.pair = NULL

    def __dealloc__(self):
        free(self._p.reachable)
