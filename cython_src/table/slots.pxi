# A hash table of numbers that stand for something else: open addressing, linear probing.
# Included in table.pyx: one C translation unit.


cdef extern from "<sys/mman.h>" nogil:
    int MADV_HUGEPAGE
    int madvise(void *address, size_t nbytes, int advice)

cdef extern from *:
    void __builtin_prefetch(const void *address) nogil

cdef enum:
    # Memory from this size on is on transparent hugepages where the kernel provides them: it is
    # reached at random, and each look-up would miss the processor's table of pages.
    LARGE_NBYTES = 4 << 20
    PAGE_NBYTES = 4096


cdef void prefer_hugepages(void *memory, size_t nbytes) noexcept:
    cdef size_t first = (<size_t>memory + PAGE_NBYTES - 1) // PAGE_NBYTES * PAGE_NBYTES
    cdef size_t last = (<size_t>memory + nbytes) // PAGE_NBYTES * PAGE_NBYTES
    if nbytes >= LARGE_NBYTES:
        madvise(<void *>first, last - first, MADV_HUGEPAGE)


cdef struct Slot:
    uint32_t ref     # 0: empty
    uint32_t hash


cdef struct Slots:
    Slot *slots
    uint32_t mask    # one less than how many there are, a power of two
    uint32_t count   # in use


cdef int slots_begin(Slots *t) except -1:
    t.mask = 15
    t.count = 0
    t.slots = <Slot *>calloc(t.mask + 1, sizeof(Slot))
    if t.slots == NULL:
        raise MemoryError()
    return 0


cdef int slots_reserve(Slots *t, uint64_t count) except -1:
    """Room for ``count`` in all. MemoryError, and nothing changes."""
    cdef uint64_t room = <uint64_t>t.mask + 1, i
    cdef Slot *grown
    cdef uint32_t mask, at
    # Three quarters at most: runs of full slots, which each look-up goes along, stay short.
    if count <= room // 4 * 3:
        return 0
    while count > room // 4 * 3:
        room *= 2
    if room > 1ULL << 31:
        raise MemoryError(f"no table of {count} entries")
    grown = <Slot *>calloc(room, sizeof(Slot))
    if grown == NULL:
        raise MemoryError()
    prefer_hugepages(grown, room * sizeof(Slot))
    mask = <uint32_t>(room - 1)
    for i in range(<uint64_t>t.mask + 1):
        if t.slots[i].ref:
            at = t.slots[i].hash & mask
            while grown[at].ref:
                at = (at + 1) & mask
            grown[at] = t.slots[i]
    free(t.slots)
    t.slots = grown
    t.mask = mask
    return 0


cdef inline void slots_prefetch(Slots *t, uint32_t hash) noexcept:
    __builtin_prefetch(&t.slots[hash & t.mask])


cdef inline void slots_add(Slots *t, uint32_t hash, uint32_t ref) noexcept:
    """There must be room: :func:`slots_reserve`."""
    cdef uint32_t at = hash & t.mask
    while t.slots[at].ref:
        at = (at + 1) & t.mask
    t.slots[at].ref = ref
    t.slots[at].hash = hash
    t.count += 1


cdef inline uint32_t slots_place(Slots *t, uint32_t hash, uint32_t ref) noexcept:
    """Where ``ref`` is, which must be there."""
    cdef uint32_t at = hash & t.mask
    while t.slots[at].ref != ref:
        at = (at + 1) & t.mask
    return at


cdef void slots_remove(Slots *t, uint32_t hash, uint32_t ref) noexcept:
    """Takes ``ref`` out, and moves up what could not be nearer to its own place because of it."""
    cdef uint32_t hole = slots_place(t, hash, ref), at = hole, home
    while True:
        at = (at + 1) & t.mask
        if t.slots[at].ref == 0:
            break
        home = t.slots[at].hash & t.mask
        # Its way from home to here passes the hole.
        if ((at - home) & t.mask) >= ((at - hole) & t.mask):
            t.slots[hole] = t.slots[at]
            hole = at
    t.slots[hole].ref = 0
    t.count -= 1


cdef inline uint64_t mixed(uint64_t x) noexcept:
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL
    return x ^ (x >> 32)


cdef inline uint64_t long_hash_of(const char *bytes, size_t nbytes, uint64_t seed) noexcept:
    cdef uint64_t h = seed ^ nbytes, word
    while nbytes >= 8:
        memcpy(&word, bytes, 8)
        h = mixed(h ^ word)
        bytes += 8
        nbytes -= 8
    if nbytes:
        word = 0
        memcpy(&word, bytes, nbytes)
        h = mixed(h ^ word)
    return h


cdef inline uint32_t hash_of(const char *bytes, size_t nbytes, uint64_t seed) noexcept:
    return <uint32_t>long_hash_of(bytes, nbytes, seed)
