"""Engine `threads`: a pool of native threads with pread and pwrite, past the page cache."""

from __future__ import annotations

from spdk_kv._native.engines.pool import PoolBackend
from spdk_kv.engines.files import FileEngine

# More threads than this only queue up inside the kernel.
_MOST_THREADS = 64


class ThreadsEngine(FileEngine):
    """O_DIRECT like `uring`, for machines where io_uring is missing or forbidden.

    One thread per segment in flight, 64 at most.
    """

    name = "threads"
    direct = True

    def _open_backend(self) -> PoolBackend:
        return PoolBackend(self.fd, min(self.options.depth, _MOST_THREADS))
