# Counts what the page cache lacks of a read, and fetches it, in large folios where the kernel has them.

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ
    int MAP_SHARED
    int MADV_RANDOM
    int MADV_HUGEPAGE
    void *MAP_FAILED
    void *mmap(void *at, size_t nbytes, int protection, int flags, int fd, long offset)
    int munmap(void *at, size_t nbytes)
    int madvise(void *at, size_t nbytes, int advice)

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int getpagesize()

# mman.h has it from glibc 2.35 on; in the kernel since 5.14.
DEF MADV_POPULATE_READ = 22
# cachestat (Linux 6.5) has this number on every architecture with the common syscall table.
DEF CACHESTAT = 451
DEF LARGE_NBYTES = 2097152
DEF PAGE_NBYTES = 4096


cdef inline int64_t _cold_nbytes(int fd, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """Bytes of a range that the page cache lacks, in whole pages; negative where the kernel does not
    say (one that does also reads large folios). Nothing is read."""
    cdef uint64_t wanted[2]  # struct cachestat_range: offset, length
    cdef uint64_t counts[5]  # struct cachestat: nr_cache comes first
    cdef int64_t cached
    wanted[0] = offset
    wanted[1] = nbytes
    if syscall(CACHESTAT, fd, wanted, counts, 0):
        return -1
    cached = <int64_t>(counts[0] * <uint64_t>getpagesize())
    return <int64_t>nbytes - cached if cached < <int64_t>nbytes else 0


cdef bint _bring_in(int fd, uint64_t offset) noexcept nogil:
    """Reads one block of 2 MiB in one folio, if the kernel has one.

    A read from a descriptor never asks for folios so large (its read-ahead begins with single
    pages, and POSIX_FADV_RANDOM leaves it there); a fault in a mapping that wants hugepages does
    (do_sync_mmap_readahead), for one folio and no more if the mapping is read at random. That
    folio is marked all the same for more to be read when somebody comes to it: which happens where
    it continues what the reader's own descriptor read ahead (so the mapping has another), or where
    the kernel's read-ahead reaches beyond it (the engine does not ask for this then).
    What fails here is left to the read that follows. Returns whether it did not.
    """
    cdef void *at = mmap(NULL, LARGE_NBYTES, PROT_READ, MAP_SHARED, fd, <long>offset)
    cdef bint done
    if at == MAP_FAILED:
        return False
    done = (madvise(at, LARGE_NBYTES, MADV_HUGEPAGE) == 0
            and madvise(at, LARGE_NBYTES, MADV_RANDOM) == 0
            and madvise(at, PAGE_NBYTES, MADV_POPULATE_READ) == 0)
    munmap(at, LARGE_NBYTES)
    return done


# In a list of blocks: none.
cdef uint64_t NO_BLOCK = <uint64_t>-1


cdef bint _claim(ThreadPool *p, uint64_t block) noexcept nogil:
    """Whether this thread is to see to a block; if another one does, waits until it has."""
    cdef int at, free = -1
    cdef bint others = False
    pthread_mutex_lock(&p.mutex)
    at = 0
    while at < p.count:
        if p.claims[at] == block:
            others = True
            pthread_cond_wait(&p.released, &p.mutex)
            at = 0
            continue
        if p.claims[at] == NO_BLOCK:
            free = at
        at += 1
    if not others:
        p.claims[free] = block  # there is one for each thread
    pthread_mutex_unlock(&p.mutex)
    return not others


cdef void _release(ThreadPool *p, uint64_t block) noexcept nogil:
    cdef int i
    pthread_mutex_lock(&p.mutex)
    for i in range(p.count):
        if p.claims[i] == block:
            p.claims[i] = NO_BLOCK
    pthread_cond_broadcast(&p.released)
    pthread_mutex_unlock(&p.mutex)


cdef int64_t _see_to_block(ThreadPool *p, uint64_t block) noexcept nogil:
    """Brings a block in if the cache has nothing of it. Returns how much was brought in, by whoever
    did, for one of all the commands that want it; -1 if it is not like that."""
    cdef int64_t nbytes = 0
    if not _claim(p, block):
        return 0  # whoever brought it in counts it
    if _cold_nbytes(p.fd, block, LARGE_NBYTES) == LARGE_NBYTES:
        nbytes = LARGE_NBYTES if _bring_in(p.mapped_fd, block) else -1
    else:
        nbytes = -1
    _release(p, block)
    return nbytes


cdef int64_t _fill(ThreadPool *p, skv_io *io) noexcept nogil:
    """What a command's bytes have to be read for: the bytes that the cache lacks, or -1 where the
    kernel does not tell.

    Of the blocks of 2 MiB that lie in its piece as a whole, those that the cache has nothing of are
    brought in here, and count as one for all commands that want them.
    """
    cdef uint64_t at = io.offset, last = io.offset + io.nbytes, block, end
    cdef int64_t cold = 0, found
    while at < last:
        block = at & ~(<uint64_t>LARGE_NBYTES - 1)
        end = min(last, block + LARGE_NBYTES)
        found = -1
        if (p.mapped_fd >= 0 and block >= io.piece_offset
                and block + LARGE_NBYTES <= io.piece_offset + io.piece_nbytes):
            found = _see_to_block(p, block)
        if found < 0:
            found = _cold_nbytes(p.fd, at, end - at)
            if found < 0:
                return -1
        cold += found
        at = end
    return cold
