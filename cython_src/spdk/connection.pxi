# Connecting to a controller and letting go of it, in steps: between them no lock is held but the
# controller's own, and each procedure ends by its deadline or when the controller is closed.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

# How long a vfio-user target may take to answer a first message, and any controller to answer a
# command of its admin queue before something waits for it.
DEF KNOCK_MS = 3000
DEF ANSWER_MS = 3000
# How long the end of a connection may take.
DEF PARTING_MS = 10_000
# Between two attempts to connect to a target that answers, but fails to provide a controller.
DEF AGAIN_US = 100_000


cdef bint _step(uint64_t until_ns) noexcept nogil:
    """Between two steps. False: it is too late for another one."""
    if skv_now_ns() > until_ns:
        return False
    usleep(STEP_US)
    return True


cdef bint _pause(Admin *a, uint64_t until_ns) noexcept nogil:
    """As `_step`, for what is in vain once the controller is closed."""
    return not a.stopping and _step(until_ns)


# What a command of the admin queue was answered. Its callback may come after nobody waits for it
# any more, and then frees it.
cdef struct Reply:
    bint done
    bint abandoned
    int status     # 0, or SKV_NVME_STATUS and the code
    spdk_nvme_health_information_page log


cdef pthread_mutex_t _replies
pthread_mutex_init(&_replies, NULL)


cdef void _on_reply(void *argument, const spdk_nvme_cpl *cpl) noexcept nogil:
    cdef Reply *reply = <Reply *>argument
    cdef bint abandoned
    pthread_mutex_lock(&_replies)
    abandoned = reply.abandoned
    reply.status = _status_of(cpl)
    reply.done = True
    pthread_mutex_unlock(&_replies)
    if abandoned:
        free(reply)


cdef void _leave(Reply *reply) noexcept nogil:
    """Ends the use of a reply, whether or not it has come."""
    cdef bint done
    pthread_mutex_lock(&_replies)
    done = reply.done
    reply.abandoned = True
    pthread_mutex_unlock(&_replies)
    if done:
        free(reply)


cdef bint _answers(Admin *a) noexcept nogil:
    """Whether the controller answers a command, any command. With `use` held."""
    cdef uint64_t until_ns = skv_now_ns() + _ms(ANSWER_MS)
    cdef Reply *reply
    cdef bint answered
    if a.by_register and _is_down(a.line):
        return False
    reply = <Reply *>calloc(1, sizeof(Reply))
    if reply == NULL:
        return False
    if spdk_nvme_ctrlr_cmd_get_feature(a.ctrlr, SPDK_NVME_FEAT_ARBITRATION, 0, NULL, 0, _on_reply,
                                       reply):
        free(reply)
        return False
    while spdk_nvme_ctrlr_process_admin_completions(a.ctrlr) >= 0:
        if reply.done or not _step(until_ns):
            break
    answered = reply.done and not spdk_nvme_ctrlr_is_failed(a.ctrlr)
    _leave(reply)
    return answered


cdef void _cut_line(Admin *a) noexcept nogil:
    """Makes every further use of a silent vfio-user target's socket fail at once."""
    if a.line >= 0:
        shutdown(a.line, SHUT_RDWR)


cdef void _drop_line(Admin *a) noexcept nogil:
    if a.line >= 0:
        close(a.line)
        a.line = -1


cdef void _on_attach(void *argument, const spdk_nvme_transport_id *trid, spdk_nvme_ctrlr *ctrlr,
                     const spdk_nvme_ctrlr_opts *opts) noexcept nogil:
    (<Attempt *>argument).ctrlr = ctrlr


