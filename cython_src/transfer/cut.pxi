# Cuts the pieces of a transfer into segments, with the GIL.
# Included in transfer.pyx: one C translation unit.


cdef bint _reaches_all(skv_backend *backend, Piece *pieces, uint32_t count):
    """Whether the drive reaches the address range that spans all pieces."""
    cdef size_t first = <size_t>pieces[0].address, last = first, address
    cdef uint32_t i
    for i in range(count):
        address = <size_t>pieces[i].address
        first = min(first, address)
        last = max(last, address + pieces[i].capacity)
    return backend.reaches(backend.self, <void *>first, last - first)


cdef void _share_slots(Transfer_ *t):
    """Has small pieces that could be one command, but for where they lie in memory, use a slot."""
    cdef Segment *s
    cdef uint32_t i
    for i in range(1, t.count):
        s = &t.segments[i]
        if (s.io.piece_nbytes <= SMALL_NBYTES and s[-1].io.piece_nbytes <= SMALL_NBYTES
                and _follows(s) and not _adjoins(s)):
            s.bounce = s[-1].bounce = 1


cdef _cut(Transfer_ *t, Piece *pieces, uint32_t piece_count):
    """Cuts the pieces into segments."""
    cdef Queue_ *q = t.queue
    cdef uint64_t most = t.segment_nbytes, count = 0, chunks = 0, at, skip, take
    cdef uint64_t segments, sums
    # Masks, as both are powers of two: divisions would be a large part of this function's time.
    cdef uint64_t within = q.block_nbytes - 1, unaligned = q.align_nbytes - 1
    cdef uint32_t i
    cdef bint foreign, asks, listed
    cdef Piece *p
    cdef Segment *s
    if t.op >= SKV_FLUSH:
        most = MOST_SEGMENT_NBYTES  # no memory moves: only the field's width limits it
    for i in range(piece_count):
        p = &pieces[i]
        sums = 0
        if t.op == SKV_FLUSH:
            segments = 1
        else:
            skip = p.offset & within
            segments = (p.nbytes != 0 if skip + p.nbytes <= most
                        else (skip + p.nbytes + most - 1) // most)
        if t.chunk_nbytes:
            sums = (p.nbytes + t.chunk_nbytes - 1) // t.chunk_nbytes
        # Before they are narrowed to the fields' width.
        if count + segments > MOST_COUNT or chunks + sums > MOST_COUNT:
            raise ValueError(
                f"{count + segments} segments and {chunks + sums} checksums are too many for "
                f"one transfer; {MOST_COUNT} are the most")
        p.first_segment = <uint32_t>count
        p.segments = <uint32_t>segments
        p.first_chunk = <uint32_t>chunks
        p.chunks = <uint32_t>sums
        count += segments
        chunks += sums
    free(t.segments)  # left by an attempt that ran out of memory
    free(t.crcs)
    free(t.copies)
    free(t.places)
    t.copies = NULL
    t.places = NULL
    t.segments = <Segment *>calloc(count + 1, sizeof(Segment))
    t.crcs = <uint32_t *>calloc(chunks + 1, sizeof(uint32_t))
    if t.link != NULL:
        t.copies = <Copy *>calloc(count + 1, sizeof(Copy))
    listed = t.link == NULL and t.op <= SKV_WRITE and count > 1 and q.backend.most_places > 1
    if listed:
        t.places = <iovec *>calloc(count, sizeof(iovec))
    if (t.segments == NULL or t.crcs == NULL or (t.link != NULL and t.copies == NULL)
            or (listed and t.places == NULL)):
        raise MemoryError()
    asks = q.backend.reaches != NULL and t.op <= SKV_WRITE and t.link == NULL
    # Many pieces mostly lie in one buffer, so that one call covers all of them.
    if asks and piece_count > 1:
        asks = not _reaches_all(q.backend, pieces, piece_count)
    for i in range(piece_count):
        p = &pieces[i]
        at = 0
        foreign = t.link != NULL or (
            asks and not q.backend.reaches(q.backend.self, p.address, p.capacity))
        s = &t.segments[p.first_segment]
        while at < p.nbytes or (t.op == SKV_FLUSH and at == 0):
            skip = (p.offset + at) & within
            take = min(p.nbytes - at, most - skip)
            s.transfer = t
            s.user = p.address + at
            s.offset = p.offset + at - skip
            s.skip = <uint32_t>skip
            s.nbytes = <uint32_t>take
            s.io.piece_offset = p.offset
            s.io.piece_nbytes = p.nbytes
            s.drive_nbytes = <uint32_t>((skip + take + within) & ~within)
            if t.op <= SKV_WRITE:
                s.bounce = (foreign or (<size_t>s.user & unaligned) != 0 or skip != 0
                            or at + s.drive_nbytes > p.capacity)
            if listed:
                t.places[s - t.segments].iov_base = s.user
                t.places[s - t.segments].iov_len = s.drive_nbytes
            if t.chunk_nbytes:
                s.chunk_crcs = &t.crcs[
                    p.first_chunk + <uint32_t>(at // t.chunk_nbytes)]
            s += 1
            at += take
            if t.op == SKV_FLUSH:
                break
    t.count = t.to_copy = t.to_hand_over = <uint32_t>count
    if q.slots_count and t.op <= SKV_WRITE and t.link == NULL:
        _share_slots(t)
