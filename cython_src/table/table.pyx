# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What a store holds, packed: millions of extents and blobs without a Python object for each.

Python runs signal handlers between its own bytecodes, never within these methods, and each of them
changes everything or nothing. No Python object is made between the first step of a change and the
last: that may run the garbage collector, and so any finalizer, and so other threads.
"""

cimport cython
from cpython.bytes cimport (PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize,
                            PyBytes_GET_SIZE)
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memset

import os

include "extents.pxi"
include "slots.pxi"
include "arena.pxi"
include "kinds.pxi"
include "blobs.pxi"
include "packed.pxi"
include "rows.pxi"
