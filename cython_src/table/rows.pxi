# The rows of an index as entries of a table.
# Included in table.pyx: one C translation unit.

cdef enum:
    # Of a row's record: length of the key, offset, checksum of the payload; then the kind, and the
    # checksum of the row, which is zlib's.
    RECORD_HEAD = 16
    RECORD_LEAST = 20

cdef uint32_t[8][256] _CRC32


cdef void begin_crc32() noexcept:
    cdef uint32_t i, k, crc
    for i in range(256):
        crc = i
        for k in range(8):
            crc = (crc >> 1) ^ (0xEDB88320UL if crc & 1 else 0)
        _CRC32[0][i] = crc
    for k in range(1, 8):
        for i in range(256):
            _CRC32[k][i] = (_CRC32[k - 1][i] >> 8) ^ _CRC32[0][_CRC32[k - 1][i] & 0xFF]

begin_crc32()


cdef uint32_t crc32(uint32_t crc, const unsigned char *bytes, size_t nbytes) noexcept:
    """As zlib's: no call of Python for each row, whose two parts it goes over."""
    cdef uint64_t word
    crc = ~crc
    while nbytes >= 8:
        memcpy(&word, bytes, 8)
        word ^= crc
        crc = (_CRC32[7][word & 0xFF] ^ _CRC32[6][word >> 8 & 0xFF]
               ^ _CRC32[5][word >> 16 & 0xFF] ^ _CRC32[4][word >> 24 & 0xFF]
               ^ _CRC32[3][word >> 32 & 0xFF] ^ _CRC32[2][word >> 40 & 0xFF]
               ^ _CRC32[1][word >> 48 & 0xFF] ^ _CRC32[0][word >> 56])
        bytes += 8
        nbytes -= 8
    while nbytes:
        crc = (crc >> 8) ^ _CRC32[0][(crc ^ bytes[0]) & 0xFF]
        bytes += 1
        nbytes -= 1
    return ~crc


