"""The memory that a reading goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spdk_kv._native.transfer import READ, Transfer
from spdk_kv.engines import Engine
from spdk_kv.link import LinkedGpu
from spdk_kv.placement import StagingPool
from spdk_kv.tensors import tensor_from

if TYPE_CHECKING:
    import torch


class ReadBuffer:
    """``nbytes`` of memory: torch's on a linked ``gpu``, or else leased from ``staging``."""

    def __init__(self, staging: StagingPool, nbytes: int, gpu: LinkedGpu | None) -> None:
        self.gpu = gpu
        self.nbytes = nbytes
        # A lease, or GpuMemory.
        self._memory: Any = gpu.allocate(nbytes) if gpu else staging.lease(max(1, nbytes))
        self.address: int = self._memory.address

    def transfer(self, engine: Engine, nbytes: int, **options: Any) -> Transfer:
        """An empty read of ``nbytes`` in all into this buffer, which it keeps alive."""
        if self.gpu is None:
            transfer = engine.transfer(READ, **options)
            transfer.keep(self._memory)
        else:
            transfer = self.gpu.transfer(engine, READ, nbytes, self._memory.stream, **options)
            transfer.keep(self._memory.tensor)
        return transfer

    def as_bytes(self, extents: int, per_extent: int) -> torch.Tensor:
        """The memory as ``[extents, per_extent]``, for torch's current stream."""
        if self.gpu is None:
            return tensor_from(self._memory, "uint8", (extents, per_extent))
        self._memory.join()
        tensor: torch.Tensor = self._memory.tensor
        return tensor[: extents * per_extent].view(extents, per_extent)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` where a copy into this buffer needs it: a GPU gets a copy of a host tensor,
        which nobody waits for."""
        if self.gpu is None or tensor.is_cuda:
            return tensor
        return self.gpu.upload(tensor)
