# Extents as bits: one for the first block of each, one for the last.
# Included in table.pyx: one C translation unit.

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil

cdef enum:
    # Blocks of a chunk, whose bits are allocated when one of them is first in use.
    CHUNK_BLOCKS = 32768
    CHUNK_WORDS = 512


cdef struct Chunk:
    uint64_t firsts[CHUNK_WORDS]
    uint64_t lasts[CHUNK_WORDS]
    uint32_t count   # of bits that are set


cdef struct Run:
    uint64_t start
    uint64_t end


cdef class ExtentMap:
    """Extents of a drive, offset -> size in bytes, in two bits per block: a mapping that iterates
    in the order of the offsets, and takes as long to find the end of an extent as it is long (64
    blocks at a time).

    Blocks of ``block_nbytes`` lie from ``start`` up to ``end``. ValueError for what is not whole
    blocks between them. That extents do not overlap is the caller's to see to, and :meth:`check`
    says whether they do.
    """
    cdef Chunk **_chunks
    cdef uint64_t _chunk_count
    cdef uint64_t _start
    cdef uint64_t _blocks
    cdef uint64_t _block_nbytes
    cdef uint64_t _length

    def __cinit__(self, uint64_t start, uint64_t end, uint64_t block_nbytes):
        if block_nbytes < 1 or end < start:
            raise ValueError(f"there are no blocks of {block_nbytes} bytes in [{start}, {end})")
        self._start = start
        self._block_nbytes = block_nbytes
        self._blocks = (end - start) // block_nbytes
        self._chunk_count = self._blocks // CHUNK_BLOCKS + 1
        self._chunks = <Chunk **>calloc(self._chunk_count, sizeof(Chunk *))
        if self._chunks == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef uint64_t i
        if self._chunks != NULL:
            for i in range(self._chunk_count):
                free(self._chunks[i])
            free(self._chunks)

    # -- a mapping ------------------------------------------------------------------------------

    def __len__(self):
        return self._length

    def __contains__(self, offset):
        return self._has(offset)

    def get(self, offset, default=None):
        """The size of the extent at ``offset``, or ``default``."""
        if not self._has(offset):
            return default
        return self._size(self._block(offset))

    def __getitem__(self, offset):
        if not self._has(offset):
            raise KeyError(offset)
        return self._size(self._block(offset))

    def __setitem__(self, offset, nbytes):
        self._add(offset, nbytes)

    def __delitem__(self, offset):
        cdef uint64_t first, last
        if not self._has(offset):
            raise KeyError(offset)
        first = self._block(offset)
        last = first + self._size(first) // self._block_nbytes - 1
        self._clear(first, True)
        self._clear(last, False)
        self._length -= 1

    def pop(self, offset):
        """Takes the extent at ``offset`` out; returns its size. KeyError."""
        nbytes = self[offset]
        del self[offset]
        return nbytes

    def __iter__(self):
        """The offsets, ascending."""
        for offset, _ in self.items():
            yield offset

    def keys(self):
        """As a mapping has them."""
        return iter(self)

    def values(self):
        """The sizes, in the order of the offsets."""
        for _, nbytes in self.items():
            yield nbytes

    def items(self):
        """(offset, size) of each, in the order of the offsets. What changes meanwhile is seen, or
        not."""
        cdef uint64_t block = self._next(0, True), nbytes
        while block < self._blocks:
            nbytes = self._size(block)
            yield self._start + block * self._block_nbytes, nbytes
            block = self._next(block + 1, True)

    def gaps(self):
        """(offset, size) of what lies between them, and before and behind, in order."""
        cdef uint64_t end = 0, block = self._next(0, True)
        while True:
            if block > end:
                yield (self._start + end * self._block_nbytes, (block - end) * self._block_nbytes)
            if block >= self._blocks:
                return
            end = self._next(block, False) + 1
            block = self._next(end, True)

    # -- many at once ---------------------------------------------------------------------------

    def add_run(self, offset, list sizes):
        """Adds extents of ``sizes`` bytes, the first at ``offset``, that follow each other.
        Returns their offsets. ValueError or MemoryError, and nothing changes."""
        cdef uint64_t at = offset, nbytes
        cdef list offsets = []
        for each in sizes:
            nbytes = each
            self._check(at, nbytes)  # each, or their sum could be so large that it begins anew
            offsets.append(at)
            at += nbytes
        at = offset
        try:
            for each in sizes:
                nbytes = each
                self._add(at, nbytes)
                at += nbytes
        except BaseException:
            for each in offsets:
                if <uint64_t>each == at:  # which is the one that failed
                    break
                del self[each]
            raise
        return offsets

    def take(self, list offsets not None):
        """Takes the extents at ``offsets`` out. Returns (offset, size) of what they covered, those
        joined that were neighbours. KeyError, and nothing changes, unless all are there."""
        cdef list runs = [], wanted = sorted(offsets)
        cdef Py_ssize_t count = 0, i
        cdef uint64_t offset, nbytes, first
        cdef Run *found = <Run *>malloc((len(wanted) + 1) * sizeof(Run))
        if found == NULL:
            raise MemoryError()
        try:
            for each in wanted:
                if not self._has(each) or (count and <uint64_t>each < found[count - 1].end):
                    raise KeyError(each)
                offset = each
                nbytes = self._size(self._block(offset))
                if count and offset == found[count - 1].end:
                    found[count - 1].end += nbytes
                    continue
                found[count].start, found[count].end = offset, offset + nbytes
                count += 1
            for each in wanted:
                first = self._block(each)
                nbytes = self._size(first)
                self._clear(first, True)
                self._clear(first + nbytes // self._block_nbytes - 1, False)
                self._length -= 1
            for i in range(count):
                runs.append((found[i].start, found[i].end - found[i].start))
        finally:
            free(found)
        return runs

    def total(self):
        """Bytes of all extents."""
        cdef uint64_t blocks = 0, block = self._next(0, True), last
        while block < self._blocks:
            last = self._next(block, False)
            blocks += last - block + 1
            block = self._next(block + 1, True)
        return blocks * self._block_nbytes

    def check(self):
        """Whether no two extents overlap: their firsts and lasts alternate."""
        cdef uint64_t block = self._next(0, True), last, count = 0
        while block < self._blocks:
            last = self._next(block, False)
            count += 1
            block = self._next(block + 1, True)
            if last >= block:
                return False
        return count == self._length

    # -- bits -----------------------------------------------------------------------------------

    cdef bint _has(self, offset) except -1:
        cdef uint64_t at, block
        cdef Chunk *chunk
        try:
            at = offset
        except OverflowError:
            return False
        if at < self._start:
            return False
        at -= self._start
        block = at // self._block_nbytes
        if block >= self._blocks or at % self._block_nbytes:
            return False
        chunk = self._chunks[block // CHUNK_BLOCKS]
        if chunk == NULL:
            return False
        block %= CHUNK_BLOCKS
        return chunk.firsts[block // 64] >> (block % 64) & 1

    cdef uint64_t _block(self, uint64_t offset) noexcept:
        return (offset - self._start) // self._block_nbytes

    cdef uint64_t _size(self, uint64_t first) noexcept:
        return (self._next(first, False) + 1 - first) * self._block_nbytes

    cdef int _check(self, uint64_t offset, uint64_t nbytes) except -1:
        cdef uint64_t at = offset - self._start
        if (offset < self._start or at % self._block_nbytes or nbytes % self._block_nbytes
                or nbytes == 0 or nbytes // self._block_nbytes > self._blocks
                or at // self._block_nbytes > self._blocks - nbytes // self._block_nbytes):
            raise ValueError(
                f"{nbytes} bytes at offset {offset} are not whole blocks of {self._block_nbytes} "
                f"bytes in a range of {self._blocks} from {self._start} on")
        return 0

    cdef int _add(self, uint64_t offset, uint64_t nbytes) except -1:
        cdef uint64_t first
        self._check(offset, nbytes)
        first = self._block(offset)
        if self._place(first, nbytes // self._block_nbytes) < 0:
            raise ValueError(f"an extent at offset {offset} is there already")
        return 0

    cdef int _place(self, uint64_t first, uint64_t blocks) except -2:
        """Adds an extent that is in the range. -1, and nothing changes, where one begins or ends at
        the same place."""
        cdef uint64_t last = first + blocks - 1
        cdef Chunk *head = self._need(first)
        cdef Chunk *tail = self._need(last)
        cdef uint64_t *firsts = &head.firsts[first % CHUNK_BLOCKS // 64]
        cdef uint64_t *lasts = &tail.lasts[last % CHUNK_BLOCKS // 64]
        cdef uint64_t begin = 1ULL << (first % 64), end = 1ULL << (last % 64)
        if firsts[0] & begin or lasts[0] & end:
            return -1
        firsts[0] |= begin
        lasts[0] |= end
        head.count += 1
        tail.count += 1
        self._length += 1
        return 0

    cdef Chunk *_need(self, uint64_t block) except NULL:
        cdef Chunk **place = &self._chunks[block // CHUNK_BLOCKS]
        if place[0] == NULL:
            place[0] = <Chunk *>calloc(1, sizeof(Chunk))
            if place[0] == NULL:
                raise MemoryError()
        return place[0]

    cdef void _clear(self, uint64_t block, bint first) noexcept:
        cdef Chunk **place = &self._chunks[block // CHUNK_BLOCKS]
        cdef uint64_t *words = &place[0].firsts[0] if first else &place[0].lasts[0]
        words[block % CHUNK_BLOCKS // 64] &= ~(1ULL << (block % 64))
        place[0].count -= 1
        if place[0].count == 0:
            free(place[0])
            place[0] = NULL

    cdef uint64_t _next(self, uint64_t block, bint first) noexcept:
        """The next block, from this one on, that is a first or a last one; the number of all blocks
        where there is none."""
        cdef uint64_t at, word
        cdef uint64_t *words
        cdef Chunk *chunk
        while block < self._blocks:
            chunk = self._chunks[block // CHUNK_BLOCKS]
            if chunk == NULL or chunk.count == 0:
                block = (block // CHUNK_BLOCKS + 1) * CHUNK_BLOCKS
                continue
            words = &chunk.firsts[0] if first else &chunk.lasts[0]
            at = block % CHUNK_BLOCKS // 64
            word = words[at] >> (block % 64)
            if word:
                return block + __builtin_ctzll(word)
            block = (block // 64 + 1) * 64
            at += 1
            while at < CHUNK_WORDS and words[at] == 0:
                at += 1
                block += 64
        return self._blocks
