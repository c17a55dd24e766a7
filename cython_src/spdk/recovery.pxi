# Resets and reconnections, which only the controller's thread does.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.
#
# SPDK completes a vfio-user pair's commands in flight only when the pair is freed, and recovers
# from a restarted target only by a new connection. PCIe allows both, so there is one procedure:
# all drivers park, pairs are freed, the controller is reset or else connected again, and pairs are
# made again if it is the same drive.

# Requests of a pair at least.
DEF LEAST_REQUESTS = 512
# Between two attempts to reconnect a lost controller.
DEF RECONNECT_NS = 1_000_000_000
# Between two checks whether all drivers have parked.
DEF PARKING_NS = 50_000_000


cdef void _request_reset_locked(Admin *a, int fate) noexcept nogil:
    """As `_request_reset`, with the mutex held."""
    if not a.reset_requested:
        a.reset_requested = True
        a.next_fate = fate
    elif fate == -ENODEV:
        a.next_fate = fate
    pthread_cond_broadcast(&a.work)


cdef void _request_reset(Admin *a, int fate) noexcept nogil:
    """Requests a reset from the controller's thread. `fate`: the result of commands in flight."""
    pthread_mutex_lock(&a.mutex)
    _request_reset_locked(a, fate)
    pthread_mutex_unlock(&a.mutex)


cdef uint32_t _parts(Pair *p, spdk_nvme_ns *ns) noexcept nogil:
    """SPDK's requests for the largest command, which it splits at MDTS or a boundary."""
    cdef uint32_t part = spdk_nvme_ns_get_max_io_xfer_size(ns)
    cdef uint32_t boundary = spdk_nvme_ns_get_optimal_io_boundary(ns) * p.likeness.block_nbytes
    if boundary:
        part = min(part, boundary)
    return p.segment_nbytes // max(part, p.likeness.block_nbytes) + 3


cdef int _connect_pair(Pair *p) noexcept nogil:
    """Connects the pair. -ENODEV if its namespace is missing or is another one."""
    cdef spdk_nvme_ctrlr *ctrlr = p.admin.ctrlr
    cdef spdk_nvme_ns *ns
    cdef spdk_nvme_io_qpair_opts opts
    if ctrlr == NULL:
        return -ENODEV
    p.presence = _presence(p)
    if p.presence != PRESENT:
        return -ENODEV
    ns = spdk_nvme_ctrlr_get_ns(ctrlr, p.nsid)
    spdk_nvme_ctrlr_get_default_io_qpair_opts(ctrlr, &opts, sizeof(opts))
    # SPDK may split a command at MDTS or a boundary: it then needs more requests than there are
    # commands, and queues in software those that the hardware queue cannot hold.
    opts.io_queue_size = max(opts.io_queue_size, 2 * p.depth)
    opts.io_queue_requests = max(max(LEAST_REQUESTS, 16 * p.depth), 2 * _parts(p, ns))
    opts.delay_cmd_submit = True
    opts.async_mode = True
    p.ns = ns
    p.broken = False
    return _alloc_pair(p, &opts)


cdef bint _same_drive(Admin *a) noexcept nogil:
    return memcmp(a.serial, spdk_nvme_ctrlr_get_data(a.ctrlr).sn, sizeof(a.serial)) == 0


cdef bint _free_pairs(Admin *a) noexcept nogil:
    """Completes everything in flight, while all drivers are parked. Returns whether the controller
    could be disabled first; if not, its DMA was disabled."""
    cdef Pair *p = a.pairs
    cdef bint off = True
    if a.ctrlr != NULL:
        if a.by_register and not _answers(a):
            _cut_line(a)
        _disconnect(a)
        # CSTS.RDY (NVMe Base 2.0, section 3.1.3.6): still enabled, and may still write.
        if a.pci != NULL and spdk_nvme_ctrlr_get_regs_csts(a.ctrlr).raw & 1:
            off = False
            _cut_off(a)
    while p != NULL:
        if p.pair != NULL:
            _hold()
            spdk_nvme_ctrlr_free_io_qpair(p.pair)
            _let_go()
            p.pair = NULL
        p = p.next
    return off


cdef void _find_controller(Admin *a, bint may_reset) noexcept nogil:
    """Resets or reconnects the controller; `ctrlr` is NULL afterwards if it is missing or belongs
    to another drive."""
    cdef uint64_t until_ns = skv_now_ns() + a.connect_ns
    cdef int rc = -EAGAIN, tries = 0
    if a.ctrlr != NULL and may_reset and (a.pci != NULL or a.by_register):
        rc = _reconnect(a)
    if rc and a.ctrlr != NULL:
        _detach(a)
    while a.ctrlr == NULL:
        rc = _connect(a, until_ns)
        # SPDK gives a slow target less time for a step than there is for all.
        tries += 1
        if rc != -ENODEV or not _pause(a, until_ns) or tries > 1 and not a.by_register:
            break
        usleep(AGAIN_US)
    if a.ctrlr != NULL and not _same_drive(a):
        _detach(a)


cdef bint _all_parked(Admin *a) noexcept nogil:
    cdef Pair *p = a.pairs
    while p != NULL:
        if p.active and not p.parked:
            return False
        p = p.next
    return True


