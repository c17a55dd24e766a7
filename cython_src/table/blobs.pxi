# The records of blobs: an arena of entries, found by key and by offset, in the order of use.
# Included in table.pyx: one C translation unit.

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except? NULL
    object PyUnicode_DecodeUTF8(const char *text, Py_ssize_t size, const char *errors)


cdef struct Entry:
    uint64_t offset
    uint64_t used        # when last, twice, and whether more often than once
    uint32_t hash
    uint32_t crc
    uint32_t kind
    uint32_t older       # in the order of use; 0: none
    uint32_t newer
    uint32_t key_nbytes
    # and the bytes of the key


cdef enum:
    # Of an entry that lies in a file: offset, checksum, kind, length of the key; the key follows.
    PACKED = 20

cdef uint64_t _seed
memcpy(&_seed, PyBytes_AS_STRING(os.urandom(8)), 8)


cdef enum:
    # Blobs that were put and not used since, and those that were: each in the order of use.
    ONCE = 0
    AGAIN = 1
    LISTS = 2


cdef struct Walk:
    # The next entry of each list; 0: none.
    uint32_t next[LISTS]
cdef object _NEW = tuple.__new__


@cython.no_gc_clear
cdef class BlobTable:
    """Blobs by key, by offset, and in the order of use. Thread-safe under the GIL.

    A mapping of keys to records, named tuples of the type ``make``: ``(offset, nbytes, dtype, shape,
    crc)``, which iterates from the one used longest ago. What is kept is packed: a
    record that is looked up is a new object, equal to the one that was put. ``block_nbytes``: what
    the sizes of extents are multiples of.

    For eviction a blob that was put and not used since counts as :attr:`once_weight` times as old:
    most of what comes once comes never again, and a flood of it does not drive out what is used
    again and again. One that was evicted so and is put anew counts as used.
    """
    cdef Arena _arena
    cdef Slots _by_key
    cdef Slots _by_offset
    cdef uint32_t _oldest[LISTS]
    cdef uint32_t _newest[LISTS]
    # Of blobs that were evicted before they were used again: hashes of their keys, each in the place
    # that it has by itself.
    cdef uint32_t *_gone
    cdef uint32_t _gone_mask
    cdef public uint32_t once_weight
    cdef uint64_t _block_nbytes
    cdef object _make
    cdef Kinds _kinds
    cdef readonly uint64_t changes   # of the order and of what there is
    cdef readonly uint64_t now
    cdef readonly uint64_t footprint_nbytes

    def __cinit__(self, make, uint64_t block_nbytes):
        self._make = make
        self._block_nbytes = block_nbytes
        self.once_weight = 1
        self._kinds = Kinds()
        arena_begin(&self._arena)
        slots_begin(&self._by_key)
        slots_begin(&self._by_offset)

    def __dealloc__(self):
        free(self._arena.memory)
        free(self._by_key.slots)
        free(self._by_offset.slots)
        free(self._gone)

    @classmethod
    def __class_getitem__(cls, make):
        return cls

    # -- a mapping ------------------------------------------------------------------------------

    def __len__(self):
        return self._by_key.count

    def __contains__(self, key):
        return self._find(key) != 0

    def get(self, key, default=None):
        """The record of ``key``, or ``default``."""
        cdef uint32_t ref = self._find(key)
        return self._record(ref) if ref else default

    def __getitem__(self, key):
        cdef uint32_t ref = self._find(key)
        if not ref:
            raise KeyError(key)
        return self._record(ref)

    def __iter__(self):
        """The keys, that of the blob used longest ago first. RuntimeError once anything changes."""
        cdef Walk walk = self._walk()
        cdef uint32_t ref = self._step(&walk, 1)
        cdef uint64_t changes = self.changes
        while ref:
            yield self._key(ref)
            if changes != self.changes:
                raise RuntimeError("the blobs changed during iteration")
            ref = self._step(&walk, 1)

    def __reversed__(self):
        """The keys, that of the blob used last first. RuntimeError once anything changes."""
        cdef Walk walk = self._walk_back()
        cdef uint32_t ref = self._step_back(&walk)
        cdef uint64_t changes = self.changes
        while ref:
            yield self._key(ref)
            if changes != self.changes:
                raise RuntimeError("the blobs changed during iteration")
            ref = self._step_back(&walk)

    def keys(self, str prefix=""):
        """The keys that begin with ``prefix``, as a list."""
        cdef list found = []
        cdef bytes held = prefix.encode("utf-8", "surrogatepass")
        cdef const char *wanted = PyBytes_AS_STRING(held)
        cdef size_t nbytes = PyBytes_GET_SIZE(held)
        cdef Walk walk = self._walk()
        cdef uint32_t ref = self._step(&walk, 1)
        cdef uint64_t changes = self.changes
        cdef Entry *entry
        while ref:
            entry = self._entry(ref)
            if entry.key_nbytes >= nbytes and memcmp(key_of(entry), wanted, nbytes) == 0:
                found.append(self._key(ref))
                if changes != self.changes:
                    raise RuntimeError("the blobs changed during iteration")
            ref = self._step(&walk, 1)
        return found

    def values(self):
        """The records, as a list."""
        return [record for _, record in self.items()]

    def items(self):
        """(key, record) of each, as a list."""
        cdef list found = []
        cdef Walk walk = self._walk()
        cdef uint32_t ref = self._step(&walk, 1)
        cdef uint64_t changes = self.changes
        while ref:
            record = self._record(ref)
            if changes == self.changes:
                found.append((self._key(ref), record))
            if changes != self.changes:
                raise RuntimeError("the blobs changed during iteration")
            ref = self._step(&walk, 1)
        return found

    # -- changes --------------------------------------------------------------------------------

    def put(self, key, record):
        """Makes ``record`` that of ``key``, and the blob the one used last. Returns the record that
        it had before, or None."""
        offset, nbytes, dtype, shape, crc = record
        return self._put(key, offset, nbytes, dtype, shape, crc, True)

    def put_many(self, dict records not None):
        """As :meth:`put`, of all ``records`` by key. Returns those that other ones had before."""
        cdef list formers = []
        for key, record in records.items():
            offset, nbytes, dtype, shape, crc = record
            former = self._put(key, offset, nbytes, dtype, shape, crc, True)
            if former is not None and former != record:
                formers.append(former)
        return formers

    def replace(self, key, record):
        """As :meth:`put`, but the blob keeps its place in the order of use. KeyError unless it is
        there."""
        if not self._find(key):
            raise KeyError(key)
        offset, nbytes, dtype, shape, crc = record
        return self._put(key, offset, nbytes, dtype, shape, crc, False)

    cdef _put(self, key, uint64_t offset, uint64_t nbytes, dtype, shape, uint32_t crc,
              bint last):
        cdef Py_ssize_t key_nbytes = 0
        if not isinstance(key, str):
            raise TypeError(f"a key is a str, not {type(key).__name__}")
        cdef object held = plain(key)
        cdef const char *text = utf8(held, &key_nbytes)
        cdef uint32_t hash = hash_of(text, key_nbytes, _seed)
        if key_nbytes > 0x7FFFFFFF:
            raise MemoryError(f"a key of {key_nbytes} bytes is not kept")
        cdef uint32_t kind = self._kinds.take(nbytes, dtype, shape)
        cdef uint32_t ref = self._look_up(text, key_nbytes, hash)
        cdef bint is_new = ref == 0
        cdef Entry former
        cdef Entry *entry
        try:
            slots_reserve(&self._by_key, <uint64_t>self._by_key.count + 1)
            slots_reserve(&self._by_offset, <uint64_t>self._by_offset.count + 1)
            if is_new:
                ref = arena_allocate(&self._arena, sizeof(Entry) + key_nbytes)
        except MemoryError:
            self._kinds.drop(kind)
            raise
        entry = self._entry(ref)
        if is_new:
            memset(entry, 0, sizeof(Entry))
            entry.hash = hash
            entry.key_nbytes = <uint32_t>key_nbytes
            memcpy(key_of(entry), text, key_nbytes)
            slots_add(&self._by_key, hash, ref)
        else:
            former = entry[0]
            self._leave(ref)
        entry.offset = offset
        entry.crc = crc
        entry.kind = kind
        self.changes += 1
        if nbytes:
            slots_add(&self._by_offset, offset_hash(offset), ref)
            self.footprint_nbytes += self._blocks_of(nbytes)
        if is_new:
            self._append(ref, AGAIN if self._is_back(hash) else ONCE)
        elif last:
            self._unlink(ref)
            self._append(ref, AGAIN)
        if is_new:
            return None
        return self._given_up(&former)

    def pop(self, key, bint evicted=False):
        """Takes the blob out; returns its record, or None where it was not there. ``evicted``: so
        that others have room."""
        cdef uint32_t ref = self._find(key)
        cdef Entry former
        if not ref:
            return None
        former = self._entry(ref)[0]
        self._leave(ref)
        self._unlink(ref)
        if evicted and not former.used & AGAIN:
            self._remember(former.hash)
        slots_remove(&self._by_key, former.hash, ref)
        self.changes += 1
        if self._by_key.count:
            arena_release(&self._arena, ref, sizeof(Entry) + former.key_nbytes)
        else:
            arena_clear(&self._arena)
        return self._given_up(&former)

    def use(self, list keys not None):
        """Makes the blobs of ``keys`` the ones used last, in that order, and returns their records;
        None, and nothing changes, unless all are there."""
        # Everything of Python's before the look-ups, and after the last entry was looked at.
        cdef list held = [plain(key) if isinstance(key, str) else None for key in keys]
        cdef Py_ssize_t count = len(held), i, nbytes = 0
        cdef list kinds = [None] * count
        cdef list found = [None] * count
        cdef uint32_t *refs = <uint32_t *>malloc((count + 1) * sizeof(uint32_t))
        cdef Entry *copies = <Entry *>malloc((count + 1) * sizeof(Entry))
        cdef const char *text
        try:
            if refs == NULL or copies == NULL:
                raise MemoryError()
            for i in range(count):
                if held[i] is None:
                    return None
                text = utf8(held[i], &nbytes)
                refs[i] = self._look_up(text, nbytes, hash_of(text, nbytes, _seed))
                if not refs[i]:
                    return None
            for i in range(count):
                self._unlink(refs[i])
                self._append(refs[i], AGAIN)
                copies[i] = self._entry(refs[i])[0]
                kinds[i] = self._kinds.all[copies[i].kind]
            self.changes += 1
            # Each record is an object, after which an entry may be another's.
            for i in range(count):
                found[i] = self._made(&copies[i], kinds[i])
        finally:
            free(refs)
            free(copies)
        return found

    def touch(self, list keys not None):
        """As :meth:`use`, of those of ``keys`` that are there; returns how many. Makes no records,
        which take most of its time."""
        cdef uint32_t ref, count = 0
        for key in keys:
            ref = self._find(key)
            if ref:
                self._unlink(ref)
                self._append(ref, AGAIN)
                count += 1
        if count:
            self.changes += 1
        return count

    def tick(self):
        """Counts a use of something else; returns the count."""
        self.now += 1
        return self.now

    # -- by offset ------------------------------------------------------------------------------

    def key_at(self, uint64_t offset):
        """The key of the blob whose extent begins at ``offset``, or None."""
        cdef uint32_t ref = self._at(offset)
        return self._key(ref) if ref else None

    def used_at(self, uint64_t offset):
        """:attr:`now` as of the last use of the blob whose extent begins at ``offset``, or None;
        with :attr:`once_weight`, so that it may be below 0."""
        cdef uint32_t ref = self._at(offset)
        return <int64_t>(self.now - self._age(ref, self.once_weight)) if ref else None

    def used_since(self, int64_t then, size_t most):
        """The keys of the blobs used after :attr:`now` was ``then``, or the last ``most`` of them,
        as a list in the order of use."""
        cdef list found = []
        cdef Walk walk = self._walk_back()
        cdef uint32_t ref = self._step_back(&walk)
        cdef uint64_t changes = self.changes
        while ref and most and <int64_t>(self._entry(ref).used >> 1) > then:
            found.append(self._key(ref))
            if changes != self.changes:
                raise RuntimeError("the blobs changed during iteration")
            most -= 1
            ref = self._step_back(&walk)
        found.reverse()
        return found

    def expect(self, uint64_t count):
        """Makes room in the tables for so many more blobs at once."""
        slots_reserve(&self._by_key, self._by_key.count + count)
        slots_reserve(&self._by_offset, self._by_offset.count + count)

    def offsets(self):
        """Where the extents of all blobs begin, as a list; that of the blob used longest ago
        first."""
        cdef list found = []
        cdef Walk walk = self._walk()
        cdef uint32_t ref = self._step(&walk, 1)
        cdef Entry *entry
        while ref:
            entry = self._entry(ref)
            if self._kinds.nbytes[entry.kind]:
                found.append(entry.offset)
            ref = self._step(&walk, 1)
        return found

    def oldest(self):
        """Where the extents of all blobs begin, one by one, in the order of :meth:`used_at`.
        RuntimeError once anything changes."""
        cdef Walk walk = self._walk()
        cdef uint32_t weight = self.once_weight
        cdef uint32_t ref = self._step(&walk, weight)
        cdef uint64_t changes = self.changes
        while ref:
            if self._kinds.nbytes[self._entry(ref).kind]:
                yield self._entry(ref).offset
                if changes != self.changes:
                    raise RuntimeError("the blobs changed during iteration")
            ref = self._step(&walk, weight)

    @property
    def end(self):
        """Where the last extent ends; 0 where there is none."""
        cdef Walk walk = self._walk()
        cdef uint32_t ref = self._step(&walk, 1)
        cdef uint64_t end = 0
        cdef Entry *entry
        while ref:
            entry = self._entry(ref)
            ref = self._step(&walk, 1)
            if self._kinds.nbytes[entry.kind]:
                end = max(end, entry.offset + self._kinds.nbytes[entry.kind])
        return end

    def reserve(self, ExtentMap extents not None):
        """Adds the extents of all blobs. False, and some were added, where one lies outside or
        begins or ends where another one does."""
        cdef Walk walk = self._walk()
        cdef uint32_t ref = self._step(&walk, 1)
        cdef uint64_t offset, blocks, block_nbytes = extents._block_nbytes
        cdef Entry *entry
        while ref:
            entry = self._entry(ref)
            ref = self._step(&walk, 1)
            blocks = self._kinds.nbytes[entry.kind]
            if blocks == 0:
                continue
            blocks = (blocks - 1) // block_nbytes + 1
            offset = entry.offset - extents._start
            if (entry.offset < extents._start or offset % block_nbytes
                    or blocks > extents._blocks
                    or offset // block_nbytes > extents._blocks - blocks):
                return False
            if extents._place(offset // block_nbytes, blocks) < 0:
                return False
        return True

    # -- entries --------------------------------------------------------------------------------

    cdef inline Entry *_entry(self, uint32_t ref) noexcept:
        return <Entry *>arena_at(&self._arena, ref)

    cdef inline uint64_t _blocks_of(self, uint64_t nbytes) noexcept:
        return (nbytes + self._block_nbytes - 1) // self._block_nbytes * self._block_nbytes

    cdef uint32_t _find(self, key) except? 0:
        cdef Py_ssize_t nbytes = 0
        cdef object held
        cdef const char *text
        if not isinstance(key, str):
            return 0
        held = plain(key)
        text = utf8(held, &nbytes)
        return self._look_up(text, nbytes, hash_of(text, nbytes, _seed))

    cdef uint32_t _look_up(self, const char *text, Py_ssize_t nbytes, uint32_t hash) noexcept:
        cdef Slots *t = &self._by_key
        cdef uint32_t at = hash & t.mask, ref
        cdef Entry *entry
        while True:
            ref = t.slots[at].ref
            if ref == 0:
                return 0
            if t.slots[at].hash == hash:
                entry = self._entry(ref)
                if entry.key_nbytes == nbytes and memcmp(key_of(entry), text, nbytes) == 0:
                    return ref
            at = (at + 1) & t.mask

    cdef uint32_t _at(self, uint64_t offset) noexcept:
        cdef Slots *t = &self._by_offset
        cdef uint32_t hash = offset_hash(offset), at = hash & t.mask
        while t.slots[at].ref:
            if t.slots[at].hash == hash and self._entry(t.slots[at].ref).offset == offset:
                return t.slots[at].ref
            at = (at + 1) & t.mask
        return 0

    cdef void _leave(self, uint32_t ref) noexcept:
        """The entry's extent is not its own any more."""
        cdef Entry *entry = self._entry(ref)
        cdef uint64_t nbytes = self._kinds.nbytes[entry.kind]
        if nbytes:
            slots_remove(&self._by_offset, offset_hash(entry.offset), ref)
            self.footprint_nbytes -= self._blocks_of(nbytes)

    cdef void _unlink(self, uint32_t ref) noexcept:
        cdef Entry *entry = self._entry(ref)
        cdef uint32_t which = entry.used & AGAIN
        if entry.older:
            self._entry(entry.older).newer = entry.newer
        else:
            self._oldest[which] = entry.newer
        if entry.newer:
            self._entry(entry.newer).older = entry.older
        else:
            self._newest[which] = entry.older

    cdef void _append(self, uint32_t ref, uint32_t which) noexcept:
        """It is used now."""
        cdef Entry *entry = self._entry(ref)
        self.now += 1
        entry.used = self.now << 1 | which
        entry.older = self._newest[which]
        entry.newer = 0
        if entry.older:
            self._entry(entry.older).newer = ref
        else:
            self._oldest[which] = ref
        self._newest[which] = ref

    cdef inline uint64_t _age(self, uint32_t ref, uint32_t once_weight) noexcept:
        """In uses since its own last one."""
        cdef Entry *entry = self._entry(ref)
        cdef uint64_t age = self.now - (entry.used >> 1)
        return age if entry.used & AGAIN else age * once_weight

    cdef Walk _walk(self) noexcept:
        """To all entries, by :meth:`_step`."""
        cdef Walk walk
        walk.next[ONCE] = self._oldest[ONCE]
        walk.next[AGAIN] = self._oldest[AGAIN]
        return walk

    cdef Walk _walk_back(self) noexcept:
        """To all entries, by :meth:`_step_back`."""
        cdef Walk walk
        walk.next[ONCE] = self._newest[ONCE]
        walk.next[AGAIN] = self._newest[AGAIN]
        return walk

    cdef uint32_t _step(self, Walk *walk, uint32_t once_weight) noexcept:
        """The oldest entry that ``walk`` has not come to; 0 after the last."""
        cdef uint32_t once = walk.next[ONCE], again = walk.next[AGAIN]
        if once and (not again or self._age(once, once_weight) >= self._age(again, 1)):
            walk.next[ONCE] = self._entry(once).newer
            return once
        if again:
            walk.next[AGAIN] = self._entry(again).newer
        return again

    cdef uint32_t _step_back(self, Walk *walk) noexcept:
        """As :meth:`_step` from the other end, of a walk that begins at the newest of each list."""
        cdef uint32_t once = walk.next[ONCE], again = walk.next[AGAIN]
        if once and (not again or self._entry(once).used >= self._entry(again).used):
            walk.next[ONCE] = self._entry(once).older
            return once
        if again:
            walk.next[AGAIN] = self._entry(again).older
        return again

    cdef bint _is_back(self, uint32_t hash) noexcept:
        """Whether a key was evicted before it was used again, not long ago."""
        return self._gone != NULL and hash != 0 and self._gone[hash & self._gone_mask] == hash

    cdef void _remember(self, uint32_t hash) noexcept:
        """What :meth:`_is_back` asks for; as many as there are blobs, more or less: one takes the
        place of another by chance. Without memory nothing is remembered."""
        cdef uint64_t room = 1024
        cdef void *made
        if self._gone == NULL or self._gone_mask < self._by_key.count // 2:
            while room < self._by_key.count:
                room *= 2
            made = calloc(room, sizeof(uint32_t))
            if made == NULL:
                return
            free(self._gone)
            self._gone = <uint32_t *>made
            self._gone_mask = <uint32_t>(room - 1)
        self._gone[hash & self._gone_mask] = hash

    cdef _key(self, uint32_t ref):
        cdef Entry *entry = self._entry(ref)
        cdef const char *text = key_of(entry)
        cdef object held
        if memchr(text, 0xED, entry.key_nbytes) != NULL:
            # With surrogates, perhaps: they are decoded with objects' help, and entries may move.
            held = PyBytes_FromStringAndSize(text, entry.key_nbytes)
            text = PyBytes_AS_STRING(held)
            return PyUnicode_DecodeUTF8(text, PyBytes_GET_SIZE(held), "surrogatepass")
        return PyUnicode_DecodeUTF8(text, entry.key_nbytes, "surrogatepass")

    cdef _record(self, uint32_t ref):
        cdef Entry copied = self._entry(ref)[0]
        return self._made(&copied, self._kinds.all[copied.kind])

    cdef _made(self, Entry *entry, tuple kind):
        return _NEW(self._make, (entry.offset, kind[0], kind[1], kind[2], entry.crc))

    cdef _given_up(self, Entry *former):
        """The record of an entry that is over."""
        try:
            return self._made(former, self._kinds.all[former.kind])
        finally:
            self._kinds.drop(former.kind)

cdef inline char *key_of(Entry *entry) noexcept:
    return <char *>entry + sizeof(Entry)


cdef inline uint32_t offset_hash(uint64_t offset) noexcept:
    return <uint32_t>mixed(offset)


cdef plain(key):
    """``key``, or its bytes where it has lone surrogates, which are legal in a key."""
    cdef Py_ssize_t nbytes
    try:
        PyUnicode_AsUTF8AndSize(key, &nbytes)
    except UnicodeEncodeError:
        return key.encode("utf-8", "surrogatepass")
    return key


cdef inline const char *utf8(plain_key, Py_ssize_t *nbytes) except NULL:
    """The bytes of what :func:`plain` returned, which live as long as that."""
    if isinstance(plain_key, bytes):
        nbytes[0] = PyBytes_GET_SIZE(plain_key)
        return PyBytes_AS_STRING(plain_key)
    return PyUnicode_AsUTF8AndSize(plain_key, nbytes)
