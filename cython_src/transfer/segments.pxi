# A segment's steps: prepare, submit, complete, follow up. In the driver's thread, without the GIL.
# Included in transfer.pyx: one C translation unit, so that the hot path is inlined.


cdef inline void _todo_push(Queue_ *q, Transfer_ *t) noexcept nogil:
    # Read once: a waiter may raise the priority at any time.
    cdef uint8_t priority = skv_peek_byte(&t.priority)
    t.next_todo = NULL
    t.listed = 1 + priority
    if q.todo[priority] == NULL:
        q.todo[priority] = t
    else:
        q.todo_tail[priority].next_todo = t
    q.todo_tail[priority] = t


cdef void _todo_remove(Queue_ *q, Transfer_ *t) noexcept nogil:
    cdef Transfer_ *previous = NULL
    cdef Transfer_ *at
    cdef int p
    if not t.listed:
        return
    p = t.listed - 1
    at = q.todo[p]
    while at != t:
        previous = at
        at = at.next_todo
    if previous == NULL:
        q.todo[p] = t.next_todo
    else:
        previous.next_todo = t.next_todo
    if q.todo_tail[p] == t:
        q.todo_tail[p] = previous
    t.listed = 0


cdef void _notify(Queue_ *q, Transfer_ *t) noexcept nogil:
    """Queues `t` for the reaper, once. With the mutex held."""
    if not t.notified:
        t.notified = 1
        t.next_incoming = q.reap
        q.reap = t
        pthread_cond_broadcast(&q.reapable)


cdef inline void _count_transfer(Queue_ *q, Transfer_ *t) noexcept nogil:
    cdef OpCounters *counters = &q.counters.ops[t.op]
    # Where nothing was waited for, the cached time may be from before the submission.
    cdef uint64_t now = _clock(q)
    cdef uint64_t took = now - t.started_ns if now > t.started_ns else 0
    counters.transfers += 1
    counters.took_ns += took
    counters.took[skv_bucket(took)] += 1
    if t.status:
        counters.errors += 1


cdef void _finish_transfer(Queue_ *q, Transfer_ *t) noexcept nogil:
    """Ends a transfer that has nothing in flight and wakes its waiters. `t` may be freed when this
    returns."""
    cdef bint orphan
    _todo_remove(q, t)
    if t.previous != NULL:
        t.previous.following = t.following
    else:
        q.all = t.following
    if t.following != NULL:
        t.following.previous = t.previous
    _count_transfer(q, t)
    if t.link != NULL:
        q.linked -= 1
    pthread_mutex_lock(&q.mutex)
    if t.link != NULL:
        _record_outcome(q, t)
    skv_put(&q.active, q.active - 1)
    skv_set(&t.done)
    if t.handle != NULL:
        _notify(q, t)
    orphan = t.handle == NULL and t.orphan
    pthread_cond_broadcast(&t.finished)
    pthread_mutex_unlock(&q.mutex)
    if orphan:
        # A thread with the GIL frees what it kept: the reaper, of which a lone queue has none.
        q = q.home
        pthread_mutex_lock(&q.mutex)
        t.next_incoming = q.orphans
        skv_put_transfer(&q.orphans, t)
        pthread_cond_broadcast(&q.reapable)
        pthread_mutex_unlock(&q.mutex)


cdef inline void _maybe_finish(Queue_ *q, Transfer_ *t) noexcept nogil:
    if t.outstanding == 0 and t.next == t.count:
        _finish_transfer(q, t)


cdef void _stop_submitting(Queue_ *q, Transfer_ *t) noexcept nogil:
    t.next = t.count
    _todo_remove(q, t)


cdef void _fail(Queue_ *q, Segment *s, int status) noexcept nogil:
    cdef Transfer_ *t = s.transfer
    s.failed = 1
    if not t.status:
        t.status = status
        t.failed_segment = <uint32_t>(s - t.segments)
    # The rest would be wasted work.
    _stop_submitting(q, t)


cdef void _finish_segment(Queue_ *q, Segment *s) noexcept nogil:
    cdef Transfer_ *t = s.transfer
    cdef Segment *first = s - s.behind
    if s.slot != NULL:
        first.holders -= 1
        if first.holders == 0:
            q.slots[q.free_slots] = s.slot - (s.offset - first.offset)
            q.free_slots += 1
        s.slot = NULL
    t.outstanding -= 1
    _maybe_finish(q, t)


