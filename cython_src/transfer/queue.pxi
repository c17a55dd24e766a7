# The class Queue. Included in transfer.pyx: one C translation unit, so that calls are inlined.


cdef void _free_transfer(Transfer_ *t):
    """Frees a finished transfer and what it kept alive. With the GIL."""
    if t.mark != NULL:
        t.link.release(t.link.self, t.mark)
    if t.copied != NULL:
        t.link.release(t.link.self, t.copied)
    if t.kept != NULL:
        Py_DECREF(<object>t.kept)
    pthread_cond_destroy(&t.finished)
    free(t.segments)
    free(t.places)
    free(t.copies)
    free(t.crcs)
    free(t)


cdef void _free_orphans(Queue_ *q):
    cdef Transfer_ *t
    cdef Transfer_ *following
    if skv_peek_transfer(&q.orphans) == NULL:  # a hint, checked again under the mutex
        return
    pthread_mutex_lock(&q.mutex)
    t = q.orphans
    skv_put_transfer(&q.orphans, NULL)
    pthread_mutex_unlock(&q.mutex)
    while t != NULL:
        following = t.next_incoming
        _free_transfer(t)
        t = following


cdef void _add_op(OpCounters *to, const OpCounters *more) noexcept:
    cdef int i
    to.ios += more.ios
    to.nbytes += more.nbytes
    to.latency_ns += more.latency_ns
    to.transfers += more.transfers
    to.errors += more.errors
    to.took_ns += more.took_ns
    for i in range(SKV_BUCKETS):
        to.latency[i] += more.latency[i]
        to.took[i] += more.took[i]


cdef void _add_counters(Counters *to, const Counters *more) noexcept:
    """Adds what only one transfer at a time added up: nothing of it overlaps with `to`'s own."""
    cdef int op
    for op in range(SKV_OPS):
        _add_op(&to.ops[op], &more.ops[op])
    to.bounced += more.bounced
    to.busy_ns += more.busy_ns
    to.deepest = max(to.deepest, more.deepest)


cdef uint64_t _cpu_ns(Queue_ *q) noexcept:
    """CPU time of the queue's own thread and of the engine's."""
    cdef uint64_t ns = cpu_clock_ns(q.cpu_clock)
    if q.backend.cpu_ns != NULL:
        ns += q.backend.cpu_ns(q.backend.self)
    return ns


cdef dict _quarters(const uint64_t *histogram):
    """Four buckets to each doubling: the time in nanoseconds below which it ends -> its count."""
    cdef dict found = {}
    cdef uint64_t count
    cdef int first, i
    for first in range(0, SKV_BUCKETS, SKV_QUARTER):
        count = 0
        for i in range(first, first + SKV_QUARTER):
            count += histogram[i]
        if count:
            found[skv_bucket_end_ns(first + SKV_QUARTER - 1)] = count
    return found


cdef dict _op_stats(const OpCounters *c):
    return {
        "ios": c.ios, "nbytes": c.nbytes, "latency_ns": c.latency_ns, "transfers": c.transfers,
        "errors": c.errors, "took_ns": c.took_ns, "latency": _quarters(c.latency),
        "took": _quarters(c.took),
    }


