# Counts the bytes of a read that the page cache lacks, and fills large folios where possible.
# Included in pool.pyx: it works on the pool's structure.

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

# In mman.h from glibc 2.35 on; in the kernel since 5.14.
DEF MADV_POPULATE_READ = 22
# cachestat (Linux 6.5) has this number on every architecture with the common syscall table.
DEF CACHESTAT = 451
DEF LARGE_NBYTES = 2097152
DEF PAGE_NBYTES = 4096


cdef inline int64_t _cold_nbytes(int fd, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """Bytes of a range that the page cache lacks, in whole pages; negative if the kernel has no
    cachestat (one that has it also reads large folios). Reads nothing."""
    cdef uint64_t wanted[2]  # struct cachestat_range: offset, length
    cdef uint64_t counts[5]  # struct cachestat: nr_cache comes first
    cdef int64_t cached
    wanted[0] = offset
    wanted[1] = nbytes
    if syscall(CACHESTAT, fd, wanted, counts, 0):
        return -1
    cached = <int64_t>(counts[0] * <uint64_t>getpagesize())
    return <int64_t>nbytes - cached if cached < <int64_t>nbytes else 0


cdef bint _fault_in(int fd, uint64_t offset) noexcept nogil:
    """Reads one block of 2 MiB into one folio, if the kernel can; returns whether it did.

    A read from a descriptor never uses folios so large: its read-ahead starts with single pages,
    and POSIX_FADV_RANDOM keeps it there. A fault in a mapping with MADV_HUGEPAGE does
    (do_sync_mmap_readahead), and with MADV_RANDOM reads only that one. The kernel still marks the
    folio to trigger read-ahead, which happens if it continues what the reader's descriptor read
    ahead (so the mapping uses another descriptor), or if the kernel's read-ahead is larger than
    it (the engine then does not use this). After a failure the following read fetches the block.
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


# In `claims`: no block.
cdef uint64_t NO_BLOCK = <uint64_t>-1


cdef bint _claim(ThreadPool *p, uint64_t block) noexcept nogil:
    """Claims a block to fill. False: another thread had it, and has finished."""
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
        p.claims[free] = block  # there is one per thread
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


cdef int64_t _fill_block(ThreadPool *p, uint64_t block) noexcept nogil:
    """Fills a block that is not cached at all. Returns the bytes filled, for only one of the
    commands that read the block; -1: not filled."""
    cdef int64_t nbytes = 0
    if not _claim(p, block):
        return 0  # the thread that filled it counts it
    if _cold_nbytes(p.fd, block, LARGE_NBYTES) == LARGE_NBYTES:
        nbytes = LARGE_NBYTES if _fault_in(p.mapped_fd, block) else -1
    else:
        nbytes = -1
    _release(p, block)
    return nbytes


cdef int64_t _fill(ThreadPool *p, skv_io *io) noexcept nogil:
    """The command's cold bytes: those that the page cache lacked; -1 if the kernel cannot say.

    Fills the 2 MiB blocks that lie wholly in the command's piece and are not cached at all; each
    counts once for all commands that read it.
    """
    cdef uint64_t at = io.offset, last = io.offset + io.nbytes, block, end
    cdef int64_t cold = 0, found
    while at < last:
        block = at & ~(<uint64_t>LARGE_NBYTES - 1)
        end = min(last, block + LARGE_NBYTES)
        found = -1
        if (p.mapped_fd >= 0 and block >= io.piece_offset
                and block + LARGE_NBYTES <= io.piece_offset + io.piece_nbytes):
            found = _fill_block(p, block)
        if found < 0:
            found = _cold_nbytes(p.fd, at, end - at)
            if found < 0:
                return -1
        cold += found
        at = end
    return cold
