"""Engine `pagecache`: buffered reads and writes; the kernel's page cache does the rest."""

from __future__ import annotations

import mmap
import os

from spdk_kv._native.pool_backend import PoolBackend
from spdk_kv.engines.files import FileEngine

# The copies are the kernel's and run on the pool's threads: a few saturate memory.
_MOST_THREADS = 8


class PageCacheEngine(FileEngine):
    """The fallback where nothing else may be taken, and the better way while memory is ample."""

    name = "pagecache"
    direct = False

    def _open_backend(self) -> PoolBackend:
        # The loop reads ahead itself, by its depth. The kernel's read-ahead follows one stream per
        # descriptor, is lost where several threads read in turn, and fetches what nobody wants.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        threads = min(self.options.depth, _MOST_THREADS)
        return PoolBackend(self.fd, threads, buffered=True)

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """The page cache itself as memory, with no copy: ``nbytes`` from ``offset``, a multiple
        of 4096. Private: writing to it does not reach the file.

        Blocks until the pages are read. A read error, or a file truncated by somebody else,
        shows as SIGBUS on access.
        """
        mapping = mmap.mmap(
            self.fd,
            nbytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=offset,
        )
        mapping.madvise(mmap.MADV_WILLNEED)
        return mapping


class BesidePageCacheEngine(PageCacheEngine):
    """The page cache of a file or device that a direct engine holds open.

    Both reach the same bytes, and the kernel keeps them coherent. Nothing is read ahead, so the
    cache holds what was asked for and no more, and no page is filled while the direct engine
    writes it. Transfers tell how much of a read was not in the cache (``cold_nbytes``).
    """

    exclusive = False

    def drop(self, offset: int, nbytes: int) -> None:
        """Takes a range out of the page cache; what is dirty there is written first.

        Blocks for that. Pages in use at the moment stay.
        """
        os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
