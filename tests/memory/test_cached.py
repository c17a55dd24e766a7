"""What the page cache holds of a file: the two ways that the kernel tells agree with what is so."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spdk_kv.memory import cached as memory_cached
from spdk_kv.memory.available import cached_nbytes
from spdk_kv.memory.cached import by_cachestat, by_mincore
from spdk_kv.units import MIB

# Exact counts: whatever takes memory meanwhile may have a page of the file.
pytestmark = pytest.mark.machine
PAGE = mmap.PAGESIZE
SIZE = 8 * MIB


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of 8 MiB on the medium, and nothing of it in the page cache."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, b"x" * SIZE, 0)
        os.fsync(fd)
        drop(fd)
        # Reading ahead would bring in more than was asked for.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        if by_mincore(fd, 0, SIZE) != 0:
            pytest.skip("the filesystem under tmp_path keeps its pages (tmpfs)")
        yield fd
    finally:
        os.close(fd)


def drop(fd: int, offset: int = 0, nbytes: int = 0) -> None:
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


@pytest.fixture(params=[cached_nbytes, by_cachestat, by_mincore])
def count(request: pytest.FixtureRequest, file: int) -> Callable[[int, int, int], int | None]:
    if request.param is by_cachestat and by_cachestat(file, 0, SIZE) is None:
        pytest.skip("this kernel has no cachestat(2)")
    return request.param


def test_counts_what_was_read_and_not_what_was_dropped(
    file: int, count: Callable[[int, int, int], int | None]
) -> None:
    assert count(file, 0, SIZE) == 0
    os.pread(file, MIB, 2 * MIB)
    assert count(file, 0, SIZE) == MIB
    assert count(file, 2 * MIB, MIB) == MIB
    assert count(file, 3 * MIB, MIB) == 0
    assert count(file, 2 * MIB + MIB // 2, MIB) == MIB // 2
    drop(file, 2 * MIB, MIB // 4)
    assert count(file, 0, SIZE) == MIB - MIB // 4
    for place in range(0, SIZE, MIB):
        os.pread(file, MIB, place)
    assert count(file, 0, SIZE) == SIZE
    drop(file)
    assert count(file, 0, SIZE) == 0


def test_counting_brings_nothing_in(
    file: int, count: Callable[[int, int, int], int | None]
) -> None:
    for _ in range(3):
        assert count(file, 0, SIZE) == 0


def test_ranges_within_pages_and_past_the_end(
    file: int, count: Callable[[int, int, int], int | None]
) -> None:
    os.pread(file, PAGE, 0)
    os.pread(file, PAGE, SIZE - PAGE)
    assert count(file, 10, 20) == 20
    assert count(file, PAGE, 20) == 0
    assert count(file, SIZE - PAGE, 64 * MIB) == PAGE
    assert count(file, 2 * SIZE, MIB) == 0


def test_mincore_takes_large_ranges_in_pieces(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(0, SIZE, MIB):
        os.pread(file, PAGE, place)
    monkeypatch.setattr(memory_cached, "_MINCORE_NBYTES", 3 * PAGE)
    assert by_mincore(file, 5, SIZE - 5) == SIZE // MIB * PAGE


def test_where_nothing_can_be_mapped_mincore_gives_no_answer() -> None:
    reader, writer = os.pipe()
    try:
        assert by_mincore(writer, 0, MIB) is None
        assert not cached_nbytes(writer, 0, MIB)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's file needs root to make")
def test_another_users_file_gets_no_answer_rather_than_a_wrong_one(file: int) -> None:
    path = os.readlink(f"/proc/self/fd/{file}")
    foreign = os.open(path, os.O_RDONLY)
    os.fchmod(file, 0o644)
    os.seteuid(65534)
    try:
        # The kernel would show every page as present.
        assert by_mincore(foreign, 0, SIZE) is None
        assert cached_nbytes(foreign, 0, SIZE) is None
    finally:
        os.seteuid(0)
        os.close(foreign)


def test_bad_arguments(file: int) -> None:
    assert cached_nbytes(file, 0, 0) == 0
    for offset, nbytes in ((-1, 5), (5, -1)):
        with pytest.raises(ValueError, match="not negative"):
            cached_nbytes(file, offset, nbytes)
    closed = os.dup(file)
    os.close(closed)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        cached_nbytes(closed, 0, 1)