cdef void _rebuild(Admin *a, bint connects) noexcept nogil:
    """Resets or reconnects the controller and its pairs, or (`connects` False) lets go of them
    until they are next used. With `use` held."""
    cdef Pair *p
    cdef bint off
    pthread_mutex_lock(&a.mutex)
    a.reset_requested = False
    a.resetting = True
    a.fate = a.next_fate
    while not _all_parked(a):
        wait_until(&a.state_changed, &a.mutex, skv_now_ns() + PARKING_NS)
    pthread_mutex_unlock(&a.mutex)
    off = _free_pairs(a)
    # Commands in flight have completed: their waiters need not wait for the rest.
    pthread_mutex_lock(&a.mutex)
    p = a.pairs
    while p != NULL:
        p.active = p.parked = False
        p = p.next
    pthread_cond_broadcast(&a.state_changed)
    pthread_mutex_unlock(&a.mutex)
    if connects:
        _find_controller(a, off)
    elif a.ctrlr != NULL:
        _detach(a)
    if a.ctrlr != NULL:
        _read_changes(a)
    p = a.pairs
    while p != NULL:
        _connect_pair(p)
        p = p.next
    pthread_mutex_lock(&a.mutex)
    a.resetting = False
    a.tried_ns = skv_now_ns()
    a.rebuilt += 1
    pthread_cond_broadcast(&a.state_changed)
    pthread_mutex_unlock(&a.mutex)


cdef int _activate(Pair *p, int op) noexcept nogil:
    """Makes an idle pair active before it submits. 0; -EAGAIN: not yet; -ENODEV."""
    cdef Admin *a = p.admin
    cdef int rc = 0
    if not _ask_for_events(a, ASKED_NS if op == SKV_READ else 0):
        return -EAGAIN
    pthread_mutex_lock(&a.mutex)
    if a.gone:
        rc = -ENODEV
    elif a.reset_requested or a.resetting:
        rc = -EAGAIN
    elif p.presence != PRESENT and a.ctrlr != NULL:
        rc = -ENODEV  # until an event says that it is back
    elif p.pair != NULL and not p.broken:
        p.active = True
    elif skv_now_ns() - a.tried_ns < RECONNECT_NS:
        rc = -ENODEV
    else:
        _request_reset_locked(a, -EAGAIN)
        rc = -EAGAIN
    pthread_mutex_unlock(&a.mutex)
    return rc


cdef void _deactivate(Pair *p) noexcept nogil:
    """Makes a pair idle: nothing of it is in flight."""
    pthread_mutex_lock(&p.admin.mutex)
    p.active = False
    if p.admin.resetting:
        pthread_cond_broadcast(&p.admin.state_changed)
    pthread_mutex_unlock(&p.admin.mutex)


cdef void _park(Pair *p, uint64_t until_ns) noexcept nogil:
    """Waits while the pair is rebuilt; `held` stays set if that lasts beyond `until_ns`."""
    cdef Admin *a = p.admin
    pthread_mutex_lock(&a.mutex)
    if not p.held:
        if not a.resetting:
            pthread_mutex_unlock(&a.mutex)
            return
        p.held = p.parked = True
        pthread_cond_broadcast(&a.state_changed)
    while p.parked:
        if wait_until(&a.state_changed, &a.mutex, until_ns):
            break
    p.held = p.parked
    pthread_mutex_unlock(&a.mutex)


cdef void _wait_for_reset(Pair *p, uint64_t until_ns) noexcept nogil:
    """Waits, with nothing in flight, until the reset has ended."""
    cdef Admin *a = p.admin
    pthread_mutex_lock(&a.mutex)
    while (a.reset_requested or a.resetting) and not p.woken:
        if wait_until(&a.state_changed, &a.mutex, until_ns):
            break
    pthread_mutex_unlock(&a.mutex)


cdef void _close_pair(Pair *p) noexcept nogil:
    """Frees the pair, which has nothing in flight. With `use` held."""
    cdef Admin *a = p.admin
    cdef Pair **at
    if p.pair != NULL and not a.gone and (p.broken or not _answers(a)):
        # Only without its controller can a pair be freed that is to be deleted by an answer.
        _rebuild(a, False)
    pthread_mutex_lock(&a.mutex)
    at = &a.pairs
    while at[0] != NULL and at[0] != p:
        at = &at[0].next
    if at[0] != NULL:
        at[0] = p.next
    pthread_mutex_unlock(&a.mutex)
    if p.pair != NULL:
        _hold()
        spdk_nvme_ctrlr_free_io_qpair(p.pair)
        _let_go()
        p.pair = NULL


cdef int _open_pair(Pair *p) noexcept nogil:
    """Connects a new pair. 0 or -errno. With `use` held."""
    cdef Admin *a = p.admin
    cdef int rc
    pthread_mutex_lock(&a.mutex)
    p.next = a.pairs
    a.pairs = p
    pthread_mutex_unlock(&a.mutex)
    rc = _connect_pair(p)
    if rc and p.presence == PRESENT and not a.gone:
        # Lost, or too slow so far: the reset waits as long as a connection may take.
        _rebuild(a, True)
        rc = 0 if p.pair != NULL and not p.broken else -ENODEV
    if rc:
        _close_pair(p)
    return rc
