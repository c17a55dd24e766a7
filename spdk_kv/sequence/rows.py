"""Appended tokens as they lie on the device: rows, whole chunks of them on their way to it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.transfer import WRITE, Transfer
from spdk_kv.engines import Engine
from spdk_kv.link import GpuMemory, LinkedGpu
from spdk_kv.placement import SequenceLayout, StagingPool
from spdk_kv.tensors import tensor_from
from spdk_kv.types import movable
from spdk_kv.units import align_up

if TYPE_CHECKING:
    import torch

_FEW_CORES = 4


def lay_out(
    layout: SequenceLayout, into: torch.Tensor, at: int, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Lays tokens out as rows from byte ``at`` of every extent's line of ``into``."""
    count, extents = k.shape[2], into.shape[0]
    k, v = movable(k), movable(v)
    lines = into[:, at : at + count * layout.row_nbytes].view(k.dtype)
    rows = lines.view(extents, count, *layout.row_shape)
    if layout.granularity == "head":
        heads = layout.extents_per_unit
        _copy(rows[:heads], k.permute(1, 2, 0, 3))
        _copy(rows[heads:], v.permute(1, 2, 0, 3))
    else:
        _copy(rows[0], k.permute(2, 0, 1, 3))
        _copy(rows[1], v.permute(2, 0, 1, 3))


def _copy(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copies from any device. On few cores by this thread alone: torch's others spin after each
    copy, waiting for the next one, on a core that the kernel wants for the drive."""
    if values.is_cpu and into.is_cpu and len(os.sched_getaffinity(0)) <= _FEW_CORES:
        np.copyto(into.numpy(), values.numpy())
    else:
        into.copy_(values)


@dataclass(frozen=True)
class Chunks:
    """Rows as bytes, ``[extents, line]``, and the empty write for them by ``engine``, which keeps
    ``memory``."""

    engine: Engine
    lines: torch.Tensor
    transfer: Transfer
    memory: Any

    def address(self, number: int) -> int:
        """Where the line of an extent begins."""
        return int(self.memory.address) + number * self.lines.shape[1]


@dataclass(frozen=True)
class Write:
    """Chunks on their way to the device: ``line_nbytes`` of every extent of the layer, from its
    byte ``first`` on."""

    chunks: Chunks
    first: int
    line_nbytes: int

    @property
    def transfer(self) -> Transfer:
        return self.chunks.transfer

    @property
    def nbytes(self) -> int:
        return self.chunks.lines.shape[0] * self.line_nbytes

    def part(self, extents: range, start: int, end: int) -> torch.Tensor:
        """Bytes ``[start, end)`` of ``extents``, for torch's current stream."""
        if isinstance(self.chunks.memory, GpuMemory):
            self.chunks.memory.join()
        lines = self.chunks.lines[extents.start : extents.stop]
        return lines[:, start - self.first : end - self.first]


def whole_chunks(
    layout: SequenceLayout,
    staging: StagingPool,
    engine: Engine,
    tails: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    device: LinkedGpu | None,
) -> Chunks:
    """``tails`` ([extents, bytes]) and new tokens behind them, in lines of whole chunks.

    On ``device``, where both are, if there is room, and they are worth the tails' way there.
    """
    import torch

    extents, used = tails.shape
    chunk, new = layout.chunk_nbytes, k.shape[2] * layout.row_nbytes
    line = align_up(used + new, chunk)
    memory = None
    if device is not None and new >= chunk:
        with suppress(torch.cuda.OutOfMemoryError):
            memory = device.allocate(extents * line)
    if device is None or memory is None:
        lease = staging.lease(extents * line)
        lines = tensor_from(lease, "uint8", (extents, line))
        lines[:, :used] = tails
        lay_out(layout, lines, used, k, v)
        transfer = engine.transfer(WRITE, checksum=True, chunk_nbytes=chunk)
        transfer.keep(lease)
        return Chunks(engine, lines, transfer, lease)
    lines = memory.tensor.view(extents, line)
    if used:
        lines[:, :used] = device.upload(tails)
    lay_out(layout, lines, used, k, v)
    transfer = device.transfer(
        engine, WRITE, extents * line, memory.stream, checksum=True, chunk_nbytes=chunk
    )
    transfer.keep(memory.tensor)
    return Chunks(engine, lines, transfer, memory)
