"""A layer's stored rows as K and V, ``[batch, kv_heads, tokens, head_dim]`` as transformers has it.

Tensors are joined and indexed as bytes, since torch does neither with every dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.link import LinkedGpu
from spdk_kv.sequence.layer import Layer

if TYPE_CHECKING:
    import torch


def read_all(
    layer: Layer,
    first: int,
    last: int,
    gpu: LinkedGpu | None = None,
    deadline: Deadline = NEVER,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[first, last)`` of all heads, on ``gpu`` or in host memory; if they were read ahead,
    where they were read to. Waits for the drive. The caller holds the layer's lock."""
    reader, layout = layer.reader, layer.contents.layout
    reading = reader.take_prefetched(first)
    if reading is None:
        reading = reader.plan(first, last, layer.contents.extents, 0, gpu)
    layer.settle(wait=False)
    reader.extend(reading, last)
    rows = reader.finish(reading, last, deadline)
    if layout.granularity == "head":
        heads = layout.shape.kv_heads
        return rows[:heads].permute(2, 0, 1, 3), rows[heads:].permute(2, 0, 1, 3)
    return rows[0].permute(1, 2, 0, 3), rows[1].permute(1, 2, 0, 3)


def read_heads(
    layer: Layer,
    first: int,
    last: int,
    heads: list[int],
    gpu: LinkedGpu | None = None,
    deadline: Deadline = NEVER,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`read_all`, but only ``heads``, in that order. With granularity ``head`` only those
    are read."""
    import torch

    reader, layout = layer.reader, layer.contents.layout
    if layout.granularity == "layer" or not heads:
        whole = read_all(layer, first, last, gpu, deadline)
        index = torch.tensor(heads, dtype=torch.long, device=whole[0].device)
        k, v = (
            tensor.view(torch.uint8).index_select(1, index).view(tensor.dtype) for tensor in whole
        )
        return k, v
    layer.settle(deadline)
    readings = [
        reader.plan(first, last, range(start + head, start + head + 1), 0, gpu)
        for start in (0, layout.shape.kv_heads)
        for head in heads
    ]
    for reading in readings:
        reader.extend(reading, last)
    rows = [reader.finish(reading, last, deadline) for reading in readings]
    k, v = (
        torch.cat([row.view(torch.uint8) for row in half]).view(rows[0].dtype)
        for half in (rows[: len(heads)], rows[len(heads) :])
    )
    return k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
