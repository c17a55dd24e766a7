# The driver's loop, and how threads pass the driver's role on. Without the GIL.
# Included in transfer.pyx: one C translation unit, so that the hot path is inlined.


cdef void _cancel_in_flight(Queue_ *q, Transfer_ *t) noexcept nogil:
    cdef uint32_t i
    for i in range(t.count):
        if t.segments[i].in_flight:
            q.backend.cancel(q.backend.self, &t.segments[i].io)


cdef void _expire(Queue_ *q, Transfer_ *t) noexcept nogil:
    """Ends the waiting for `t`; its memory stays kept until the drive is done. `t` may be freed
    when this returns."""
    if not t.status and not t.issued:
        t.status = ETIMEDOUT
        t.failed_segment = 0
    _stop_submitting(q, t)
    _cancel_in_flight(q, t)
    pthread_mutex_lock(&q.mutex)
    t.expired = 1
    if t.handle != NULL:
        _notify(q, t)
    pthread_cond_broadcast(&t.finished)
    pthread_mutex_unlock(&q.mutex)
    _maybe_finish(q, t)


cdef uint64_t _check_deadlines(Queue_ *q) noexcept nogil:
    """Fails overdue transfers; returns the next deadline (0: none)."""
    cdef Transfer_ *t = q.all
    cdef Transfer_ *following
    cdef uint64_t now = skv_now_ns(), soonest = 0
    while t != NULL:
        following = t.following
        if t.deadline_ns and not t.expired and not t.issued:
            if t.deadline_ns <= now:
                _expire(q, t)
            elif soonest == 0 or t.deadline_ns < soonest:
                soonest = t.deadline_ns
        t = following
    q.deadlines = soonest != 0
    return soonest


cdef void _apply_changes(Queue_ *q) noexcept nogil:
    """Applies what other threads requested: cancelling, a higher priority, giving up."""
    cdef Transfer_ *t = q.all
    cdef Transfer_ *following
    while t != NULL:
        following = t.following
        if q.giving_up and not t.expired:
            _expire(q, t)
        elif skv_peek_byte(&t.cancelled) and not t.status and not t.issued:
            t.status = ECANCELED
            t.failed_segment = 0
            _stop_submitting(q, t)
            _maybe_finish(q, t)
        elif t.listed and t.listed != 1 + skv_peek_byte(&t.priority):
            _todo_remove(q, t)
            _todo_push(q, t)
        t = following
    if q.giving_up:
        pthread_mutex_lock(&q.mutex)
        q.gave_up = 1
        pthread_cond_broadcast(&q.reapable)
        pthread_mutex_unlock(&q.mutex)


cdef void _take_incoming(Queue_ *q) noexcept nogil:
    """Takes over submitted transfers. With the mutex held."""
    cdef Transfer_ *t = q.incoming
    cdef Transfer_ *following
    q.incoming = q.incoming_tail = NULL
    while t != NULL:
        following = t.next_incoming
        t.previous = NULL
        t.following = q.all
        if q.all != NULL:
            q.all.previous = t
        q.all = t
        _todo_push(q, t)
        if t.link != NULL:
            q.linked += 1
        if t.deadline_ns:
            q.deadlines = 1
        if t.cancelled:
            q.changed = 1
        t = following


cdef void _take_slots(Queue_ *q) noexcept nogil:
    """Takes over added slots, the first that the queue has. With the mutex held."""
    free(q.slots)
    q.slots = q.more_slots
    q.free_slots = q.more_slots_count
    q.more_slots = NULL


cdef inline bint _is_over(Transfer_ *t) noexcept nogil:
    """Whether waiting for `t` is over. With the mutex held, or in the driver, which alone writes
    these."""
    return t.done or t.expired or t.issued


cdef inline bint _is_reached(Queue_ *q, Transfer_ *target) noexcept nogil:
    """Whether the driver's goal is reached; for a `target` of NULL, whether nothing is active."""
    return _is_over(target) if target != NULL else skv_peek(&q.active) == 0


