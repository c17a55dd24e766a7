"""Engines `ram` and `null`: no drive at all."""

from __future__ import annotations

from spdk_kv._native.engines.memory import MemoryBackend
from spdk_kv.engines.base import Engine, QueueOptions


class RamEngine(Engine):
    """Memory as a drive: for tests, and for a store that need not outlive its process."""

    name = "ram"
    persistent = False

    def __init__(self, capacity_nbytes: int, options: QueueOptions) -> None:
        super().__init__("ram://", options)
        if capacity_nbytes < 1:
            raise ValueError(f"ram:// needs a capacity of at least a byte, not {capacity_nbytes}")
        self._capacity_nbytes = capacity_nbytes
        self._backend = MemoryBackend(capacity_nbytes)
        self._start(self._backend.backend, self._backend)

    @property
    def capacity_nbytes(self) -> int:
        return self._capacity_nbytes


class NullEngine(Engine):
    """Completes everything at once and moves no bytes: measures what our own code costs."""

    name = "null"
    persistent = False
    keeps_bytes = False

    def __init__(self, options: QueueOptions) -> None:
        super().__init__("null://", options)
        self._backend = MemoryBackend(0)
        self._start(self._backend.backend, self._backend)
