# Whether a namespace is still the one that was opened: it may be removed, formatted, or replaced by
# another under its number while the connection stays up. The controller says so by an asynchronous
# event, upon which SPDK identifies the namespace anew when the admin queue is polled.
# Included in spdk.pyx: SPDK's state must exist once, also when linked statically.

cdef extern from "<string.h>" nogil:
    int memcmp(const void *, const void *, size_t)

# Generic command status (NVMe Base 2.0, figure 95): the queue was deleted; also set by SPDK.
DEF ABORTED_SQ_DELETION = 0x08
# A pair that was idle asks for events before it writes, and before it reads (what it reads is
# checked by its sum, as a rule) if that was not done for this long.
DEF ASKED_NS = 1_000_000
# Until it asks again, if somebody else used the controller.
DEF BUSY_US = 20
# Generic command status (NVMe Base 2.0, figure 95): there is no such namespace.
DEF INVALID_NAMESPACE = 0x0B


# The Changed Namespace List log has this many numbers (NVMe Base 2.0, section 5.16.1.5).
DEF CHANGES = 1024


cdef int _status_of(const spdk_nvme_cpl *cpl) noexcept nogil:
    if cpl.status.sc == 0 and cpl.status.sct == 0:
        return 0
    return SKV_NVME_STATUS | (cpl.status.sct << 8) | cpl.status.sc


cdef struct Changes:
    Admin *admin
    uint32_t numbers[CHANGES]


cdef void _on_changes(void *argument, const spdk_nvme_cpl *cpl) noexcept nogil:
    cdef Changes *changes = <Changes *>argument
    if _status_of(cpl) == 0 and changes.numbers[0]:
        # Since the reset, or before: only another one says which.
        _request_reset(changes.admin, -EAGAIN)
    free(changes)


cdef void _read_changes(Admin *a) noexcept nogil:
    """Reads the log of changed namespaces after a reset, with `use` held. An event sends no other
    one until that was done, and an event that arrives amid a reset is lost."""
    cdef Changes *changes
    # OAES, bit 8 (NVMe Base 2.0, figure 275): it has such events, and the log.
    if not (<const uint8_t *>spdk_nvme_ctrlr_get_data(a.ctrlr))[93] & 1:
        return
    changes = <Changes *>calloc(1, sizeof(Changes))
    if changes == NULL:
        return
    changes.admin = a
    if spdk_nvme_ctrlr_cmd_get_log_page(
            a.ctrlr, SPDK_NVME_LOG_CHANGED_NS_LIST, SPDK_NVME_GLOBAL_NS_TAG, changes.numbers,
            sizeof(changes.numbers), 0, _on_changes, changes):
        free(changes)


cdef void _liken(spdk_nvme_ns *ns, Likeness *found) noexcept nogil:
    cdef const uint8_t *nguid = spdk_nvme_ns_get_nguid(ns)
    cdef const spdk_uuid *uuid = spdk_nvme_ns_get_uuid(ns)
    cdef uint64_t eui64 = spdk_nvme_ns_get_data(ns).eui64
    memset(found, 0, sizeof(found[0]))
    if nguid != NULL:
        memcpy(found.identity, nguid, 16)
    if uuid != NULL:
        memcpy(found.identity + 16, uuid, 16)
    memcpy(found.identity + 32, &eui64, 8)
    found.blocks = spdk_nvme_ns_get_num_sectors(ns)
    found.block_nbytes = spdk_nvme_ns_get_sector_size(ns)
    found.metadata_nbytes = spdk_nvme_ns_get_md_size(ns)


cdef int _presence(Pair *p) noexcept nogil:
    """The namespace's presence, by what SPDK last identified. With `use` held, and a controller."""
    cdef spdk_nvme_ns *ns = spdk_nvme_ctrlr_get_ns(p.admin.ctrlr, p.nsid)
    cdef Likeness found
    if ns == NULL or not spdk_nvme_ns_is_active(ns):
        return ABSENT
    _liken(ns, &found)
    if not p.known:
        memcpy(&p.likeness, &found, sizeof(found))
        # LBADS is an exponent (NVM Command Set 1.0, figure 98).
        p.block_shift = 0
        while 1 << p.block_shift < found.block_nbytes:
            p.block_shift += 1
        p.known = True
    return STRANGER if memcmp(&p.likeness, &found, sizeof(found)) else PRESENT


cdef void _poll_admin_queue(Admin *a) noexcept nogil:
    """Takes the controller's answers and events, and compares the namespaces. With `use` held, and
    a controller."""
    cdef Pair *p = a.pairs
    cdef int presence
    cdef bint changed = False
    cdef int rc = spdk_nvme_ctrlr_process_admin_completions(a.ctrlr)
    a.asked_ns = skv_now_ns()
    if rc == -ENXIO and spdk_nvme_ctrlr_is_failed(a.ctrlr) and not a.gone:
        _request_reset(a, -ENODEV)
        return
    while p != NULL:
        presence = _presence(p)
        if presence != p.presence:
            p.presence = presence
            changed = True
        p = p.next
    if changed:
        # SPDK may hold back commands that it would send to the stranger, and only the end of a
        # pair ends them. What was for other namespaces is retried.
        _request_reset(a, -EAGAIN)


cdef bint _ask_for_events(Admin *a, uint64_t interval_ns) noexcept nogil:
    """Before an idle pair submits. False: somebody uses the controller just now, and may be about
    to hear of an event."""
    if interval_ns and skv_now_ns() - a.asked_ns < interval_ns:
        return True
    if pthread_mutex_trylock(&a.use):
        usleep(BUSY_US)
        return False
    if a.ctrlr != NULL and not a.gone and not a.reset_requested:
        _poll_admin_queue(a)
    pthread_mutex_unlock(&a.use)
    return True


cdef void _lose(Pair *p) noexcept nogil:
    """The controller refused a command because it has no such namespace, in the pair's driver: it
    submits nothing more until a reset has found out what the controller has now."""
    p.broken = True
    _request_reset(p.admin, -EAGAIN)
