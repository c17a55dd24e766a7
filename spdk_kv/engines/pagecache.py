"""Engine `pagecache`: buffered reads and writes; the kernel's page cache does the rest."""

from __future__ import annotations

import mmap

from spdk_kv._native.pool_backend import PoolBackend
from spdk_kv.engines.files import FileEngine

# The copies are the kernel's and run on the pool's threads: a few saturate memory.
_MOST_THREADS = 8


class PageCacheEngine(FileEngine):
    """The fallback where nothing else may be taken, and the better way while memory is ample."""

    name = "pagecache"
    direct = False

    def _open_backend(self) -> PoolBackend:
        return PoolBackend(self.fd, min(self.options.depth, _MOST_THREADS))

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