cdef inline uint64_t _clock(Queue_ *q) noexcept nogil:
    """The time, to within a few commands."""
    if q.clock_uses == 0:
        q.clock_ns = skv_now_ns()
        q.clock_uses = CLOCK_USES
    q.clock_uses -= 1
    return q.clock_ns


cdef inline int _take_completions(Queue_ *q, int64_t wait) noexcept nogil:
    """Waits at most `wait` for completions; returns their number, or the engine's -errno."""
    cdef skv_io *done[BATCH]
    cdef uint64_t now
    cdef int i, n, least = 1
    if wait and q.in_flight >= GATHER_FROM and not q.linked:
        # The drive stays busy meanwhile. A link would not: each segment that ends is copied on.
        if q.singly:
            q.singly -= 1
        else:
            least = min(GATHER, <int>(q.in_flight // 8))
            wait = min(wait, <int64_t>GATHER_NS)
    n = q.backend.poll(q.backend.self, done, BATCH, least, wait)
    if n < least and least > 1:
        q.singly = GATHER_AFTER
    q.clock_uses = 0
    if n > 0:
        now = _clock(q)
        for i in range(n):
            _completed(q, <Segment *>done[i], now)
    return n


cdef bint _drive(Queue_ *q, Transfer_ *target, uint64_t until_ns) noexcept nogil:
    """Drives until `target` is over (NULL: until nothing is active) or `until_ns` (0: never).

    Returns whether it ended for the first reason.
    """
    cdef int64_t wait
    cdef uint64_t now, wake_at
    cdef int n
    cdef bint changed, asked
    q.clock_uses = 0
    while True:
        changed = False
        if skv_is_set(&q.attention):
            pthread_mutex_lock(&q.mutex)
            q.attention = 0
            if q.incoming != NULL:
                _take_incoming(q)
            if q.more_slots != NULL:
                _take_slots(q)
            changed = q.changed
            q.changed = 0
            asked = q.asked
            q.asked = 0
            pthread_mutex_unlock(&q.mutex)
            if asked:
                q.backend.serve(q.backend.self)
        if _is_reached(q, target):
            return True
        if changed:
            _apply_changes(q)
        if q.copies:
            _poll_copies(q)
        _refill(q)
        wait = 0
        wake_at = until_ns
        if q.deadlines:
            now = _check_deadlines(q)
            if now and (wake_at == 0 or now < wake_at):
                wake_at = now
        now = _clock(q)
        # Also with work left: a Python thread has to check for signals.
        if until_ns and now >= until_ns:
            return False
        if q.follow_up == NULL and not q.more:
            # Bounded, so that a lost wake-up costs a delay and never a hang.
            wait = SLICE_NS
            if wake_at and wake_at < now + SLICE_NS:
                wait = <int64_t>(wake_at - now) if wake_at > now else 0
            if q.copies:
                wait = min(wait, _copy_wait_ns(q, now))
            if _is_reached(q, target):
                wait = 0
            elif q.copies and not q.in_flight:
                # No completion is due, and an engine without a drive would not wait.
                pthread_mutex_lock(&q.mutex)
                if not q.attention:
                    _sleep(q, now, wait)
                pthread_mutex_unlock(&q.mutex)
                wait = 0
            elif skv_peek_byte(&q.polling) != 1:
                # Stays set until the engine is woken, so that most turns need no mutex.
                pthread_mutex_lock(&q.mutex)
                if q.attention:
                    wait = 0
                else:
                    skv_put_byte(&q.polling, 1)
                pthread_mutex_unlock(&q.mutex)
        n = _take_completions(q, wait)
        if n == -EINTR and target != NULL and until_ns:
            return False
        if q.follow_up != NULL:
            if n > 0:
                # Keep the drive busy first.
                _refill(q)
                _take_completions(q, 0)
            if q.follow_up != NULL:
                _do_follow_up(q)


cdef void _stop_driving(Queue_ *q) noexcept nogil:
    """Gives up the driver's role; the queue's own thread continues if there is work left."""
    pthread_mutex_lock(&q.mutex)
    q.driven = 0
    skv_put_byte(&q.polling, 0)
    if q.active or q.stopping:
        pthread_cond_signal(&q.work)
    pthread_mutex_unlock(&q.mutex)


cdef void *_thread_main(void *argument) noexcept nogil:
    cdef Queue_ *q = <Queue_ *>argument
    cdef int refused = 0
    q.cpu_clock = own_cpu_clock()
    if q.bound:
        refused = q.backend.bind(q.backend.self, _ask, q)
    pthread_mutex_lock(&q.mutex)
    q.refused = refused
    q.started = 1
    pthread_cond_broadcast(&q.reapable)
    while not refused:
        if q.asked and not q.driven:
            q.asked = 0
            pthread_mutex_unlock(&q.mutex)
            q.backend.serve(q.backend.self)
            pthread_mutex_lock(&q.mutex)
            continue
        if q.active and not q.driven:
            q.driven = 1
            pthread_mutex_unlock(&q.mutex)
            _drive(q, NULL, 0)
            pthread_mutex_lock(&q.mutex)
            q.driven = 0
            skv_put_byte(&q.polling, 0)
            continue
        # Not while a waiter drives: it may be about to poll an engine that close() frees.
        if q.stopping and not q.active and not q.driven:
            break
        pthread_cond_wait(&q.work, &q.mutex)
    if q.bound and not refused:
        pthread_mutex_unlock(&q.mutex)
        q.backend.unbind(q.backend.self)
        pthread_mutex_lock(&q.mutex)
    q.stopped = 1
    pthread_cond_broadcast(&q.reapable)
    pthread_mutex_unlock(&q.mutex)
    return NULL


cdef inline void _wake(Queue_ *q) noexcept nogil:
    """With the mutex held: otherwise close() could have freed the engine and its descriptor."""
    if q.polling == 1:
        # Once is enough: the engine remembers it until the driver's next poll.
        skv_put_byte(&q.polling, 0)
        q.backend.wake(q.backend.self)
    elif q.polling:
        pthread_cond_signal(&q.nap)


cdef inline void _notify_driver(Queue_ *q) noexcept nogil:
    """Signals new work or a change to the driver. With the mutex held."""
    skv_set(&q.attention)
    _wake(q)


cdef void _ask(void *queue) noexcept nogil:
    """Has the queue's own thread serve the engine."""
    cdef Queue_ *q = <Queue_ *>queue
    pthread_mutex_lock(&q.mutex)
    q.asked = 1
    _notify_driver(q)
    if not q.driven:
        pthread_cond_signal(&q.work)
    pthread_mutex_unlock(&q.mutex)


cdef int _enqueue(Queue_ *q, Transfer_ *t, bint wake_thread) noexcept nogil:
    """Gives `t` to the driver; -ESHUTDOWN if the queue is closing, -EBUSY if it takes one transfer
    at a time and has one."""
    cdef int refused = 0
    pthread_mutex_lock(&q.mutex)
    if q.stopping:
        refused = -ESHUTDOWN
    elif q.exclusive and q.active:
        refused = -EBUSY
    if refused:
        pthread_mutex_unlock(&q.mutex)
        return refused
    t.next_incoming = NULL
    if q.incoming == NULL:
        q.incoming = t
    else:
        q.incoming_tail.next_incoming = t
    q.incoming_tail = t
    skv_put(&q.active, q.active + 1)
    if not q.driven and (wake_thread or q.bound):
        pthread_cond_signal(&q.work)
    _notify_driver(q)
    pthread_mutex_unlock(&q.mutex)
    return 0


cdef int _wait(Queue_ *q, Transfer_ *t, uint64_t until_ns) noexcept nogil:
    """Waits until `t` is over or `until_ns`; drives the queue if no other thread does or has to."""
    cdef bint over
    pthread_mutex_lock(&q.mutex)
    while not _is_over(t):
        if not q.driven and not q.bound:
            q.driven = 1
            pthread_mutex_unlock(&q.mutex)
            _drive(q, t, until_ns)
            _stop_driving(q)
            pthread_mutex_lock(&q.mutex)
            break
        if wait_until(&t.finished, &q.mutex, until_ns):
            break
    over = _is_over(t)
    pthread_mutex_unlock(&q.mutex)
    return over
