# Copies between slots and GPU memory, in the driver's thread; nothing here waits for a link.
# Included in transfer.pyx: one C translation unit, so that the hot path is inlined.


cdef bint _start_copy(Queue_ *q, Segment *s) noexcept nogil:
    """Starts the copy of a segment that has its slot. False: it failed, and so did the transfer."""
    cdef Transfer_ *t = s.transfer
    cdef skv_link *link = t.link
    cdef Copy *c = &t.copies[s - t.segments]
    cdef int direction = SKV_FROM_DEVICE if t.op == SKV_WRITE else SKV_TO_DEVICE
    cdef int rc = 0
    if t.mark != NULL:
        rc = link.after(link.self, direction, t.mark)
        link.release(link.self, t.mark)
        t.mark = NULL
    if rc == 0:
        t.to_copy -= 1
        c.segment = s
        c.copy.host = s.slot + s.skip
        c.copy.device = <uint64_t><size_t>s.user
        c.copy.nbytes = s.nbytes
        c.copy.direction = direction
        c.copy.hold = t.hand_over and t.to_copy == 0
        rc = link.copy(link.self, &c.copy)
    if rc < 0:
        _fail(q, s, -rc)
        return False
    if c.copy.hold:
        t.copied = c.copy.event
    c.started_ns = skv_now_ns()
    if link.ns_per_byte[direction] > 0:
        q.link_free_ns[direction] = (
            max(c.started_ns, q.link_free_ns[direction]) + link.latency_ns[direction]
            + <uint64_t>(<double>s.nbytes * link.ns_per_byte[direction]))
        c.copy.due_ns = q.link_free_ns[direction]
    c.next = NULL
    if q.copies == 0:
        q.copy_since_ns = q.overlap_since_ns = c.started_ns
        q.copying = c
    else:
        q.copying_tail.next = c
    q.copying_tail = c
    q.copies += 1
    s.copying = 1
    return True


cdef void _handed_over(Queue_ *q, Transfer_ *t) noexcept nogil:
    """Counts a segment that is read, summed and being copied. After the last one only a stream
    still has to wait."""
    t.to_hand_over -= 1
    if t.to_hand_over or t.status:
        return
    pthread_mutex_lock(&q.mutex)
    t.issued = 1
    if t.handle != NULL:
        _notify(q, t)
    pthread_cond_broadcast(&t.finished)
    pthread_mutex_unlock(&q.mutex)


cdef void _read_done(Queue_ *q, Segment *s) noexcept nogil:
    """A read segment is in its slot. The copy starts first: the checksum runs during it."""
    cdef Transfer_ *t = s.transfer
    if s.failed or t.status or not _start_copy(q, s):
        _finish_segment(q, s)
    elif t.checksum:
        _follow_up_push(q, s)
    elif t.hand_over:
        _handed_over(q, t)


cdef inline void _count_overlap(Queue_ *q, uint64_t now) noexcept nogil:
    # An overlap that started after `now` was taken counts for nothing yet.
    if now > q.overlap_since_ns:
        q.counters.overlap_ns += now - q.overlap_since_ns


cdef void _copied(Queue_ *q, Copy *c, uint64_t now) noexcept nogil:
    """Handles a copy's end. Its transfer may be freed when this returns."""
    cdef Segment *s = c.segment
    cdef Transfer_ *t = s.transfer
    s.copying = 0
    q.copies -= 1
    q.counters.copies += 1
    if q.copies == 0:
        q.counters.copy_busy_ns += now - q.copy_since_ns
        if q.in_flight:
            _count_overlap(q, now)
    if c.copy.result < 0:
        _fail(q, s, -c.copy.result)
    elif t.op == SKV_WRITE:
        q.counters.from_device_nbytes += s.nbytes
    else:
        q.counters.to_device_nbytes += s.nbytes
    if t.op == SKV_WRITE and not t.status:
        s.next_retry = NULL
        if q.ready == NULL:
            q.ready = s
        else:
            q.ready_tail.next_retry = s
        q.ready_tail = s
        return
    s.io_done = 1
    if not s.queued:
        _finish_segment(q, s)


