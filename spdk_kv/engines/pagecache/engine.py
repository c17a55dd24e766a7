"""Engine `pagecache`: buffered reads and writes; the kernel's page cache does the rest."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from spdk_kv._native.engines.pool import PoolBackend
from spdk_kv._native.holding import AtEnd
from spdk_kv.devices import parse_count, read_text
from spdk_kv.engines.files import FileEngine
from spdk_kv.units import KIB, MIB

# The copies are the kernel's and run on the pool's threads: a few saturate memory.
_MOST_THREADS = 8
_LARGE_FOLIO_NBYTES = 2 * MIB


class Mapping(mmap.mmap):
    """A part of the file as memory. What is to happen once nobody uses it: ``at_end``."""

    at_end: AtEnd | None = None


class PageCacheEngine(FileEngine):
    """The fallback where nothing else may be taken, and the better way while memory is ample."""

    name = "pagecache"
    direct = False
    _mapped_fd = -1

    def _open_backend(self) -> PoolBackend:
        # The loop reads ahead itself, by its depth. The kernel's read-ahead follows one stream per
        # descriptor, is lost where several threads read in turn, and reads what nobody asked for.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        threads = min(self.options.depth, _MOST_THREADS)
        self._mapped_fd = self._open_mapped()
        return PoolBackend(self.fd, threads, buffered=True, mapped_fd=self._mapped_fd)

    def _open_mapped(self) -> int:
        """A second descriptor, for reading in large folios; -1 where that would read more than was
        asked for (see cython_src/engines/pool_fill.pxi)."""
        device = os.fstat(self.fd)
        number = device.st_rdev if stat.S_ISBLK(device.st_mode) else device.st_dev
        bdi = f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb"
        read_ahead_kib = parse_count(read_text(Path(bdi)))
        if read_ahead_kib is None or read_ahead_kib * KIB >= _LARGE_FOLIO_NBYTES:
            return -1
        if mmap.PAGESIZE != 4 * KIB:
            return -1  # a hugepage is larger then, up to 512 MiB
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1

    def _close_files(self) -> None:
        super()._close_files()
        fd, self._mapped_fd = self._mapped_fd, -1
        if fd >= 0:
            os.close(fd)

    def map(self, offset: int, nbytes: int) -> Mapping:
        """The page cache itself as memory, with no copy: ``nbytes`` from ``offset``, a multiple
        of 4096. Private: writing to it does not reach the file.

        Blocks until the pages are read. A read error, or a file truncated by somebody else,
        shows as SIGBUS on access.
        """
        mapping = Mapping(
            self.fd,
            nbytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=offset,
        )
        mapping.madvise(mmap.MADV_WILLNEED)
        return mapping
