"""The staging pool: pinned memory, leased for a transfer or for a tensor's whole life."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from spdk_kv._native.holding import Registered
from spdk_kv._native.memory import Lease, Pool

log = logging.getLogger(__name__)

Allocate = Callable[[int], Any]


def _cuda_runtime() -> Any:
    """torch's CUDA runtime, or None where there is no GPU to copy to."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class StagingPool:
    """Leases of memory that the drive reaches without a copy.

    ``allocate(nbytes)`` is the engine's. Free memory beyond ``cache_nbytes`` goes back to the
    system. Once :meth:`pin_for_gpu` was called, new regions are also registered with the GPU, so
    that its copies are DMA and not bounced by its driver.
    """

    def __init__(self, allocate: Allocate, cache_nbytes: int) -> None:
        self._engine_allocate = allocate
        self._cudart: Any = None
        self._pool = Pool(self._allocate, cache_nbytes)

    def lease(self, nbytes: int) -> Lease:
        """A lease of ``nbytes`` (page-aligned; the last page is the lease's too). MemoryError."""
        return self._pool.lease(nbytes)

    def pin_for_gpu(self) -> None:
        """Registers regions with the GPU from now on. Does nothing where there is none."""
        if self._cudart is None:
            self._cudart = _cuda_runtime()
            if self._cudart is not None:
                self._pool.trim(0)

    def trim(self) -> None:
        """Gives all idle memory back to the system."""
        self._pool.trim(0)

    def shed(self) -> None:
        """Gives back what has been idle since the last call, for the page cache to use."""
        self._pool.shed()

    def stats(self) -> dict[str, int]:
        """``leased_nbytes``, ``free_nbytes``, and ``peak_nbytes``: the most that both came to."""
        pool = self._pool
        return {
            "leased_nbytes": pool.leased_nbytes,
            "free_nbytes": pool.free_nbytes,
            "peak_nbytes": pool.peak_nbytes,
        }

    def _allocate(self, nbytes: int) -> Any:
        region = self._engine_allocate(nbytes)
        if self._cudart is None:
            return region
        registered = Registered(region)
        status = registered.add(self._cudart.cudaHostRegister, self._cudart.cudaHostUnregister, 0)
        if int(status):
            log.info("%d bytes could not be registered with the GPU (status %s)", nbytes, status)
            return region
        return registered
