# Size, dtype and shape of blobs, which many share: each a number.
# Included in table.pyx: one C translation unit.


@cython.internal
@cython.no_gc_clear
cdef class Kinds:
    """Kinds (size, dtype, shape) by number, each as long as an entry has it."""
    cdef list all                # by number; None where no entry has one
    cdef uint64_t *nbytes        # of each
    cdef dict _numbers
    cdef list _spare
    cdef uint32_t *_counts
    cdef uint32_t _room

    def __cinit__(self):
        self.all = []
        self._numbers = {}
        self._spare = []

    def __dealloc__(self):
        free(self._counts)
        free(self.nbytes)

    cdef uint32_t take(self, nbytes, dtype, shape) except? 0xFFFFFFFF:
        """The number of a kind, which one more entry has."""
        cdef tuple kind = (nbytes, dtype, shape)
        cdef uint32_t number
        found = self._numbers.get(kind)
        if found is not None:
            number = found
        else:
            number = self._spare.pop() if self._spare else len(self.all)
            if number >= self._room:
                self._grow()
            if number == <uint32_t>len(self.all):
                self.all.append(kind)
            else:
                self.all[number] = kind
            self.nbytes[number] = nbytes
            self._counts[number] = 0
            self._numbers[kind] = number
        self._counts[number] += 1
        return number

    cdef int _grow(self) except -1:
        cdef uint32_t room = max(64, 2 * self._room)
        cdef void *counts = realloc(self._counts, room * sizeof(uint32_t))
        cdef void *nbytes
        if counts == NULL:
            raise MemoryError()
        self._counts = <uint32_t *>counts
        nbytes = realloc(self.nbytes, room * sizeof(uint64_t))
        if nbytes == NULL:
            raise MemoryError()
        self.nbytes = <uint64_t *>nbytes
        self._room = room
        return 0

    cdef drop(self, uint32_t number):
        self._counts[number] -= 1
        if self._counts[number] == 0:
            del self._numbers[self.all[number]]
            self.all[number] = None
            self._spare.append(number)