cdef class RowReader:
    """Adds the rows of an index to ``table``, which has none of them (None: to nothing, and their
    records are not looked at), and compares them with what SQLite's own index of the keys says.

    A row's checksum begins with ``crc_seed``. ``parse_kind`` makes (nbytes, dtype, shape) of a
    kind's bytes. ValueError, and the table is of no use, for what is no row; :attr:`row` is its
    number then.
    """
    cdef BlobTable _table
    cdef object _parse_kind
    cdef uint32_t _crc_seed
    cdef readonly int64_t row
    cdef readonly uint64_t count   # of rows
    # Sums of a hash of each row's number and key: the same ones in any order.
    cdef uint64_t _sum
    cdef uint64_t _key_sum
    cdef uint64_t _key_count
    cdef object _last_key

    def __cinit__(self, BlobTable table, uint32_t crc_seed, parse_kind):
        self._table = table
        self._crc_seed = crc_seed
        self._parse_kind = parse_kind

    def add(self, list rows not None):
        """Adds rows, each (number, key, record), as the ones used last in turn."""
        cdef Py_ssize_t at = 0, count = len(rows)
        cdef dict numbers = {}
        cdef Unpacked some[AHEAD]
        cdef uint32_t found, i
        try:
            while at < count:
                if self._table is not None:
                    slots_reserve(&self._table._by_key, <uint64_t>self._table._by_key.count + AHEAD)
                    slots_reserve(&self._table._by_offset,
                                  <uint64_t>self._table._by_offset.count + AHEAD)
                found = 0
                while at < count and found < AHEAD:
                    self._read(rows[at], &some[found], numbers)
                    found += 1
                    at += 1
                if self._table is not None:
                    for i in range(found):
                        add_unpacked(self._table, &some[i])
        finally:
            for each in numbers.values():
                self._table._kinds.drop(each)

    def change(self, list rows not None):
        """Puts rows into the table, each (number, key, record) and as the one used last in turn, or
        takes out that with the key (record None). They do not count as rows."""
        cdef dict numbers = {}
        cdef Unpacked one
        cdef BlobTable table = self._table
        cdef uint32_t number
        try:
            for row in rows:
                if row[2] is None:
                    table.pop((<bytes?>row[1]).decode("utf-8", "surrogatepass"))
                    continue
                self._read(row, &one, numbers)
                if table._look_up(one.key, one.key_nbytes, one.hash):
                    nbytes, dtype, shape = table._kinds.all[one.kind]
                    table._put((<bytes>row[1]).decode("utf-8", "surrogatepass"), one.offset, nbytes,
                               dtype, shape, one.crc, True)
                    continue
                slots_reserve(&table._by_key, <uint64_t>table._by_key.count + 1)
                slots_reserve(&table._by_offset, <uint64_t>table._by_offset.count + 1)
                add_unpacked(table, &one)
        finally:
            for number in numbers.values():
                table._kinds.drop(number)

    cdef int _read(self, tuple row, Unpacked *one, dict numbers) except -1:
        """``one`` refers to the row, which has to live as long."""
        cdef uint64_t hash
        cdef const char *record
        cdef Py_ssize_t nbytes
        cdef uint32_t key_nbytes, crc, expected
        cdef object number, key, packed
        number, key, packed = row
        self.row = number
        if not PyBytes_CheckExact(key) or not PyBytes_CheckExact(packed):
            raise ValueError("it is malformed: key and record are not bytes")
        one.key = PyBytes_AS_STRING(key)
        if PyBytes_GET_SIZE(key) > 0x7FFFFFFF:
            raise ValueError("its key is too long")
        one.key_nbytes = <uint32_t>PyBytes_GET_SIZE(key)
        hash = long_hash_of(one.key, one.key_nbytes, _seed)
        self._sum += mixed(hash ^ mixed(<uint64_t>self.row))
        self.count += 1
        if self._table is None:
            return 0
        record, nbytes = PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed)
        if nbytes < RECORD_LEAST:
            raise ValueError("it is malformed: it is too short")
        memcpy(&expected, record + nbytes - 4, 4)
        crc = crc32(self._crc_seed, <const unsigned char *>one.key, one.key_nbytes)
        if crc32(crc, <const unsigned char *>record, nbytes - 4) != expected:
            raise ValueError("its checksum does not match")
        memcpy(&key_nbytes, record, 4)
        if key_nbytes != one.key_nbytes:
            raise ValueError("its key has the wrong length")
        memcpy(&one.offset, record + 4, 8)
        memcpy(&one.crc, record + 12, 4)
        if one.offset >> 63:
            raise ValueError("it is malformed: negative field")
        check_utf8(one.key, one.key_nbytes)
        one.which = ONCE
        one.hash = <uint32_t>hash
        one.kind = self._kind(
            PyBytes_FromStringAndSize(record + RECORD_HEAD, nbytes - RECORD_LEAST), numbers)
        slots_prefetch(&self._table._by_key, one.hash)
        slots_prefetch(&self._table._by_offset, offset_hash(one.offset))
        return 0

    cdef uint32_t _kind(self, bytes packed, dict numbers) except? 0xFFFFFFFF:
        """The number of a kind, which ``numbers`` has from then on."""
        found = numbers.get(packed)
        if found is not None:
            return found
        nbytes, dtype, shape = self._parse_kind(packed)
        cdef uint32_t number = self._table._kinds.take(nbytes, dtype, shape)
        numbers[packed] = number
        return number

    def check_keys(self, list rows not None):
        """Takes (key, number) of further rows as SQLite's index of the keys has them. ValueError
        where they are not in order: it would look in the wrong place for some."""
        cdef object key, number, last = self._last_key
        cdef uint64_t hash
        cdef size_t nbytes, last_nbytes
        cdef int order
        for key, number in rows:
            self.row = number
            if not PyBytes_CheckExact(key):
                raise ValueError("its key is not bytes")
            nbytes = PyBytes_GET_SIZE(key)
            if last is not None:
                last_nbytes = PyBytes_GET_SIZE(last)
                order = memcmp(PyBytes_AS_STRING(last), PyBytes_AS_STRING(key),
                               min(nbytes, last_nbytes))
                if order > 0 or (order == 0 and last_nbytes >= nbytes):
                    raise ValueError("its key is out of order in the index of keys")
            last = key
            hash = long_hash_of(PyBytes_AS_STRING(key), nbytes, _seed)
            self._key_sum += mixed(hash ^ mixed(<uint64_t>self.row))
            self._key_count += 1
        self._last_key = last

    def agree(self):
        """Whether the index of the keys has all rows and no others."""
        return self.count == self._key_count and self._sum == self._key_sum


cdef int check_utf8(const char *text, size_t nbytes) except -1:
    """ValueError where these bytes are no key."""
    cdef uint64_t word, seen = 0
    cdef size_t at = 0
    while at + 8 <= nbytes:
        memcpy(&word, text + at, 8)
        seen |= word
        at += 8
    while at < nbytes:
        seen |= <unsigned char>text[at]
        at += 1
    if seen & 0x8080808080808080ULL:
        PyUnicode_DecodeUTF8(text, nbytes, "surrogatepass")
    return 0
