# An I/O queue pair as the backend of a transfer queue; types.pxd says which thread may use it.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

# Polls per reading of the clock.
DEF POLLS = 256
# How long an abort may take before the controller is reset.
DEF ABORT_GRACE_NS = 2_000_000_000


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
    if not status:
        _finish(p, io, <int>io.nbytes)
    elif p.parked:
        _finish(p, io, p.admin.fate)
    elif p.admin.gone or cpl.status.sct == 0 and cpl.status.sc == ABORTED_SQ_DELETION:
        _finish(p, io, -ENODEV)
    elif cpl.status.sct == 0 and cpl.status.sc == INVALID_NAMESPACE:
        _lose(p)
        _finish(p, io, -ENODEV)
    else:
        _finish(p, io, -status)


cdef int _command(Pair *p, skv_io *io) noexcept nogil:
    cdef uint64_t lba = io.offset >> p.block_shift
    cdef uint32_t count = io.nbytes >> p.block_shift
    cdef spdk_nvme_dsm_range area
    io.owner = p
    if io.op == SKV_READ:
        return spdk_nvme_ns_cmd_read(p.ns, p.pair, io.addr, lba, count, _on_io, io, 0)
    if io.op == SKV_WRITE:
        return spdk_nvme_ns_cmd_write(p.ns, p.pair, io.addr, lba, count, _on_io, io, 0)
    if io.op == SKV_FLUSH:
        return spdk_nvme_ns_cmd_flush(p.ns, p.pair, _on_io, io)
    memset(&area, 0, sizeof(area))
    area.starting_lba = lba
    area.length = count
    return spdk_nvme_ns_cmd_dataset_management(p.ns, p.pair, SPDK_NVME_DSM_ATTR_DEALLOCATE, &area,
                                               1, _on_io, io)


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Pair *p = <Pair *>self
    cdef int rc
    if p.held or p.in_flight >= p.depth:
        return -EAGAIN
    if p.in_flight == 0:
        rc = _activate(p, io.op)
        if rc:
            return rc
    elif p.admin.gone or p.presence != PRESENT:
        return -ENODEV
    elif p.broken or p.admin.resetting:
        return -EAGAIN
    # Counted first: SPDK may call back before it returns.
    p.in_flight += 1
    rc = _command(p, io)
    if rc == 0:
        return 0
    p.in_flight -= 1
    if rc == -ENOMEM and p.in_flight:
        return -EAGAIN
    if rc == -ENXIO:
        # The connection is down. This command was not sent, so it can wait for a new one.
        p.broken = True
        _request_reset(p.admin, -ENODEV)
        rc = -EAGAIN
    if p.in_flight == 0:
        _deactivate(p)
    return rc


cdef void _give_up(Pair *p) noexcept nogil:
    """The drive was removed: on PCIe only freeing the pair completes all commands in flight."""
    spdk_nvme_ctrlr_free_io_qpair(p.pair)
    p.pair = NULL


cdef void _poll_pair(Pair *p, uint64_t until_ns) noexcept nogil:
    cdef Admin *a = p.admin
    if a.resetting:
        _park(p, until_ns)
    elif a.out:
        _give_up(p)
    elif not p.broken and spdk_nvme_qpair_process_completions(p.pair, 0) < 0 and not a.gone:
        p.broken = True
        _request_reset(a, -ENODEV)


cdef int _poll(void *self, skv_io **done, int most, int least, int64_t wait_ns) noexcept nogil:
    cdef Pair *p = <Pair *>self
    cdef uint64_t until_ns = 0, now
    cdef int n = 0, polls = 0
    if p.held:
        until_ns = skv_now_ns() + <uint64_t>wait_ns
        _park(p, until_ns)
    while not p.held:
        if p.in_flight:
            _poll_pair(p, until_ns)
        if p.held or p.done != NULL or wait_ns == 0 or p.woken:
            break
        if p.relaxes:
            skv_relax()
        polls += 1
        if polls % POLLS == 0 or p.in_flight == 0:
            now = skv_now_ns()
            if until_ns == 0:
                until_ns = now + <uint64_t>wait_ns
            elif now >= until_ns:
                break
            if p.in_flight == 0:
                _wait_for_reset(p, until_ns)
                break
            if p.reset_at_ns and now >= p.reset_at_ns:
                # The abort failed: only a reset ends the drive's access to the memory.
                p.reset_at_ns = 0
                _request_reset(p.admin, -EAGAIN)
    # Only if it was seen: an unconditional store could erase a later wake-up.
    if p.woken:
        p.woken = False
    if p.held:
        return 0
    while p.done != NULL and n < most:
        done[n] = p.done
        p.done = p.done.next
        n += 1
    if p.in_flight == 0:
        p.reset_at_ns = 0
        if p.active:
            _deactivate(p)
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
    if p.held:
        return
    # Without a pair the abort would apply to the admin queue.
    if p.can_abort and not p.broken and p.pair != NULL:
        spdk_nvme_ctrlr_cmd_abort_ext(p.admin.ctrlr, p.pair, io, _ignore, NULL)
    if p.reset_at_ns == 0:
        p.reset_at_ns = skv_now_ns() + ABORT_GRACE_NS


