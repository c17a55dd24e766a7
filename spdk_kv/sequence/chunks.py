"""Whole chunks of appended tokens on their way to the drive."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spdk_kv._native.transfer import WRITE, Transfer
from spdk_kv.engines import Engine
from spdk_kv.link import GpuMemory, LinkedGpu
from spdk_kv.placement import LayerLayout, StagingPool
from spdk_kv.sequence.contents import Contents, chunk_crcs
from spdk_kv.sequence.rows import lay_out
from spdk_kv.tensors import tensor_from
from spdk_kv.units import align_down, align_up

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class ChunkWrite:
    """The write of bytes ``[start, end)`` of every extent of a layer, and the memory it takes them
    from.

    ``each``: in how many pieces an extent's part is written. ``rows`` is that memory,
    ``[extents, bytes]``: the whole chunks, then the ``rest`` that fills none and is not written.
    """

    engine: Engine
    transfer: Transfer
    memory: Any
    rows: torch.Tensor
    start: int
    end: int
    rest_nbytes: int
    each: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes to be written, in all extents."""
        return self.rows.shape[0] * (self.end - self.start)

    def part(self, extents: range, start: int, end: int) -> torch.Tensor:
        """Bytes ``[start, end)`` of ``extents``, for torch's current stream."""
        if isinstance(self.memory, GpuMemory):
            self.memory.join()
        rows = self.rows[extents.start : extents.stop]
        return rows[:, start - self.start : end - self.start]

    def crcs(self, number: int) -> bytes:
        """The checksums of the chunks of extent ``number``, once they are written."""
        return chunk_crcs(self.transfer, number, self.each)

    @property
    def rest(self) -> torch.Tensor:
        """The bytes behind the whole chunks, ``[extents, bytes]``, in host memory."""
        whole = self.end - self.start
        return self.rows[:, whole : whole + self.rest_nbytes].cpu()

    def add_segments(self, contents: Contents) -> None:
        """Aims the write at the extents of ``contents``."""
        address, stride = int(self.memory.address), self.rows.shape[1]
        for number in contents.extents:
            at = address + number * stride
            places = list(contents.ranges(number, self.start, self.end))
            for offset, nbytes in places:
                self.transfer.add(offset, at, nbytes)
                at += nbytes
            self.each = len(places)


def whole_chunks(
    layout: LayerLayout,
    staging: StagingPool,
    engine: Engine,
    start: int,
    tails: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gpu: LinkedGpu | None,
) -> ChunkWrite:
    """The write of ``tails`` (``[extents, bytes]``, from byte ``start`` on) and the new tokens
    behind them; it has no segments yet.

    The memory is on ``gpu``, where K and V are, if it has room and a whole chunk is new; less is
    not worth the tails' way there.
    """
    import torch

    extents, used = tails.shape
    chunk, new = layout.chunk_nbytes, k.shape[2] * layout.row_nbytes
    whole, stride = align_down(used + new, chunk), align_up(used + new, chunk)
    memory: Any = None
    if gpu is not None and new >= chunk:
        with suppress(torch.cuda.OutOfMemoryError):
            memory = gpu.allocate(extents * stride)
    if gpu is None or memory is None:
        memory = staging.lease(extents * stride)
        rows = tensor_from(memory, "uint8", (extents, stride))
        rows[:, :used] = tails
        lay_out(layout, rows, used, k, v)
        transfer = engine.transfer(WRITE, checksum=True, chunk_nbytes=chunk)
        transfer.keep(memory)
    else:
        rows = memory.tensor.view(extents, stride)
        if used:
            rows[:, :used] = gpu.upload(tails)
        lay_out(layout, rows, used, k, v)
        transfer = gpu.transfer(
            engine, WRITE, extents * stride, memory.stream, checksum=True, chunk_nbytes=chunk
        )
        transfer.keep(memory.tensor)
    return ChunkWrite(engine, transfer, memory, rows, start, start + whole, used + new - whole)