@cython.no_gc_clear
cdef class Queue:
    """One engine queue, and the thread that drives it while no caller waits.

    Args:
        backend: An engine's capsule.
        keep: What must outlive the engine.
        depth: Segments kept in flight.
        segment_nbytes: The largest command.
        block_nbytes: The drive's alignment of offsets, a power of two.
        align_nbytes: The drive's alignment of addresses, a power of two.
        slots: Addresses of bounce slots of ``segment_nbytes`` each, for memory that the drive
            cannot reach directly and for transfers over a link.
        pid: This process's number.
        exclusive: It takes one transfer at a time, and only as another's ``lone``.
        lone: An exclusive queue on the same drive, which small transfers use that find this one
            idle and are waited for at once.

    Raises:
        ValueError: The sizes do not fit together.
        OSError: The engine refuses the queue's thread.
    """
    cdef Queue_ *_q
    cdef Queue _lone
    cdef list _keep
    cdef readonly bint closed
    cdef readonly size_t pid

    def __cinit__(self, backend, keep, *, uint32_t depth, uint32_t segment_nbytes,
                  uint32_t block_nbytes, uint32_t align_nbytes, slots, size_t pid,
                  bint exclusive=False, Queue lone=None):
        cdef Queue_ *q
        cdef size_t address
        self.closed = True
        if segment_nbytes % block_nbytes or not depth or not segment_nbytes:
            raise ValueError("segments must be a whole number of blocks, and depth at least 1")
        if segment_nbytes > MOST_SEGMENT_NBYTES:
            raise ValueError(f"segments are at most 1 GiB, not {segment_nbytes} bytes")
        if block_nbytes & (block_nbytes - 1) or align_nbytes & (align_nbytes - 1):
            raise ValueError(
                f"block size {block_nbytes} and alignment {align_nbytes} must be powers of two")
        if not slots and (align_nbytes > 1 or block_nbytes > 1):
            raise ValueError("a drive that needs alignment needs bounce slots")
        q = <Queue_ *>calloc(1, sizeof(Queue_))
        if q == NULL:
            raise MemoryError()
        q.slots = <unsigned char **>calloc(len(slots) + 1, sizeof(void *))
        q.backend = <skv_backend *>PyCapsule_GetPointer(backend, SKV_BACKEND_CAPSULE)
        for address in slots:
            q.slots[q.free_slots] = <unsigned char *>address
            q.free_slots += 1
        q.slots_count = q.free_slots
        q.depth = depth
        q.segment_nbytes = segment_nbytes
        q.block_nbytes = block_nbytes
        q.align_nbytes = align_nbytes
        q.exclusive = exclusive
        q.home = q
        q.bound = q.backend.bind != NULL
        pthread_mutex_init(&q.mutex, NULL)
        init_cond(&q.work)
        init_cond(&q.reapable)
        init_cond(&q.nap)
        self._q = q
        self._keep = [backend, keep]
        self._lone = lone
        self.pid = pid
        if start_thread(&q.thread, _thread_main, q):
            raise MemoryError("the transfer loop's thread could not be started")
        with nogil:
            pthread_mutex_lock(&q.mutex)
            while not q.started:
                pthread_cond_wait(&q.reapable, &q.mutex)
            pthread_mutex_unlock(&q.mutex)
        if q.refused:
            pthread_join(q.thread, NULL)
            raise OSError(-q.refused, f"the engine refuses its thread: {-q.refused}")
        self.closed = False
        if lone is not None:
            lone._q.home = q  # transfers there keep this queue alive
            self.depth = depth

    @property
    def depth(self):
        """Segments kept in flight; may be set at any time."""
        return self._q.depth

    @depth.setter
    def depth(self, uint32_t depth):
        if not depth:
            raise ValueError("depth must be at least 1")
        self._q.depth = depth
        if self._lone is not None:
            self._lone._q.depth = min(depth, <uint32_t>LONE_COUNT)

    @property
    def segment_nbytes(self):
        return self._q.segment_nbytes

    @property
    def active(self):
        """Transfers submitted and not done, including those whose waiters gave up."""
        cdef uint64_t active = skv_peek(&self._q.active)
        return active + (skv_peek(&self._lone._q.active) if self._lone is not None else 0)

    @property
    def written_nbytes(self):
        """Bytes that were written, as in :meth:`stats`, which takes longer."""
        cdef uint64_t written = skv_peek(&self._q.counters.ops[SKV_WRITE].nbytes)
        if self._lone is not None:
            written += skv_peek(&self._lone._q.counters.ops[SKV_WRITE].nbytes)
        return written

    @property
    def slots(self):
        """The number of slots."""
        return self._q.slots_count

    def keep(self, thing):
        """Keeps ``thing`` (such as the slots' memory) alive as long as the queue."""
        self._keep.append(thing)

    def add_slots(self, slots):
        """Adds slots, at the addresses ``slots``, to a queue that was opened without any."""
        cdef Queue_ *q = self._q
        cdef size_t count = len(slots), address
        cdef uint32_t i = 0
        cdef unsigned char **more
        if q.slots_count:
            raise ValueError(f"the queue already has {q.slots_count} slots")
        more = <unsigned char **>calloc(count + 1, sizeof(void *))
        if more == NULL:
            raise MemoryError()
        for address in slots:
            more[i] = <unsigned char *>address
            i += 1
        pthread_mutex_lock(&q.mutex)
        q.more_slots = more
        q.more_slots_count = q.slots_count = i
        skv_set(&q.attention)
        pthread_mutex_unlock(&q.mutex)

    def reap(self):
        """Blocks until transfers that were submitted with ``notify`` are done; returns them.

        An empty list: the queue is closed, or :meth:`stop_reaping` was called.
        """
        cdef Queue_ *q = self._q
        cdef Transfer_ *t
        cdef list done = []
        cdef bint stop = self.pid != _getpid()
        while not done and not stop:
            with nogil:
                pthread_mutex_lock(&q.mutex)
                while q.reap == NULL and q.orphans == NULL and not q.reap_stop:
                    pthread_cond_wait(&q.reapable, &q.mutex)
                t = q.reap
                q.reap = NULL
                stop = q.reap_stop
                pthread_mutex_unlock(&q.mutex)
            while t != NULL:
                done.append(<object>t.handle)
                Py_DECREF(<object>t.handle)
                t.handle = NULL
                t = t.next_incoming
            _free_orphans(q)
        done.reverse()
        return done

    def collect(self):
        """Frees what dropped transfers kept once the drive is done with them; every submission does
        so as well. Does not block."""
        if self.pid == _getpid():
            _free_orphans(self._q)

    def stop_reaping(self):
        """Makes :meth:`reap` return, now and from now on."""
        pthread_mutex_lock(&self._q.mutex)
        self._q.reap_stop = 1
        pthread_cond_broadcast(&self._q.reapable)
        pthread_mutex_unlock(&self._q.mutex)

    def stats(self):
        """Counters since the queue was opened, as a dict. Times are in nanoseconds;
        ``histogram`` maps a latency to the number of commands near it (within 6.25 %). ``ops`` has
        the same of ``read``, ``write``, ``flush`` and ``discard`` each: ``latency`` of commands and
        ``took`` of transfers, from submission to end, map the time below which a bucket ends to
        its count, four buckets to each doubling. ``cpu_ns`` is the CPU time of the threads that are
        the queue's own or its engine's; that of callers which drive it is theirs."""
        cdef Counters c = self._q.counters
        cdef OpCounters all
        cdef int i
        cdef uint64_t cpu_ns = 0 if self.closed else _cpu_ns(self._q)
        if self._lone is not None:
            _add_counters(&c, &self._lone._q.counters)
            cpu_ns += 0 if self._lone.closed else _cpu_ns(self._lone._q)
        memset(&all, 0, sizeof(OpCounters))
        for i in range(SKV_OPS):
            _add_op(&all, &c.ops[i])
        return {
            "ios": all.ios, "read_nbytes": c.ops[SKV_READ].nbytes,
            "written_nbytes": c.ops[SKV_WRITE].nbytes, "transfers": all.transfers,
            "errors": all.errors, "bounced_nbytes": c.bounced, "latency_ns": all.latency_ns,
            "busy_ns": c.busy_ns, "deepest": c.deepest, "cpu_ns": cpu_ns,
            "copies": c.copies, "to_device_nbytes": c.to_device_nbytes,
            "from_device_nbytes": c.from_device_nbytes, "copy_busy_ns": c.copy_busy_ns,
            "overlap_ns": c.overlap_ns,
            "histogram": {
                skv_bucket_ns(i): all.latency[i] for i in range(SKV_BUCKETS) if all.latency[i]
            },
            "ops": {
                "read": _op_stats(&c.ops[SKV_READ]), "write": _op_stats(&c.ops[SKV_WRITE]),
                "flush": _op_stats(&c.ops[SKV_FLUSH]), "discard": _op_stats(&c.ops[SKV_DISCARD]),
            },
        }

    def outcomes(self, uint64_t since):
        """Durations of transfers over links that had a ``plan`` and succeeded.

        ``took_ns`` counts from the submission or from the end of the previous transfer over a
        link, whichever was later: what a lone transfer took, or what a queued one added.

        Args:
            since: The count that the last call returned, or 0.

        Returns:
            The count, and ``(plan, nbytes, took_ns)`` of each in the order they ended; the oldest
            are dropped if there are many.
        """
        cdef Queue_ *q = self._q
        cdef Outcome kept[OUTCOMES]
        cdef uint64_t i, count, first
        # No Python objects while the mutex is held: freeing a transfer takes it.
        pthread_mutex_lock(&q.mutex)
        count = q.outcomes_count
        first = max(since, count - min(count, <uint64_t>OUTCOMES))
        for i in range(first, count):
            kept[i % OUTCOMES] = q.outcomes[i % OUTCOMES]
        pthread_mutex_unlock(&q.mutex)
        found = []
        for i in range(first, count):
            outcome = kept[i % OUTCOMES]
            found.append((outcome.plan, outcome.nbytes, outcome.took_ns))
        return count, found

    def close(self, double timeout_s=30.0):
        """Waits until nothing is in flight, then ends the thread; returns whether it did.

        If the drive is not done within ``timeout_s``, returns False: waiters get ETIMEDOUT, and
        the queue's memory is leaked rather than freed, since the drive may still write to what
        was kept.
        """
        cdef Queue_ *q = self._q
        cdef uint64_t until_ns = skv_now_ns() + <uint64_t>(min(max(timeout_s, 0.0), 1e9) * 1e9)
        cdef bint stopped = False, lone_stopped = True
        if self.closed or self.pid != _getpid():
            self.closed = True
            return True
        self.closed = True
        if self._lone is not None:
            lone_stopped = self._lone.close(timeout_s)
        with nogil:
            pthread_mutex_lock(&q.mutex)
            q.stopping = 1
            q.reap_stop = 1
            pthread_cond_broadcast(&q.work)
            pthread_cond_broadcast(&q.reapable)
            while not q.stopped:
                if wait_until(&q.reapable, &q.mutex, until_ns):
                    break
            if not q.stopped:
                q.giving_up = 1
                q.changed = 1
                _notify_driver(q)
                # This is quick unless the driver itself hangs in the kernel.
                until_ns = skv_now_ns() + 20 * SLICE_NS
                while not q.stopped and not q.gave_up:
                    if wait_until(&q.reapable, &q.mutex, until_ns):
                        break
            stopped = q.stopped
            pthread_mutex_unlock(&q.mutex)
            if stopped:
                pthread_join(q.thread, NULL)
            else:
                pthread_detach(q.thread)
        if not stopped:
            Py_INCREF(self)  # never freed: the drive may still use it
            return False
        _free_orphans(q)
        return lone_stopped

    def __dealloc__(self):
        cdef Queue_ *q = self._q
        if q == NULL or self.pid != _getpid():
            return  # a forked child has none of the threads, and its locks' state is unknown
        if not self.closed:
            # Transfers hold their queue, and none are left: nothing can be in flight.
            with nogil:
                pthread_mutex_lock(&q.mutex)
                q.stopping = 1
                pthread_cond_broadcast(&q.work)
                pthread_mutex_unlock(&q.mutex)
                pthread_join(q.thread, NULL)
        _free_orphans(q)
        pthread_mutex_destroy(&q.mutex)
        pthread_cond_destroy(&q.work)
        pthread_cond_destroy(&q.reapable)
        pthread_cond_destroy(&q.nap)
        free(q.slots)
        free(q.more_slots)
        free(q)