@cython.no_gc_clear
cdef class QueuePair:
    """An I/O queue pair of ``controller`` on namespace ``nsid``, for ``depth`` commands of
    ``segment_nbytes`` at most.

    ``backend`` is the capsule for a queue. Raises OSError if the controller provides none.
    """
    cdef Pair _p
    cdef Controller _controller
    cdef int _pid    # 0: closed, or never opened
    cdef readonly object backend

    def __cinit__(self, Controller controller not None, uint32_t nsid, uint32_t depth,
                  uint32_t segment_nbytes):
        cdef Pair *p = &self._p
        cdef Admin *a = &controller._a
        cdef int rc
        self._controller = controller
        p.admin = a
        p.nsid = nsid
        p.depth = depth
        p.segment_nbytes = segment_nbytes
        # SPDK's vfio-user transport cannot iterate over its requests: an abort would call a null
        # pointer (seen with 26.09), so commands are cancelled by a reset.
        p.can_abort = not a.by_register
        p.relaxes = a.by_register
        p.backend.self = p
        p.backend.submit = _submit
        p.backend.poll = _poll
        p.backend.wake = _wake
        p.backend.cancel = _cancel
        p.backend.most_places = 1
        p.backend.reaches = _reaches
        pthread_mutex_init(&p.mutex, NULL)
        self.backend = PyCapsule_New(&p.backend, SKV_BACKEND_CAPSULE, NULL)
        with nogil:
            rc = _lock_use(a, skv_now_ns() + a.patience_ns)
            if rc == 0:
                rc = _open_pair(p)
                pthread_mutex_unlock(&a.use)
        if rc:
            raise OSError(-rc, f"{controller.transport_id} did not provide an I/O queue pair")
        self._pid = getpid()

    @property
    def presence(self):
        """``present``; ``absent``: the controller has no namespace of that number any more;
        ``stranger``: another has taken its number, or it was formatted anew. Only the first is
        used."""
        return ("present", "absent", "stranger")[self._p.presence]

    def add_memory(self, size_t address, size_t nbytes):
        """Makes the drive use this memory (SPDK's, or registered) without a bounce copy."""
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
        """Undoes :meth:`add_memory`, before the memory is freed or unregistered."""
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
        """Makes the next ``count`` commands of ``opcode`` fail, for tests; a reset ends it. The
        driver must be idle."""
        cdef int rc = -ENODEV
        self._controller._use()
        if self._p.pair != NULL:
            rc = spdk_nvme_qpair_add_cmd_error_injection(
                self._controller._a.ctrlr, self._p.pair, opcode, do_not_submit, timeout_us, count,
                sct, sc)
        self._controller._used()
        if rc:
            raise OSError(-rc, "the error could not be injected")

    def clear_error(self, int opcode):
        """Ends :meth:`inject_error` for ``opcode``."""
        self._controller._use()
        if self._p.pair != NULL:
            spdk_nvme_qpair_remove_cmd_error_injection(
                self._controller._a.ctrlr, self._p.pair, opcode)
        self._controller._used()

    def close(self):
        """Frees the pair; nothing may be in flight. Blocks without the GIL."""
        cdef Admin *a = self._p.admin
        if self._pid != getpid():
            return
        self._pid = 0
        with nogil:
            # Without a limit of its own: nothing holds it beyond the limits of connections.
            pthread_mutex_lock(&a.use)
            _close_pair(&self._p)
            pthread_mutex_unlock(&a.use)

    def __dealloc__(self):
        self.close()
        free(self._p.reachable)
