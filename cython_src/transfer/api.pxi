# The class Transfer. Included in transfer.pyx: one C translation unit, so that calls are inlined.

# As C integers: Cython compares with a literal beyond 32 bits as with a Python object, which took
# more time than all the rest of adding a piece.
# Bytes of a piece; discarding that many takes a million segments.
cdef uint64_t MOST_NBYTES = 1ULL << 50
# Bytes before a piece, on the drive or in memory: sums with those above stay far from 2**64.
cdef uint64_t MOST_OFFSET = 1ULL << 62


@cython.no_gc_clear
cdef class Transfer:
    """One request to a queue: pieces, one completion.

    Add pieces, then :meth:`run` (submit and wait), or :meth:`submit` and later :meth:`wait`.
    What was given to :meth:`keep` lives until the drive is done with the transfer, whatever
    happens to this object. One thread builds a transfer; any thread may wait for it.

    Args:
        queue: The queue that carries it.
        op: READ, WRITE, FLUSH or DISCARD.
        checksum: Compute CRC32C over the callers' bytes.
        chunk_nbytes: One CRC per that many bytes of a piece (a whole number of blocks that
            divides the segments); 0: one per piece.
        segment_nbytes: Segment size (whole blocks, at most the queue's); 0: the queue's.
        window: Most segments outstanding at once; 0: only the queue's depth limits them.
        plan: The number under which :meth:`Queue.outcomes` reports it; 0: not reported.
        link: The pieces' addresses are GPU memory, and each segment goes through a slot and over
            this link. What its ``register`` returned for the slots must outlive the queue.
        stream: Handle of a stream: copies run after what it holds when the transfer is submitted.
        hand_over: For reads. Waiting ends once everything is read and summed and all copies are
            started; :meth:`wait` then makes ``stream`` wait for the last copy. Call it also
            after learning of the end from a future. Kept objects live until the copies are done.

    Raises:
        ValueError: The arguments contradict each other or the queue.
    """
    cdef Transfer_ *_t
    cdef Piece *_pieces
    cdef uint32_t _count
    cdef uint32_t _room
    cdef bint _submitted
    cdef readonly Queue queue
    cdef readonly object link
    cdef object _stream
    cdef public object on_done

    def __cinit__(self, Queue queue not None, int op, *, bint checksum=False,
                  uint32_t chunk_nbytes=0, uint32_t segment_nbytes=0, uint32_t window=0,
                  uint32_t plan=0, link=None, stream=None, bint hand_over=False):
        cdef Queue_ *q = queue._q
        cdef skv_link *functions = NULL
        if op < SKV_READ or op > SKV_DISCARD:
            raise ValueError(f"unknown operation {op}")
        segment_nbytes = segment_nbytes or q.segment_nbytes
        if segment_nbytes % q.block_nbytes or segment_nbytes > q.segment_nbytes:
            raise ValueError(
                f"segments must be whole blocks of {q.block_nbytes} bytes, at most "
                f"{q.segment_nbytes}, not {segment_nbytes}")
        if chunk_nbytes and (chunk_nbytes % q.block_nbytes or segment_nbytes % chunk_nbytes):
            raise ValueError(
                f"checksum chunks of {chunk_nbytes} bytes do not divide segments of "
                f"{segment_nbytes}, or are not whole blocks of {q.block_nbytes}")
        if link is not None:
            if op > SKV_WRITE or not q.slots_count:
                raise ValueError("a link carries only reads and writes, on a queue with slots")
            functions = <skv_link *>PyCapsule_GetPointer(link.capsule, SKV_LINK_CAPSULE)
        if hand_over and (functions == NULL or functions.follow == NULL or stream is None
                          or op != SKV_READ):
            raise ValueError("hand_over needs a read, a stream, and a link that supports streams")
        self._t = <Transfer_ *>calloc(1, sizeof(Transfer_))
        if self._t == NULL:
            raise MemoryError()
        init_cond(&self._t.finished)
        self.queue = queue
        self._t.queue = q
        self._t.op = op
        self._t.checksum = checksum
        self._t.chunk_nbytes = chunk_nbytes
        self._t.segment_nbytes = segment_nbytes
        self._t.window = window
        self._t.plan = plan
        self._t.link = functions
        self._t.hand_over = hand_over
        self.link = link
        self._stream = stream
        kept = [queue, link]
        self._t.kept = <PyObject *>kept
        Py_INCREF(kept)

    def keep(self, thing):
        """Keeps ``thing`` (a lease, a buffer, a tensor) alive until the last completion."""
        (<list>self._t.kept).append(thing)

    def add(self, uint64_t offset, size_t address, uint64_t nbytes, uint64_t capacity=0):
        """Adds a piece: ``nbytes`` at the drive's ``offset``, to or from memory at ``address``.

        ``capacity``: bytes at ``address`` that the transfer may use, at least ``nbytes``; if they
        cover the last block in full, it needs no copy. Writes start at a whole block and pad the
        last one with zeros. Raises ValueError.
        """
        self._add(offset, address, nbytes, capacity)

    cdef int _add(self, uint64_t offset, size_t address, uint64_t nbytes,
                  uint64_t capacity) except -1:
        cdef Queue_ *q = self._t.queue
        cdef uint32_t misplaced = offset & (q.block_nbytes - 1)
        cdef Piece *p
        if self._submitted:
            raise ValueError("the transfer was already submitted")
        if nbytes > MOST_NBYTES or offset > MOST_OFFSET:
            raise ValueError(f"no drive has {nbytes} bytes at offset {offset}")
        if capacity > MOST_OFFSET or address > MOST_OFFSET:
            raise ValueError(f"no memory has {max(nbytes, capacity)} bytes at address {address:#x}")
        if misplaced and (self._t.op != SKV_READ or self._t.chunk_nbytes):
            raise ValueError(
                f"offset {offset} is not a multiple of the block size {q.block_nbytes}")
        if self._count == self._room:
            self._grow()
        p = &self._pieces[self._count]
        memset(p, 0, sizeof(Piece))
        p.offset = offset
        p.address = <unsigned char *>address
        p.nbytes = nbytes
        p.capacity = max(nbytes, capacity)
        self._count += 1
        return 0

    def add_many(self, const uint64_t[::1] offsets not None, const uint64_t[::1] addresses not None,
                 const uint64_t[::1] nbytes not None):
        """Adds one piece per element of three equally long arrays."""
        cdef Py_ssize_t i
        if offsets.shape[0] != addresses.shape[0] or offsets.shape[0] != nbytes.shape[0]:
            raise ValueError("offsets, addresses and nbytes differ in length")
        for i in range(offsets.shape[0]):
            self._add(offsets[i], addresses[i], nbytes[i], 0)

    cdef _grow(self):
        cdef uint64_t room = max(8, 2 * <uint64_t>self._room)
        cdef void *grown = NULL
        if room <= MOST_COUNT:
            grown = realloc(self._pieces, room * sizeof(Piece))
        if grown == NULL:
            raise MemoryError()
        self._pieces = <Piece *>grown
        self._room = <uint32_t>room

    cdef _mark(self):
        """Records an event after what is queued on the caller's stream."""
        cdef skv_link *link = self._t.link
        cdef size_t stream
        cdef int rc = 0
        if self._stream is None or link == NULL or link.mark == NULL or self._t.mark != NULL:
            return
        stream = self._stream
        with nogil:
            rc = link.mark(link.self, <void *>stream, &self._t.mark)
        self._check_link(rc)

    cdef _follow(self):
        cdef skv_link *link = self._t.link
        cdef size_t stream = self._stream
        cdef int rc
        with nogil:
            rc = link.follow(link.self, <void *>stream, self._t.copied)
        self._check_link(rc)

    cdef _check_link(self, int rc):
        if rc < 0:
            raise DeviceError(
                f"the stream and the transfer cannot wait for each other: "
                f"{self.link.explain(-rc - SKV_LINK_STATUS)}", status=-rc)

    cdef bint _may_go_alone(self):
        """Whether the caller submits it itself, on the queue for that."""
        cdef Transfer_ *t = self._t
        cdef uint32_t i, slots = 0
        if (self.queue._lone is None or skv_peek(&t.queue.active) or t.op > SKV_WRITE
                or t.link != NULL or t.window or not 1 <= t.count <= LONE_COUNT
                or t.nbytes > LONE_NBYTES):
            return False
        for i in range(t.count):
            slots += t.segments[i].bounce and not (
                i and t.segments[i - 1].bounce and _follows(&t.segments[i]))
        return slots <= self.queue._lone._q.slots_count

    cdef _submit(self, timeout_s, int priority, bint notify, bint waits):
        cdef Queue_ *q = self._t.queue
        cdef double limit
        cdef int refused = -EBUSY
        if self._submitted:
            raise ValueError("the transfer was already submitted")
        self._check_fork()
        if self.queue.closed:
            raise ClosedError("the engine is closed")
        if timeout_s is not None:
            limit = timeout_s
            if not 0 < limit < 1e9:
                raise ValueError(f"timeout_s must be a positive number, not {timeout_s!r}")
            self._t.deadline_ns = skv_now_ns() + <uint64_t>(limit * 1e9)
        _cut(self._t, self._pieces, self._count)
        self._mark()
        _free_orphans(q)
        self._t.nbytes = self.nbytes
        self._t.started_ns = skv_now_ns()
        self._submitted = True
        self._t.priority = PREFETCH if priority else DEMAND
        if notify:
            self._t.handle = <PyObject *>self
            Py_INCREF(self)
        if self._t.count == 0:
            pthread_mutex_lock(&q.mutex)
            skv_set(&self._t.done)
            if notify:
                _notify(q, self._t)
            pthread_mutex_unlock(&q.mutex)
            return
        # With the GIL: the mutex is never held over a wait, and releasing and retaking the GIL
        # would take longer than this call.
        if waits and self._may_go_alone():
            self._t.queue = self.queue._lone._q
            refused = _enqueue(self._t.queue, self._t, False)
            if refused:
                self._t.queue = q
        if refused == -EBUSY:
            refused = _enqueue(q, self._t, not waits)
        if refused:
            self._submitted = False
            if notify:
                self._t.handle = NULL
                Py_DECREF(self)
            raise ClosedError("the engine is closed")

    cdef _check_fork(self):
        if self.queue.pid != _getpid():
            raise ClosedError(
                f"this transfer belongs to process {self.queue.pid}, the parent of this one")

    cdef bint _over(self):
        """Whether it is done. Takes the mutex, which also makes the driver's writes visible."""
        cdef bint done
        if not self._submitted or self.queue.pid != _getpid():
            return self._t.done
        pthread_mutex_lock(&self._t.queue.mutex)
        done = self._t.done
        pthread_mutex_unlock(&self._t.queue.mutex)
        return done

    cdef bint _waited(self):
        """Whether waiting for it is over."""
        cdef bint over
        if not self._submitted or self.queue.pid != _getpid():
            return self._t.done
        pthread_mutex_lock(&self._t.queue.mutex)
        over = _is_over(self._t)
        pthread_mutex_unlock(&self._t.queue.mutex)
        return over

    def submit(self, timeout_s=None, int priority=0, bint notify=False):
        """Starts the transfer and returns at once.

        ``timeout_s``: deadline, from now. ``priority``: DEMAND precedes PREFETCH. ``notify``:
        :meth:`Queue.reap` returns this object when it is done.
        """
        self._submit(timeout_s, priority, notify, False)

    def run(self, timeout_s=None):
        """Submits and waits. Blocks without the GIL; returns what :meth:`wait` does.

        Nobody else was promised the transfer, so an exception of a signal handler
        (KeyboardInterrupt) cancels it, and propagates once commands in flight have ended; a second
        one propagates at once, and the memory stays kept until the drive is done.
        """
        self._submit(timeout_s, 0, False, True)
        return self._await(0, True)

    def wait(self, timeout_s=None):
        """Blocks, without the GIL, until the transfer is done or past its deadline.

        Returns the status: 0, or the errno of the first failure; None where that takes longer than
        ``timeout_s`` seconds. An exception of a signal handler (KeyboardInterrupt) propagates at
        once. Neither ends more than this wait: the transfer goes on.

        With ``hand_over`` the stream waits for the bytes from here on; DeviceError if it cannot.
        """
        cdef uint64_t until = 0
        cdef double limit
        if timeout_s is not None:
            limit = timeout_s
            until = skv_now_ns() + <uint64_t>(max(0.0, min(limit, 1e9)) * 1e9)
        return self._await(until, False)

    cdef _await(self, uint64_t until_ns, bint drain):
        """``until_ns``: when to give up, 0 for never. ``drain``: an interrupt cancels the
        transfer."""
        cdef Transfer_ *t = self._t
        cdef Queue_ *q = t.queue
        cdef bint over = self._waited()
        cdef uint64_t now
        if not self._submitted:
            raise ValueError("the transfer was not submitted")
        if not over:
            self._check_fork()
        if not over and skv_peek_byte(&t.priority) != DEMAND:
            self._change(False)
        while not over:
            now = skv_now_ns()
            if until_ns and until_ns <= now:
                return None
            now += SLICE_NS
            if until_ns and until_ns < now:
                now = until_ns
            with nogil:
                over = _wait(q, t, now)
            if not over:
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    if drain:
                        self._drain()
                    raise
        if t.copied != NULL and not t.status:
            self._follow()
        if self._over():
            (<list>t.kept).clear()
        return t.status

    cdef _change(self, bint cancel):
        cdef Queue_ *q = self._t.queue
        self._check_fork()
        pthread_mutex_lock(&q.mutex)
        if cancel:
            skv_put_byte(&self._t.cancelled, 1)
        else:
            skv_put_byte(&self._t.priority, DEMAND)
        q.changed = 1
        _notify_driver(q)
        pthread_mutex_unlock(&q.mutex)

    cdef _drain(self):
        cdef bint over = False
        self._change(True)
        while not over:
            with nogil:
                over = _wait(self._t.queue, self._t, skv_now_ns() + SLICE_NS)
            PyErr_CheckSignals()

    def cancel(self):
        """Stops submitting the rest; commands in flight still run to their end."""
        self._change(True)

    @property
    def done(self):
        """Whether the drive is done with it, which may be later than `wait` returns."""
        return bool(self._over())

    @property
    def in_flight(self):
        """Whether the drive may still touch what was kept."""
        return self._submitted and not self._over()

    @property
    def status(self):
        """0, or the errno of the first failure so far."""
        return self._t.status

    @property
    def op(self):
        return self._t.op

    @property
    def nbytes(self):
        """The callers' bytes in all pieces."""
        cdef uint64_t total = 0
        cdef uint32_t i
        for i in range(self._count):
            total += self._pieces[i].nbytes
        return total

    @property
    def cold_nbytes(self):
        """Bytes of a read through a cache that had to come from the drive."""
        # Blocks are filled whole, and one may be evicted and filled again within a transfer.
        return min(self._t.cold_nbytes, <uint64_t>self.nbytes)

    @property
    def failure(self):
        """(drive offset, nbytes) of the command that failed first, or None."""
        cdef Segment *s
        if not self._t.status or not self._t.count:
            return None
        s = &self._t.segments[self._t.failed_segment]
        return s.offset, s.drive_nbytes

    def crc(self, uint32_t piece=0, uint32_t count=1):
        """CRC32C of a piece of a finished transfer with ``checksum`` and without chunks, or of so
        many from there on, one behind the other."""
        cdef uint32_t crc = 0, i
        cdef Piece *last
        cdef Segment *first
        cdef Segment *s
        if not count or piece >= self._count or count > self._count - piece:
            raise IndexError(piece)
        first = &self._t.segments[self._pieces[piece].first_segment]
        last = &self._pieces[piece + count - 1]
        for i in range(last.first_segment + last.segments - self._pieces[piece].first_segment):
            s = &first[i]
            crc = skv_crc32c_combine(crc, s.crc, s.nbytes) if i else s.crc
        return crc

    def chunk_crcs(self, uint32_t piece=0):
        """CRC32C of each chunk of a piece, as bytes of little-endian uint32."""
        if piece >= self._count:
            raise IndexError(piece)
        cdef Piece *p = &self._pieces[piece]
        return (<unsigned char *>&self._t.crcs[p.first_chunk])[:4 * <Py_ssize_t>p.chunks]

    def all_chunk_crcs(self):
        """As :meth:`chunk_crcs`, of all pieces, one after the other."""
        cdef Piece *last
        if not self._count:
            return b""
        last = &self._pieces[self._count - 1]
        return (<unsigned char *>self._t.crcs)[:4 * (<Py_ssize_t>last.first_chunk + last.chunks)]

    def __dealloc__(self):
        cdef Transfer_ *t = self._t
        cdef Queue_ *q
        cdef bint free_it = True
        if t == NULL:
            return
        if self.queue.pid != _getpid():
            return  # in a forked child the locks' state is unknown
        free(self._pieces)
        if self._submitted and not skv_is_set(&t.done):
            q = t.queue
            pthread_mutex_lock(&q.mutex)
            if not t.done:
                t.orphan = 1
                free_it = False
            pthread_mutex_unlock(&q.mutex)
        elif self._submitted:
            # The driver sets `done` under the mutex and may still hold it.
            pthread_mutex_lock(&t.queue.mutex)
            pthread_mutex_unlock(&t.queue.mutex)
        if free_it:
            _free_transfer(t)