cdef void _poll_copies(Queue_ *q) noexcept nogil:
    """Collects the copies that have ended."""
    cdef Copy *c = q.copying
    cdef Copy *last = NULL
    cdef Copy *following
    cdef skv_link *link
    cdef skv_link *busy[2]
    cdef uint64_t now = skv_now_ns()
    busy[0] = busy[1] = NULL
    q.copying = NULL
    while c != NULL:
        following = c.next
        link = c.segment.transfer.link
        # Copies of one direction end in order: behind an unfinished one all are unfinished.
        if link == busy[c.copy.direction] or not link.done(link.self, &c.copy):
            busy[c.copy.direction] = link
            if last == NULL:
                q.copying = c
            else:
                last.next = c
            last = c
            c.next = NULL
        else:
            _copied(q, c, now)
        c = following
    q.copying_tail = last


cdef bint _write_copied(Queue_ *q, Segment *s) noexcept nogil:
    """Writes a segment whose bytes are in its slot. False: the engine is full."""
    if s.transfer.status:
        s.io_done = 1
        _finish_segment(q, s)
        return True
    if s.transfer.checksum:
        _follow_up_push(q, s)
    _submit_segment(q, s)
    return q.retry != s


cdef Transfer_ *_next_submittable(Queue_ *q) noexcept nogil:
    """The first transfer with a segment that may be submitted now: a slow or hung link delays only
    transfers that need its slots."""
    cdef Transfer_ *t
    cdef int priority, searched
    for priority in range(2):
        t = q.todo[priority]
        searched = 0
        while t != NULL and searched < TODO_SEARCH_LIMIT:
            if ((q.free_slots or not t.segments[t.next].bounce)
                    and (not t.window or t.outstanding < t.window)):
                return t
            t = t.next_todo
            searched += 1
    return NULL


cdef int64_t _copy_wait_ns(Queue_ *q, uint64_t now) noexcept nogil:
    """Nanoseconds until the copies should be polled again."""
    cdef Copy *c = q.copying
    cdef Transfer_ *t = c.segment.transfer
    cdef uint64_t due = c.copy.due_ns, late
    if q.in_flight >= q.depth and q.free_slots and t.next < t.count:
        # Nothing waits for the slot or the transfer: poll with the drive's next completion.
        return COPY_POLL_MAX_NS
    if due == 0:
        return COPY_POLL_NS
    if not q.free_slots and t.op == SKV_READ and q.copying_tail.copy.due_ns > due:
        # The link is busy and the drive has no free slot: collect half of the copies at once.
        due += (q.copying_tail.copy.due_ns - due) // 2
    if due > now:
        return <int64_t>(due - now)
    late = now - due
    return min(<int64_t>(COPY_POLL_NS + late // 4), <int64_t>COPY_POLL_MAX_NS)


cdef void _sleep(Queue_ *q, uint64_t now, int64_t wait) noexcept nogil:
    """Sleeps for `wait`, or until another thread wakes the driver. With the mutex held."""
    cdef int slack
    if wait < SLEEP_MIN_NS:
        pthread_mutex_unlock(&q.mutex)
        sched_yield()
        pthread_mutex_lock(&q.mutex)
        return
    skv_put_byte(&q.polling, 2)
    # The kernel's default timer slack is 50 us, which is longer than a copy.
    slack = prctl(PR_GET_TIMERSLACK, 0)
    prctl(PR_SET_TIMERSLACK, 1)
    wait_until(&q.nap, &q.mutex, now + <uint64_t>wait)
    if slack > 0:
        prctl(PR_SET_TIMERSLACK, <unsigned long>slack)
    skv_put_byte(&q.polling, 0)


cdef void _record_outcome(Queue_ *q, Transfer_ *t) noexcept nogil:
    """Records how long a transfer over a link took. With the mutex held."""
    cdef uint64_t now = skv_now_ns()
    cdef Outcome *outcome = &q.outcomes[q.outcomes_count % OUTCOMES]
    if t.plan and not t.status:
        outcome.plan = t.plan
        outcome.nbytes = t.nbytes
        outcome.took_ns = now - max(t.started_ns, q.ended_ns)
        q.outcomes_count += 1
    q.ended_ns = now
