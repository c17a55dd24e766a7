# A table as bytes for a file, and back.
# Included in table.pyx: one C translation unit.

# Numbers as the machine has them, which is little-endian wherever this is built.


cdef enum:
    # Entries whose places in the tables are fetched into the processor's cache together.
    AHEAD = 32

cdef uint32_t USED_AGAIN = 0x80000000UL


def kinds_of(BlobTable table not None):
    """The kinds (size, dtype, shape) that entries of :func:`packed` have, by number; None where no
    entry has one."""
    return list(table._kinds.all)


def packed(BlobTable table not None, size_t section_nbytes, uint64_t changes):
    """All entries, from the one used longest ago, in sections of about so many bytes: of each the
    offset (8 bytes), checksum, kind and length of the key (4 bytes each; its highest bit: used
    again), and the key. RuntimeError where they are not (or no longer) as they were after so many
    ``changes``."""
    cdef Walk walk = table._walk(), begin
    cdef uint32_t ref = table._step(&walk, 1), first, length
    cdef size_t nbytes
    cdef unsigned char *at
    cdef Entry *entry
    if changes != table.changes:
        raise RuntimeError("the blobs changed before iteration")
    while ref:
        first, begin = ref, walk
        nbytes = 0
        while ref and (nbytes == 0 or nbytes < section_nbytes):
            nbytes += PACKED + table._entry(ref).key_nbytes
            ref = table._step(&walk, 1)
        section = PyBytes_FromStringAndSize(NULL, nbytes)
        if changes != table.changes:
            raise RuntimeError("the blobs changed during iteration")
        at = <unsigned char *>PyBytes_AS_STRING(section)
        while first != ref:
            entry = table._entry(first)
            length = entry.key_nbytes | USED_AGAIN if entry.used & AGAIN else entry.key_nbytes
            memcpy(at, &entry.offset, 8)
            memcpy(at + 8, &entry.crc, 4)
            memcpy(at + 12, &entry.kind, 4)
            memcpy(at + 16, &length, 4)
            memcpy(at + PACKED, key_of(entry), entry.key_nbytes)
            at += PACKED + entry.key_nbytes
            first = table._step(&begin, 1)
        yield section
        if changes != table.changes:
            raise RuntimeError("the blobs changed during iteration")


cdef struct Unpacked:
    uint64_t offset
    const char *key
    uint32_t crc
    uint32_t kind
    uint32_t key_nbytes
    uint32_t which
    uint32_t hash


def unpack_into(BlobTable table not None, const unsigned char[::1] section not None,
                list kinds not None):
    """Adds the entries of a section of :func:`packed`, each as the one used last. ValueError where
    they are not such, or one is there already: the table is of no use then."""
    cdef size_t left = section.shape[0], count = len(kinds)
    cdef const unsigned char *at = &section[0] if left else NULL
    cdef uint32_t *numbers = <uint32_t *>malloc((count + 1) * sizeof(uint32_t))
    cdef list taken = []
    cdef Unpacked some[AHEAD]
    cdef Unpacked *one
    cdef uint32_t found, i
    if numbers == NULL:
        raise MemoryError()
    memset(numbers, 0xFF, count * sizeof(uint32_t))
    try:
        while left:
            slots_reserve(&table._by_key, <uint64_t>table._by_key.count + AHEAD)
            slots_reserve(&table._by_offset, <uint64_t>table._by_offset.count + AHEAD)
            found = 0
            while left and found < AHEAD:
                if left < PACKED:
                    raise ValueError("an entry ends too soon")
                one = &some[found]
                memcpy(&one.offset, at, 8)
                memcpy(&one.crc, at + 8, 4)
                memcpy(&one.kind, at + 12, 4)
                memcpy(&one.key_nbytes, at + 16, 4)
                one.which = AGAIN if one.key_nbytes & USED_AGAIN else ONCE
                one.key_nbytes &= ~USED_AGAIN
                if one.key_nbytes > left - PACKED:
                    raise ValueError("a key ends too soon")
                if one.kind >= count or kinds[one.kind] is None:
                    raise ValueError(f"there is no kind {one.kind}")
                if numbers[one.kind] == 0xFFFFFFFF:
                    nbytes, dtype, shape = kinds[one.kind]
                    numbers[one.kind] = table._kinds.take(nbytes, dtype, shape)
                    taken.append(numbers[one.kind])
                one.kind = numbers[one.kind]
                one.key = <const char *>at + PACKED
                check_utf8(one.key, one.key_nbytes)
                one.hash = hash_of(one.key, one.key_nbytes, _seed)
                slots_prefetch(&table._by_key, one.hash)
                slots_prefetch(&table._by_offset, offset_hash(one.offset))
                at += PACKED + one.key_nbytes
                left -= PACKED + one.key_nbytes
                found += 1
            for i in range(found):
                add_unpacked(table, &some[i])
    finally:
        free(numbers)
        for each in taken:
            table._kinds.drop(each)


cdef int add_unpacked(BlobTable table, Unpacked *one) except -1:
    """The tables have room for it."""
    cdef uint32_t ref
    cdef Entry *entry
    if table._look_up(one.key, one.key_nbytes, one.hash):
        raise ValueError("a key is there twice")
    ref = arena_allocate(&table._arena, sizeof(Entry) + one.key_nbytes)
    entry = table._entry(ref)
    memset(entry, 0, sizeof(Entry))
    entry.offset = one.offset
    entry.hash = one.hash
    entry.crc = one.crc
    entry.kind = one.kind
    entry.key_nbytes = one.key_nbytes
    memcpy(key_of(entry), one.key, one.key_nbytes)
    table._kinds._counts[one.kind] += 1
    slots_add(&table._by_key, one.hash, ref)
    table._append(ref, one.which)
    table.changes += 1
    if table._kinds.nbytes[one.kind]:
        slots_add(&table._by_offset, offset_hash(one.offset), ref)
        table.footprint_nbytes += table._blocks_of(table._kinds.nbytes[one.kind])
    return 0
