"""What a read through the page cache brings in: large folios, and nothing beside what was asked."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.transfer import READ, Transfer
from spdk_kv.engines import QueueOptions
from spdk_kv.engines.pagecache.engine import PageCacheEngine
from spdk_kv.memory.cached import by_cachestat
from spdk_kv.units import KIB, MIB
from store.helpers import folder_fixture
from support.places import ROOT

# Exact counts: whatever takes memory meanwhile may have a page of the file.
pytestmark = pytest.mark.machine
disk = folder_fixture

FILE_NBYTES = 32 * MIB
_COMPOUND_TAIL = 1 << 16  # /proc/kpageflags
_FAST_DRIVE = ROOT / "bench" / "fast_drive.py"


@pytest.fixture(scope="module")
def simulated() -> Iterator[Path]:
    """A filesystem with the read-ahead of an NVMe drive, which is what large folios want."""
    made = run_fast_drive("make", "--size", "96MiB")
    yield Path(made)
    run_fast_drive("remove", made)


def run_fast_drive(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(_FAST_DRIVE), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(done.stderr.strip())
    return done.stdout.strip()


@pytest.fixture(params=["disk", "simulated"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def contents(folder: Path) -> bytes:
    return np.random.default_rng(7).bytes(FILE_NBYTES)


@pytest.fixture
def cold(folder: Path, contents: bytes) -> Iterator[PageCacheEngine]:
    """An engine over a file that is on the drive alone."""
    path = folder / "data"
    with path.open("wb") as file:
        file.write(contents)
        os.fsync(file.fileno())
    engine = PageCacheEngine(str(path), QueueOptions())
    os.posix_fadvise(engine.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if by_cachestat(engine.fd, 0, FILE_NBYTES) != 0:
        engine.close()
        pytest.skip("this filesystem, or this kernel, does not let a file's pages be dropped")
    yield engine
    engine.close()


def read(engine: PageCacheEngine, offset: int, nbytes: int) -> tuple[Transfer, bytes]:
    memory = engine.allocate(nbytes)
    transfer = engine.transfer(READ, checksum=True, chunk_nbytes=64 * KIB)
    transfer.add(offset, memory.address, nbytes)
    engine.run(transfer)
    return transfer, bytes(memoryview(memory)[:nbytes])


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 8 * MIB),
        (512 * KIB, 8 * MIB),
        (2 * MIB - 4 * KIB, 4 * MIB),
        (3 * MIB, 2 * MIB),
        (5 * MIB + 4 * KIB, 64 * KIB),
        (FILE_NBYTES - 3 * MIB, 3 * MIB),
    ],
)
def test_a_cold_read_brings_in_what_was_asked_for_and_no_more(
    cold: PageCacheEngine, contents: bytes, offset: int, nbytes: int
) -> None:
    transfer, found = read(cold, offset, nbytes)
    assert found == contents[offset : offset + nbytes]
    sums = b"".join(
        crc32c(contents[at : min(at + 64 * KIB, offset + nbytes)]).to_bytes(4, "little")
        for at in range(offset, offset + nbytes, 64 * KIB)
    )
    assert bytes(transfer.chunk_crcs(0)) == sums
    assert by_cachestat(cold.fd, 0, FILE_NBYTES) == nbytes
    assert by_cachestat(cold.fd, offset, nbytes) == nbytes
    assert transfer.cold_nbytes == nbytes
    again, found = read(cold, offset, nbytes)
    assert found == contents[offset : offset + nbytes]
    assert again.cold_nbytes == 0


def large_nbytes(engine: PageCacheEngine) -> int:
    """Bytes of the file that lie in large folios, less the first page of each."""
    mapping = mmap.mmap(engine.fd, FILE_NBYTES, flags=mmap.MAP_SHARED)
    pages = np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE]
    assert pages.sum() >= 0  # touches them, so that they have numbers
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(pages.ctypes.data // mmap.PAGESIZE * 8)
        entries = struct.unpack(f"{len(pages)}Q", file.read(8 * len(pages)))
    tails = 0
    with open("/proc/kpageflags", "rb") as file:
        for entry in entries:
            file.seek((entry & (1 << 55) - 1) * 8)
            tails += bool(struct.unpack("Q", file.read(8))[0] & _COMPOUND_TAIL)
    del pages
    mapping.close()
    return tails * mmap.PAGESIZE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees which pages make a folio")
def test_what_is_brought_in_lies_in_large_folios(cold: PageCacheEngine, contents: bytes) -> None:
    if cold._mapped_fd < 0:
        pytest.skip("this drive's read-ahead, or this kernel, is not one for large folios")
    os.pwrite(cold.fd, contents, 0)
    if not os.path.exists("/proc/kpageflags") or large_nbytes(cold) < FILE_NBYTES // 2:
        pytest.skip("this filesystem has no large folios, or this kernel does not show them")
    os.fsync(cold.fd)
    os.posix_fadvise(cold.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert by_cachestat(cold.fd, 0, FILE_NBYTES) == 0
    Path("/proc/sys/vm/compact_memory").write_text("1")  # there have to be any
    _, found = read(cold, 0, FILE_NBYTES)
    assert found == contents
    assert large_nbytes(cold) > FILE_NBYTES * 3 // 4
