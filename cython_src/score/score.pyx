# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Scores of tokens from 2-bit codes of their keys, and the groups of tokens that score best.

A key is centred, rotated by random signs and a Walsh-Hadamard transform, and rounded to four levels
(c - 3/2) * scale, c being 0 to 3, with one scale per token. Its code has D / 4 bytes: byte j holds
the elements 4j to 4j + 3, two bits each, from the lowest bits up. Rotations keep dot products: a
query that is rotated the same way is scored against the codes as they lie.

All functions take C-contiguous buffers, check them before anything is written, raise ValueError
for those that do not fit, and release the GIL. Nothing is shared between calls; what a call reads
must not change meanwhile. Every implementation gives the same bits.
"""

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.math cimport INFINITY, isfinite, log, lrintf, sqrtf
from libc.stdint cimport INT32_MAX, int8_t, int32_t, int64_t, uint8_t
from libc.string cimport memcpy

from kernels cimport SKV_MAX_DIM, skv_kernels, skv_kernels_find


def implementation():
    """The implementation in use on this processor: avx2 or portable."""
    return skv_kernels_find(NULL).name.decode()


cdef const skv_kernels *kernels_of(str name) except NULL:
    if name is None:
        return skv_kernels_find(NULL)
    cdef const skv_kernels *kernels = skv_kernels_find(<bytes>name.encode())
    if kernels is NULL:
        raise LookupError(f"no implementation {name!r} of scoring on this processor")
    return kernels


cdef size_t block_of(Py_ssize_t dim) noexcept nogil:
    """The largest power of two that divides ``dim``: what a transform spans."""
    return dim & -dim


cdef int check_code(Py_ssize_t dim, Py_ssize_t n, Py_ssize_t signs, Py_ssize_t codes_n,
                    Py_ssize_t codes_nbytes, Py_ssize_t scales) except -1:
    if dim % 4 or not 4 <= dim <= SKV_MAX_DIM:
        raise ValueError(f"a head has a multiple of 4 dimensions, 4 to {SKV_MAX_DIM}: not {dim}")
    if signs != dim:
        raise ValueError(f"{signs} signs for {dim} dimensions")
    if codes_n != n or codes_nbytes * 4 != dim:
        raise ValueError(f"codes [{codes_n}, {codes_nbytes}] for {n} tokens of {dim // 4} bytes")
    if scales != n:
        raise ValueError(f"{scales} scales for {n} tokens")
    return 0


def encode(const float[:, ::1] keys not None, const float[::1] mean not None,
           const float[::1] signs not None, uint8_t[:, ::1] codes not None,
           float[::1] scales not None, str implementation=None):
    """Writes the ``codes`` and ``scales`` of one KV head's ``keys``.

    Each scale is the one that fits its token's levels best. A key that holds NaN or infinity, or
    whose squares overflow, has the scale 0 and the code 0: its score is 0.

    Args:
        keys: float32 [n, D], after the position embedding; D a multiple of 4, at most 1024.
        mean: float32 [D], subtracted from each key.
        signs: float32 [D] of +1 and -1.
        codes: uint8 [n, D / 4], written.
        scales: float32 [n], written.
        implementation: One of the implementations instead of the fastest. LookupError if this
            processor cannot run it.
    """
    cdef const skv_kernels *kernels = kernels_of(implementation)
    cdef size_t n = keys.shape[0], dim = keys.shape[1]
    check_code(dim, n, signs.shape[0], codes.shape[0], codes.shape[1], scales.shape[0])
    if mean.shape[0] != keys.shape[1]:
        raise ValueError(f"a mean of {mean.shape[0]} for {dim} dimensions")
    if n:
        with nogil:
            kernels.encode(&keys[0, 0], &mean[0], &signs[0], n, dim, block_of(dim), &codes[0, 0],
                           &scales[0])


cdef void rotate(float *x, const float *query, const float *signs, size_t dim) noexcept nogil:
    """``x``: the query as keys are rotated."""
    cdef size_t block = block_of(dim), half = 1, i
    cdef float low, high, norm = 1 / sqrtf(<float>block)
    for i in range(dim):
        x[i] = query[i] * signs[i]
    while half < block:
        for i in range(dim):
            if not i & half:
                low, high = x[i], x[i + half]
                x[i], x[i + half] = low + high, low - high
        half *= 2
    for i in range(dim):
        x[i] *= norm


cdef float quantise(int8_t *out, int32_t *total, const float *x, size_t dim) noexcept nogil:
    """Rounds to 255 levels: x = result * out, nearly. 0 for what is not finite, and for zeros."""
    cdef float most = 0, inverse
    cdef bint is_finite = True
    cdef size_t i
    for i in range(dim):
        is_finite = is_finite and isfinite(x[i])
        most = max(most, abs(x[i]))
    inverse = 127 / most
    total[0] = 0
    if not is_finite or not isfinite(inverse):
        for i in range(dim):
            out[i] = 0
        return 0
    for i in range(dim):
        out[i] = <int8_t>lrintf(x[i] * inverse)
        total[0] += out[i]
    return most / 127


def score(const float[:, ::1] queries not None, const float[::1] signs not None,
          const uint8_t[:, ::1] codes not None, const float[::1] scales not None,
          float[:, ::1] out not None, str implementation=None):
    """The dot products of the queries of one KV head with its keys less their mean, nearly.

    Queries are rounded to 8 bits. One that holds NaN or infinity scores 0 everywhere.

    Args:
        queries: float32 [h, D], as the attention has them (not rotated); D as in :func:`encode`.
        signs: float32 [D], those of the codes.
        codes: uint8 [n, D / 4].
        scales: float32 [n].
        out: float32 [h, n], written.
        implementation: As in :func:`encode`.

    Raises:
        MemoryError: There is none for a copy of the queries; nothing was written.
    """
    cdef const skv_kernels *kernels = kernels_of(implementation)
    cdef size_t heads = queries.shape[0], dim = queries.shape[1], n = codes.shape[0], h
    check_code(dim, n, signs.shape[0], n, codes.shape[1], scales.shape[0])
    if out.shape[0] != queries.shape[0] or out.shape[1] != codes.shape[0]:
        raise ValueError(f"out is [{out.shape[0]}, {out.shape[1]}], not [{heads}, {n}]")
    if not heads or not n:
        return
    # Per head: D floats and two numbers, then D bytes.
    cdef float *rotated = <float *>PyMem_RawMalloc(
        heads * ((dim + 1) * sizeof(float) + sizeof(int32_t) + dim))
    if rotated is NULL:
        raise MemoryError(f"no memory for {heads} queries")
    cdef float *factors = rotated + heads * dim
    cdef int32_t *totals = <int32_t *>(factors + heads)
    cdef int8_t *rounded = <int8_t *>(totals + heads)
    with nogil:
        for h in range(heads):
            rotate(rotated + h * dim, &queries[h, 0], &signs[0], dim)
            # The kernels give twice the dot product, in integers.
            factors[h] = quantise(rounded + h * dim, totals + h, rotated + h * dim, dim) / 2
        kernels.dots(rounded, factors, totals, heads, &codes[0, 0], &scales[0], n, dim, &out[0, 0])
        PyMem_RawFree(rotated)


def softmax_max(const float[:, ::1] scores not None, Py_ssize_t group, float[::1] out not None,
                str implementation=None):
    """For each group of tokens the greatest log-probability that any head gives any of them.

    That is the maximum of ``scores[h, t] - logsumexp(scores[h, :])`` over the heads and the
    group's tokens. NaN counts as -inf. A score of +inf has the log-probability 0, the others of
    its head -inf; so has a head without any score above -inf. The exponentials have a relative
    error below 5e-6, and so nearly has their sum.

    Args:
        scores: float32 [h, n], already divided by sqrt(D).
        group: Tokens of a group; the last group may have fewer.
        out: float32 [ceil(n / group)], written.
        implementation: As in :func:`encode`.

    Raises:
        MemoryError: There is none for a copy of ``out``; nothing was written.
    """
    cdef const skv_kernels *kernels = kernels_of(implementation)
    cdef size_t heads = scores.shape[0], n = scores.shape[1], groups, h, i
    cdef float most, log_sum
    if group < 1:
        raise ValueError(f"groups have 1 token or more, not {group}")
    groups = n // <size_t>group + (n % <size_t>group != 0)
    if <size_t>out.shape[0] != groups:
        raise ValueError(f"out has {out.shape[0]} groups, not {groups}")
    if not groups:
        return
    cdef float *maxima = <float *>PyMem_RawMalloc(groups * sizeof(float))
    if maxima is NULL:
        raise MemoryError(f"no memory for {groups} groups")
    with nogil:
        for i in range(groups):
            out[i] = -INFINITY
        for h in range(heads):
            most = kernels.group_max(&scores[h, 0], n, group, maxima)
            if most == INFINITY:
                for i in range(groups):
                    if maxima[i] == INFINITY:
                        out[i] = 0
            elif most > -INFINITY:
                log_sum = <float>log(kernels.exp_sum(&scores[h, 0], n, most))
                kernels.raise_to(maxima, groups, most, log_sum, &out[0])
        PyMem_RawFree(maxima)


cdef int32_t threshold(const skv_kernels *kernels, const int32_t *keys, size_t n, size_t count,
                       int32_t low, int32_t high) noexcept nogil:
    """The greatest number, or nearly, that at least ``count`` of the keys reach; more than
    ``count`` do only if some equal it. The keys are from ``low`` to ``high``."""
    cdef int32_t middle
    cdef size_t found
    while low < high:
        middle = <int32_t>(low + (<int64_t>high - low + 1) // 2)
        found = kernels.count_from(keys, n, middle)
        if found == count:
            return middle
        if found > count:
            low = middle
        else:
            high = middle - 1
    return low


def top_groups(const float[::1] scores not None, Py_ssize_t count, int64_t[::1] out not None,
               str implementation=None):
    """The numbers of the ``count`` greatest scores, in ascending order.

    Of equal scores those with lower numbers are taken; NaN comes after -inf. Takes a time that
    depends on how many there are, and hardly on what they are.

    Args:
        scores: float32 [n].
        count: How many are wanted, 0 or more.
        out: int64 [min(count, n)], written.
        implementation: As in :func:`encode`.

    Raises:
        MemoryError: There is none for a copy of the scores; nothing was written.
    """
    cdef const skv_kernels *kernels = kernels_of(implementation)
    cdef size_t n = scores.shape[0], wanted, ties, i, taken = 0
    cdef int32_t low, high, bound
    if count < 0:
        raise ValueError(f"{count} groups are wanted")
    wanted = min(<size_t>count, n)
    if <size_t>out.shape[0] != wanted:
        raise ValueError(f"out has {out.shape[0]} numbers, not {wanted}")
    if not wanted:
        return
    cdef int32_t *keys = <int32_t *>PyMem_RawMalloc(n * sizeof(int32_t))
    if keys is NULL:
        raise MemoryError(f"no memory for {n} scores")
    with nogil:
        kernels.order(&scores[0], n, keys, &low, &high)
        bound = threshold(kernels, keys, n, wanted, low, high)
        # No float has the key INT32_MAX: bound + 1 does not overflow.
        ties = wanted - min(wanted, kernels.count_from(keys, n, bound + 1))
        for i in range(n):
            if keys[i] >= bound:
                if keys[i] == bound:
                    if not ties:
                        continue
                    ties -= 1
                out[taken] = i
                taken += 1
        PyMem_RawFree(keys)


def gather(const uint8_t[::1] source not None, const int64_t[::1] offsets not None,
           Py_ssize_t nbytes, uint8_t[::1] target not None):
    """Copies pieces of a buffer one behind the other.

    Args:
        source: Bytes.
        offsets: int64 [m]: where in ``source`` each piece begins.
        nbytes: Size of a piece.
        target: Bytes [m * nbytes], written; it must not overlap ``source``.
    """
    cdef size_t m = offsets.shape[0], i
    cdef int64_t last = source.shape[0] - nbytes
    if nbytes < 0 or target.shape[0] != <Py_ssize_t>m * nbytes:
        raise ValueError(f"target has {target.shape[0]} bytes for {m} pieces of {nbytes}")
    for i in range(m):
        if not 0 <= offsets[i] <= last:
            raise ValueError(f"piece {i} of {nbytes} bytes at {offsets[i]} is not within the "
                             f"{source.shape[0]} bytes of the source")
    if not m or not nbytes:
        return
    with nogil:
        for i in range(m):
            memcpy(&target[i * nbytes], &source[offsets[i]], nbytes)