cdef inline void _follow_up_push(Queue_ *q, Segment *s) noexcept nogil:
    s.next_follow_up = NULL
    s.queued = 1
    if q.follow_up == NULL:
        q.follow_up = s
    else:
        q.follow_up_tail.next_follow_up = s
    q.follow_up_tail = s


cdef inline void _retry(Queue_ *q, Segment *s) noexcept nogil:
    s.next_retry = q.retry
    q.retry = s


cdef void _checksum(Segment *s, uint32_t first, uint32_t last) noexcept nogil:
    """Sums the caller's bytes [first, last) of a segment. Calls for one segment come in order, and
    `first` starts a chunk if there are chunks."""
    cdef uint32_t chunk = s.transfer.chunk_nbytes
    cdef uint32_t take
    cdef unsigned char *at = s.user
    if s.transfer.link != NULL:
        at = s.slot + s.skip
    if s.chunk_crcs == NULL:
        s.crc = skv_crc32c(s.crc if first else 0, at + first, last - first)
        return
    while first < last:
        take = min(chunk, last - first)
        s.chunk_crcs[first // chunk] = skv_crc32c(0, at + first, take)
        first += take


cdef inline void _move(unsigned char *to, const unsigned char *source,
                       uint32_t nbytes) noexcept nogil:
    # A page at a time: for longer copies the C library uses REP MOVSB, which on AMD Zen 3 and 4 is
    # five times slower if source and destination have nearly the same offset within a page, as a
    # tensor (64 bytes into a page) and a slot (at its start) have.
    while nbytes > MOVE_NBYTES:
        memcpy(to, source, MOVE_NBYTES)
        to += MOVE_NBYTES
        source += MOVE_NBYTES
        nbytes -= MOVE_NBYTES
    memcpy(to, source, nbytes)


cdef void _copy(Segment *s) noexcept nogil:
    """Copies between the caller's memory and the slot, and sums.

    Works in blocks that stay in the L1 cache, so that summing a block just copied costs little,
    and prefetches the caller's next block. The caller's side is summed, which covers the copy.
    """
    cdef uint32_t block = COPY_BLOCK_NBYTES, chunk = s.transfer.chunk_nbytes
    cdef uint32_t at = 0, end
    if chunk:
        # Whole chunks, whatever their length.
        block = max(block // chunk, <uint32_t>1) * chunk
    while at < s.nbytes:
        end = min(at + block, s.nbytes)
        if s.transfer.op == SKV_WRITE:
            _move(s.slot + at, s.user + at, end - at)
        else:
            _move(s.user + at, s.slot + s.skip + at, end - at)
        if s.transfer.checksum:
            skv_prefetch(s.user + end, min(block, s.nbytes - end), s.transfer.op == SKV_READ)
            _checksum(s, at, end)
        at = end


cdef void _do_follow_up(Queue_ *q) noexcept nogil:
    """Sums or copies one segment: short enough to poll the drive again afterwards."""
    cdef Segment *s = q.follow_up
    q.follow_up = s.next_follow_up
    s.queued = 0
    q.clock_uses = 0
    # The sums of a failed or expired transfer are not read, and its caller's memory should not
    # change more than the drive changes it.
    if not s.failed and not s.transfer.status:
        if s.slot != NULL and s.transfer.link == NULL:
            _copy(s)
        else:
            _checksum(s, 0, s.nbytes)
            if s.transfer.hand_over:
                _handed_over(q, s.transfer)
    if s.io_done and not s.copying:
        _finish_segment(q, s)


cdef void _end_all(Queue_ *q, Segment *s) noexcept nogil:
    """Ends a segment that was not moved, and its followers, whose transfer has failed. It may be
    freed when this returns."""
    cdef uint32_t count = s.followers + 1, i
    s.followers = 0
    for i in range(count):
        s[i].failed = 1
        s[i].io_done = 1
        if not s[i].queued:
            _finish_segment(q, &s[i])


cdef void _submit_segment(Queue_ *q, Segment *s) noexcept nogil:
    """Hands one segment, with its followers, to the engine, or puts it on the retry list when the
    engine is full."""
    cdef int rc
    s.io.submitted_ns = _clock(q)
    s.io.cold_nbytes = 0
    rc = q.backend.submit(q.backend.self, &s.io)
    if rc == -EAGAIN:
        _retry(q, s)
        return
    if rc < 0:
        _fail(q, s, -rc)
        _end_all(q, s)
        return
    if q.in_flight == 0:
        q.busy_since_ns = s.io.submitted_ns
        q.overlap_since_ns = s.io.submitted_ns
    q.in_flight += 1
    s.in_flight = 1
    if q.in_flight > q.counters.deepest:
        q.counters.deepest = q.in_flight


cdef inline bint _follows(const Segment *s) noexcept nogil:
    """Whether a segment, not the first one, begins on the drive where the one before it ends."""
    return s.offset == s[-1].offset + s[-1].drive_nbytes


cdef inline bint _adjoins(const Segment *s) noexcept nogil:
    """Whether a segment, not the first one, also lies in memory where the one before it ends."""
    return s.user == s[-1].user + s[-1].drive_nbytes


cdef uint32_t _followers(Queue_ *q, Segment *s) noexcept nogil:
    """How many segments behind `s`, the next one of its transfer, its command moves as well."""
    cdef Transfer_ *t = s.transfer
    cdef Segment *last = s
    cdef uint64_t nbytes = s.drive_nbytes
    cdef uint32_t most = t.count - t.next - 1, places = 1, count = 0
    if t.op > SKV_WRITE or t.link != NULL:
        return 0
    if not s.bounce and not q.backend.most_places:
        return 0
    while count < most:
        last += 1
        nbytes += last.drive_nbytes
        if last.bounce != s.bounce or not _follows(last) or nbytes > t.segment_nbytes:
            break
        if not s.bounce and not _adjoins(last):
            places += 1
            if places > q.backend.most_places:
                break
        count += 1
    return count


cdef void _aim(Segment *s) noexcept nogil:
    """Makes its command one that moves this segment alone."""
    s.io.addr = s.slot if s.slot != NULL else s.user
    s.io.places = 0
    s.io.offset = s.offset
    s.io.nbytes = s.drive_nbytes
    s.io.op = s.transfer.op
    s.io.next = NULL
    s.io.crcs = NULL
    s.io.summed = 0


cdef void _prepare_several(Queue_ *q, Segment *s) noexcept nogil:
    """Prepares a segment with its followers, for one command."""
    cdef Segment *last = s + s.followers
    cdef bint apart = False
    cdef uint32_t i
    _prepare(q, s, 0)
    for i in range(1, s.followers + 1):
        _prepare(q, &s[i], i)
        apart |= not _adjoins(&s[i])
    s.io.nbytes = <uint32_t>(last.offset - s.offset) + last.drive_nbytes
    s.io.crcs = NULL  # the engine can only sum a whole segment
    if s.slot == NULL and apart:
        s.io.place = &s.transfer.places[s - s.transfer.segments]
        s.io.places = s.followers + 1


cdef void _prepare(Queue_ *q, Segment *s, uint32_t behind) noexcept nogil:
    """`behind`: how many segments before it is the one whose command moves it."""
    cdef unsigned char *at = s.user
    cdef Segment *first = s - behind
    cdef uint32_t padding
    s.behind = behind
    if s.bounce:
        if behind:
            s.slot = first.slot + (s.offset - first.offset)
        else:
            q.free_slots -= 1
            s.slot = q.slots[q.free_slots]
        first.holders += 1
        at = s.slot
        if s.transfer.link == NULL:
            q.counters.bounced += s.nbytes
            if s.transfer.op == SKV_WRITE:
                _copy(s)
                q.clock_uses = 0
    if s.transfer.op == SKV_WRITE:
        # Bytes that happen to follow in memory must not reach the drive.
        padding = s.drive_nbytes - s.nbytes
        if padding:
            memset(at + s.nbytes, 0, padding)
    _aim(s)
    if s.transfer.op == SKV_READ and s.transfer.checksum and s.slot == NULL:
        s.io.crcs = s.chunk_crcs if s.chunk_crcs != NULL else &s.crc
        s.io.chunk_nbytes = s.transfer.chunk_nbytes
        s.io.sum_nbytes = s.nbytes
    s.transfer.outstanding += 1


cdef void _refill(Queue_ *q) noexcept nogil:
    """Submits until the target depth is reached or nothing is left to submit."""
    cdef Segment *s
    cdef Transfer_ *t
    cdef bint bounced_write
    cdef uint32_t i
    q.more = 0
    while q.in_flight < q.depth:
        s = q.retry
        if s != NULL:
            q.retry = s.next_retry
            if s.transfer.status:
                _end_all(q, s)
                continue
            _submit_segment(q, s)
            if q.retry == s:
                return
            continue
        if q.linked:
            s = q.ready
            if s != NULL:
                q.ready = s.next_retry
                if not _write_copied(q, s):
                    return
                continue
            t = _next_submittable(q)
        else:
            t = q.todo[0] if q.todo[0] != NULL else q.todo[1]
        if t == NULL:
            return
        s = &t.segments[t.next]
        if s.bounce and q.free_slots == 0:
            return
        s.followers = _followers(q, s)
        t.next += 1 + s.followers
        if t.next == t.count:
            _todo_remove(q, t)
        if s.followers:
            _prepare_several(q, s)
        else:
            _prepare(q, s, 0)
        if t.link != NULL and t.op == SKV_WRITE:
            # Into its slot first, then to the drive.
            if not _start_copy(q, s):
                s.io_done = 1
                _finish_segment(q, s)
            continue
        if t.op == SKV_WRITE and t.checksum and not s.bounce:
            # Computed while the drive works, not before it starts.
            for i in range(s.followers + 1):
                _follow_up_push(q, &s[i])
        bounced_write = s.bounce and t.op == SKV_WRITE
        _submit_segment(q, s)
        if q.retry == s:
            return
        if bounced_write:
            # The copy took about as long as the drive needs: submit before the next copy.
            q.more = 1
            return


cdef void _completed(Queue_ *q, Segment *s, uint64_t now) noexcept nogil:
    cdef Transfer_ *t = s.transfer
    cdef int32_t result = s.io.result
    cdef uint32_t needed = s.drive_nbytes
    cdef uint64_t took = now - s.io.submitted_ns
    cdef OpCounters *counters = &q.counters.ops[t.op]
    q.in_flight -= 1
    s.in_flight = 0
    # At every completion: a queue that never runs empty is busy as well.
    q.counters.busy_ns += now - q.busy_since_ns
    q.busy_since_ns = now
    if q.in_flight == 0 and q.copies:
        _count_overlap(q, now)
    counters.ios += 1
    counters.latency_ns += took
    counters.latency[skv_bucket(took)] += 1
    if s.followers:
        _several_completed(q, s)
        return
    if result < 0:
        # The kernel cancels what a thread has in flight when that thread ends, and any thread may
        # have been the driver: a cancellation that was not requested is retried.
        if (result == -EAGAIN or result == -EINTR or result == -ECANCELED) and not t.status:
            _retry(q, s)
            return
        _fail(q, s, -result)
    elif t.op == SKV_READ or t.op == SKV_WRITE:
        counters.nbytes += <uint32_t>result
        if t.op == SKV_READ:
            t.cold_nbytes += s.io.cold_nbytes
            # A file may end inside its last block; only the caller's bytes count.
            needed = s.skip + s.nbytes
        if s.moved + <uint32_t>result < needed:
            # Short: resubmit the rest from a block boundary; fail if there was no progress.
            result -= result % <int32_t>q.block_nbytes
            if result == 0:
                _fail(q, s, ENODATA if t.op == SKV_READ else EIO)
            elif not t.status:
                s.moved += <uint32_t>result
                s.io.addr = <unsigned char *>s.io.addr + result
                s.io.offset += <uint32_t>result
                s.io.nbytes -= <uint32_t>result
                s.io.crcs = NULL  # the engine can only sum a whole segment
                _retry(q, s)
                return
            else:
                s.failed = 1
    _moved(q, s)


cdef void _several_completed(Queue_ *q, Segment *s) noexcept nogil:
    """Handles the end of a command with followers. Its transfer may be freed when this returns."""
    cdef Transfer_ *t = s.transfer
    cdef uint32_t count = s.followers + 1, i
    cdef Segment *last = s + s.followers
    cdef int32_t result = s.io.result
    # As of one segment: a file may end inside its last block.
    cdef uint64_t needed = last.offset - s.offset + (
        last.skip + last.nbytes if t.op == SKV_READ else last.drive_nbytes)
    if result > 0:
        q.counters.ops[t.op].nbytes += <uint32_t>result
    if result >= 0 and <uint32_t>result >= needed:
        s.followers = 0
        for i in range(count):
            _moved(q, &s[i])
    elif t.status:
        _end_all(q, s)
    else:
        s.followers = 0
        for i in range(count, 0, -1):
            _aim(&s[i - 1])
            _retry(q, &s[i - 1])


cdef inline void _moved(Queue_ *q, Segment *s) noexcept nogil:
    """What follows when a segment's command has ended."""
    cdef Transfer_ *t = s.transfer
    s.io_done = 1
    if t.link != NULL and t.op == SKV_READ:
        _read_done(q, s)
    elif (not s.failed and t.op == SKV_READ
            and (s.slot != NULL or t.checksum and not s.io.summed)):
        _follow_up_push(q, s)
    elif not s.queued:
        _finish_segment(q, s)
