"""CRC32C: the standard's vectors, and every implementation against the plain one."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdk_kv._native import checksum
from spdk_kv._native.checksum import crc32c, crc32c_combine, crc32c_with
from support.rounds import examples

NAMES = ["vpclmul", "fused", "sse4.2", "armv8", "table"]
steady = settings(max_examples=examples(100))

# RFC 3720, appendix B.4.
ISCSI_READ = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018"
    "28000000 00000000 02000000 00000000"
)
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (ISCSI_READ, 0xD9963A56),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


def usable() -> list[str]:
    found = []
    for name in NAMES:
        try:
            crc32c_with(name, b"x")
        except LookupError:
            continue
        found.append(name)
    return found


def by_definition(data: bytes) -> int:
    """Bit by bit: shares nothing with the code under test."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("data", "crc"), VECTORS)
def test_the_standard_s_vectors(name, data, crc):
    if name not in usable():
        pytest.skip(f"this processor does not run {name}")
    assert crc32c_with(name, data) == crc == crc32c(data)


def test_the_best_implementation_that_runs_here_is_taken():
    assert checksum.implementation() == usable()[0]
    with pytest.raises(LookupError, match="abacus"):
        crc32c_with("abacus", b"")


def test_all_implementations_agree_at_every_length_and_start():
    data = np.random.default_rng(1).bytes(2048)
    for name in usable():
        for start in (0, 1, 3, 7, 8, 63):
            for nbytes in [*range(70), 255, 256, 257, 511, 512, 513, 767, 768, 1023, 1024, 1500]:
                piece = memoryview(data)[start : start + nbytes]
                assert crc32c_with(name, piece) == crc32c_with("table", piece), (name, nbytes)
    data = np.random.default_rng(2).bytes(60_000)
    for name in usable():
        # Around the blocks of each: streams of 680 and 8192 bytes, turns of 248.
        for unit in (248, 3 * 680, 8 * 248, 4096, 64 * 248, 3 * 8192, 2 * 64 * 248, 50_000):
            for nbytes in (unit - 1, unit, unit + 1, unit + 248, unit + 8 * 248 + 3):
                piece = memoryview(data)[5 : 5 + nbytes]
                assert crc32c_with(name, piece, 7) == crc32c_with("table", piece, 7), (name, nbytes)
    for nbytes in (0, 1, 300):
        assert crc32c_with("table", data[:nbytes]) == by_definition(data[:nbytes])


@steady
@given(
    nbytes=st.integers(0, 120_000),
    start=st.integers(0, 70),
    cut=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    crc=st.integers(0, 2**32 - 1),
)
def test_long_runs_agree_continue_and_combine(nbytes, start, cut, seed, crc):
    data = np.random.default_rng(seed).bytes(nbytes + start)[start:]
    whole = memoryview(np.frombuffer(bytes(start) + data, np.uint8))[start:]
    at = int(cut * nbytes)
    for name in usable():
        assert crc32c_with(name, whole, crc) == crc32c_with("table", data, crc)
        assert crc32c_with(name, whole[at:], crc32c_with(name, whole[:at])) == crc32c(data)
    assert crc32c_combine(crc32c(data[:at]), crc32c(data[at:]), nbytes - at) == crc32c(data)


def test_any_buffer_that_is_contiguous():
    array = np.arange(300, dtype=np.uint8)
    assert crc32c(array) == crc32c(bytearray(array)) == crc32c(memoryview(array))
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(array[::2])
    mapped = mmap.mmap(-1, 4096)
    mapped[:9] = b"123456789"
    with memoryview(mapped) as view:
        assert crc32c(view[:9]) == 0xE3069283


def test_nothing_beyond_the_end_is_read():
    """The last bytes before a page that may not be touched."""
    import ctypes

    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    mapped = mmap.mmap(-1, 2 * page)
    at = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert libc.mprotect(ctypes.c_void_p(at + page), page, 0) == 0
    try:
        for nbytes in (1, 7, 8, 63, 255, 256, 300, 511, 512, 700, 1024, 4096):
            view = (ctypes.c_ubyte * nbytes).from_address(at + page - nbytes)
            assert crc32c(view) == crc32c(bytes(nbytes))
    finally:
        libc.mprotect(ctypes.c_void_p(at + page), page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_many_threads_at_the_same_time():
    data = np.random.default_rng(4).bytes(1 << 20)
    wanted = crc32c(data)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(30):
            if crc32c(data) != wanted:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
