# cython: language_level=3
"""CRC32C over buffers; releases the GIL."""

from libc.stdint cimport uint32_t, uint64_t

from crc32c cimport skv_crc32c, skv_crc32c_combine, skv_crc32c_name, skv_crc32c_with


def crc32c(const unsigned char[::1] data not None, uint32_t crc=0):
    """CRC32C of ``data`` (any contiguous buffer of bytes), continued from ``crc``."""
    cdef const unsigned char *address = &data[0] if data.shape[0] else NULL
    cdef size_t nbytes = data.shape[0]
    if not nbytes:
        return crc
    with nogil:
        crc = skv_crc32c(crc, address, nbytes)
    return crc


def crc32c_with(str implementation not None, const unsigned char[::1] data not None,
                uint32_t crc=0):
    """As :func:`crc32c`, by the named implementation; LookupError if it cannot run here."""
    cdef uint32_t result
    cdef bytes name = implementation.encode()
    cdef const unsigned char *address = &data[0] if data.shape[0] else NULL
    if skv_crc32c_with(name, crc, address, data.shape[0], &result):
        raise LookupError(f"no CRC32C implementation {implementation!r} on this processor")
    return result


def crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b):
    """CRC32C of A followed by B, from the CRC of each and the length of B."""
    return skv_crc32c_combine(crc_a, crc_b, nbytes_b)


def implementation():
    """The implementation in use on this processor: vpclmul, fused, sse4.2, armv8 or table."""
    return skv_crc32c_name().decode()