cdef int _connect(Admin *a, uint64_t until_ns) noexcept nogil:
    """One attempt to connect. 0, or -errno (-ENODEV: SPDK's log says why)."""
    cdef int before[LINES]
    cdef int rc = 0, count = 0
    if a.by_register and a.context == NULL:
        rc = _knock(a.trid.traddr, min(until_ns, skv_now_ns() + _ms(KNOCK_MS)))
        if rc:
            return rc
    _hold()
    if a.context == NULL:
        if a.by_register:
            _start_watch()
            count = _lines(before)
        a.attempt.ctrlr = NULL
        a.context = spdk_nvme_connect_async(&a.trid, &a.attempt.opts, _on_attach)
        if a.by_register and a.context != NULL:
            a.line = _new_line(before, count)
    _let_go()
    rc = -ENODEV if a.context == NULL else -EAGAIN
    while rc == -EAGAIN:
        _hold()
        rc = spdk_nvme_probe_poll_async(a.context)
        _let_go()
        if rc == -EAGAIN and not _pause(a, until_ns):
            # It cannot be ended, only left; the next attempt takes it up again.
            _cut_line(a)
            return -ETIMEDOUT
    a.context = NULL
    if rc == 0 and a.attempt.ctrlr == NULL:
        rc = -ENODEV
    if rc:
        _drop_line(a)
        return rc
    a.ctrlr = a.attempt.ctrlr
    a.pci = spdk_nvme_ctrlr_get_pci_device(a.ctrlr)
    spdk_nvme_ctrlr_set_remove_cb(a.ctrlr, _on_removal, a)
    return 0


cdef void _disconnect(Admin *a) noexcept nogil:
    """Ends the admin queue, and what it has in flight. With `use` held."""
    cdef uint64_t until_ns = skv_now_ns() + _ms(PARTING_MS)
    cdef int rc
    _hold()
    rc = spdk_nvme_ctrlr_disconnect(a.ctrlr)
    _let_go()
    while rc >= 0:
        _hold()
        rc = spdk_nvme_ctrlr_process_admin_completions(a.ctrlr)
        _let_go()
        if rc >= 0 and not _step(until_ns):
            break


cdef void _detach(Admin *a) noexcept nogil:
    """Lets go of the controller. With `use` held, or when nobody else is left."""
    cdef spdk_nvme_detach_ctx *context = NULL
    cdef int rc
    if a.pci == NULL and not a.by_register:
        # A fabric's shutdown asks over the connection, and waits for the answer without end.
        _disconnect(a)
    elif a.by_register and not _answers(a):
        _cut_line(a)
    _hold()
    rc = spdk_nvme_detach_async(a.ctrlr, &context)
    _let_go()
    while rc == 0 and context != NULL:
        _hold()
        if spdk_nvme_detach_poll_async(context) != -EAGAIN:
            context = NULL
        _let_go()
        if context != NULL:
            usleep(STEP_US)
    _drop_line(a)
    a.ctrlr = NULL
    a.pci = NULL


cdef int _reconnect(Admin *a) noexcept nogil:
    """Ends a reset. SPDK has a deadline for each of its steps. With `use` held."""
    cdef int rc = -EAGAIN
    spdk_nvme_ctrlr_reconnect_async(a.ctrlr)
    while rc == -EAGAIN:
        _hold()
        rc = spdk_nvme_ctrlr_reconnect_poll_async(a.ctrlr)
        _let_go()
        if rc == -EAGAIN:
            usleep(STEP_US)
    return rc


cdef int _alloc_pair(Pair *p, const spdk_nvme_io_qpair_opts *opts) noexcept nogil:
    """Connects the pair by its deadline. If that passes, the pair is `broken`, and only a reset
    frees it. With `use` held."""
    cdef Admin *a = p.admin
    cdef uint64_t until_ns = skv_now_ns() + a.patience_ns
    cdef int rc = 0
    _hold()
    p.pair = spdk_nvme_ctrlr_alloc_io_qpair(a.ctrlr, opts, sizeof(opts[0]))
    _let_go()
    if p.pair == NULL:
        return -ENXIO
    while not spdk_nvme_qpair_is_connected(p.pair):
        _hold()
        rc = spdk_nvme_qpair_process_completions(p.pair, 0)
        _let_go()
        if rc < 0 or not _pause(a, until_ns):
            p.broken = True
            return -ENXIO if rc < 0 else -ETIMEDOUT
    return 0
