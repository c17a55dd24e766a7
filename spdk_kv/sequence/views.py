"""A layer's stored rows as K and V, ``[batch, kv_heads, tokens, head_dim]`` as transformers has it.

Tensors are joined and indexed as bytes, since torch does neither with every dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.link import LinkedGpu
from spdk_kv.sequence.layer import Layer
from spdk_kv.sequence.rows import as_pair

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
    return as_pair(layout, reader.finish(reading, last, deadline))


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
    if layout.order != "head" or not heads:
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
    rows = torch.cat([reader.finish(reading, last, deadline) for reading in readings])
    return as_pair(replace(layout, shape=replace(layout.shape, kv_heads=len(heads))), rows)
