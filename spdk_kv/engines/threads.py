"""Engine `threads`: a pool of native threads with pread and pwrite, past the page cache."""

from __future__ import annotations

from spdk_kv._native.pool_backend import PoolBackend
from spdk_kv.engines.base import EngineOptions
from spdk_kv.engines.files import FileEngine

# More threads than this only queue up inside the kernel.
_MOST_THREADS = 64


class ThreadsEngine(FileEngine):
    """O_DIRECT like `uring`, for machines where io_uring is missing or forbidden.

    One thread per segment in flight, 64 at most.
    """

    name = "threads"
    direct = True

    def __init__(self, path: str, options: EngineOptions) -> None:
        super().__init__(path, options)
        self._backend = PoolBackend(self.fd, min(options.depth, _MOST_THREADS))
        self._start(self._backend.backend, self._backend)

    def _release(self) -> None:
        self._backend.close()
        super()._release()
