# Memory for entries of any size, each named by a number of 32 bits.
# Included in table.pyx: one C translation unit.

cdef enum:
    # An entry is named by its place in the arena, in units of so many bytes: 32 GiB of them.
    UNIT = 8
    # Entries of up to so many units come back for others of the same number, larger ones for those
    # of up to the same power of two.
    EXACT = 512
    CLASSES = 512 + 33


cdef struct Arena:
    unsigned char *memory
    uint32_t units           # that there are
    uint32_t used_units      # of them, those that were ever given out
    uint32_t free[CLASSES]   # entries to be given out again, by class


cdef int arena_begin(Arena *a) except -1:
    memset(a.free, 0, sizeof(a.free))
    a.units = 512
    a.used_units = 1         # 0 stands for none
    a.memory = <unsigned char *>malloc(a.units * UNIT)
    if a.memory == NULL:
        raise MemoryError()
    return 0


cdef inline void *arena_at(Arena *a, uint32_t ref) noexcept:
    return a.memory + <size_t>ref * UNIT


cdef uint32_t arena_allocate(Arena *a, size_t nbytes) except 0:
    """Room for an entry of ``nbytes``. Others may move. MemoryError."""
    cdef uint64_t units = (nbytes + UNIT - 1) // UNIT, needed, room
    cdef uint32_t number = class_of(&units), ref = a.free[number]
    cdef void *grown = NULL
    if ref:
        memcpy(&a.free[number], arena_at(a, ref), sizeof(uint32_t))
        return ref
    needed = a.used_units + units
    if needed > a.units:
        # Doubled: what is not used yet takes no memory.
        room = 2 * <uint64_t>a.units
        while room < needed:
            room *= 2
        if room > 0xFFFFFFFF:
            room = 0xFFFFFFFF
        if needed <= room:
            grown = realloc(a.memory, room * UNIT)
        if grown == NULL:
            raise MemoryError(f"no memory for another entry, beside {needed * UNIT} bytes with it")
        a.memory = <unsigned char *>grown
        prefer_hugepages(grown, room * UNIT)
        a.units = <uint32_t>room
    ref = a.used_units
    a.used_units = <uint32_t>needed
    return ref


cdef void arena_release(Arena *a, uint32_t ref, size_t nbytes) noexcept:
    cdef uint64_t units = (nbytes + UNIT - 1) // UNIT
    cdef uint32_t number = class_of(&units)
    memcpy(arena_at(a, ref), &a.free[number], sizeof(uint32_t))
    a.free[number] = ref


cdef void arena_clear(Arena *a) noexcept:
    """Nothing is left, so all of it can be given out anew."""
    memset(a.free, 0, sizeof(a.free))
    a.used_units = 1


cdef inline uint32_t class_of(uint64_t *units) noexcept:
    """The class of entries of ``units``, which become as many as those of the class have."""
    cdef uint32_t number = EXACT
    cdef uint64_t room = EXACT
    if units[0] < EXACT:
        return <uint32_t>units[0]
    while room < units[0]:
        room *= 2
        number += 1
    units[0] = room
    return number
