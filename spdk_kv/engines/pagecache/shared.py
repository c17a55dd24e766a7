"""The page cache of a file or drive that a direct engine holds open at the same time."""

from __future__ import annotations

import ctypes
import os

from spdk_kv.engines.pagecache.engine import PageCacheEngine

# sync_file_range(2), which Python's os module lacks: WAIT_BEFORE | WRITE | WAIT_AFTER
# (linux/fs.h).
_WRITE_AND_WAIT = 7
_Offset = ctypes.c_int64


class SharedPageCacheEngine(PageCacheEngine):
    """The page cache of a file or drive that a direct engine holds open.

    Both reach the same bytes, and the kernel keeps them coherent. Nothing is read ahead, so the
    cache holds what was asked for and no more, and no page is filled while the direct engine
    writes it. ``Transfer.cold_nbytes`` counts the bytes of a read that were not in the cache.
    """

    exclusive = False

    def drop(self, offset: int, nbytes: int) -> None:
        """Drops a range from the page cache; dirty pages in it are written first, unless this is
        a reader, which leaves them there.

        Blocks until they are. Pages that are in use at that moment, or that could not be
        written, stay.

        Args:
            offset: Start of the range, in bytes.
            nbytes: Its length.
        """
        if not self.read_only:
            # The advice alone leaves dirty pages where they are.
            libc = ctypes.CDLL(None)
            libc.sync_file_range(self.fd, _Offset(offset), _Offset(nbytes), _WRITE_AND_WAIT)
        os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
