"""A layer's stored rows as K and V, ``[batch, kv_heads, tokens, head_dim]`` as transformers has it.

What is joined or picked is so as bytes, for torch does neither with every dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spdk_kv.link import LinkedGpu
from spdk_kv.placement import SequenceLayout
from spdk_kv.sequence.layer import LayerCache

if TYPE_CHECKING:
    import torch


def read_all(
    cache: LayerCache,
    layout: SequenceLayout,
    first: int,
    last: int,
    device: LinkedGpu | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[first, last)`` of all heads. Waits for the device; wants the layer's lock held.

    On ``device``, or where they were read ahead to.
    """
    reading = cache.take_prefetched(first)
    if reading is None:
        reading = cache.plan(first, last, range(len(cache.offsets)), 0, device)
    cache.settle(wait=False)
    cache.extend(reading, last)
    rows = cache.finish(reading, last)
    if layout.granularity == "head":
        heads = layout.shape.kv_heads
        return rows[:heads].permute(2, 0, 1, 3), rows[heads:].permute(2, 0, 1, 3)
    return rows[0].permute(1, 2, 0, 3), rows[1].permute(1, 2, 0, 3)


def read_heads(
    cache: LayerCache,
    layout: SequenceLayout,
    first: int,
    last: int,
    wanted: list[int],
    device: LinkedGpu | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`read_all`, but of the heads ``wanted``, in that order. Where heads lie apart, only
    those are read."""
    import torch

    if layout.granularity == "layer" or not wanted:
        whole = read_all(cache, layout, first, last, device)
        index = torch.tensor(wanted, dtype=torch.long, device=whole[0].device)
        k, v = (
            tensor.view(torch.uint8).index_select(1, index).view(tensor.dtype) for tensor in whole
        )
        return k, v
    cache.settle()
    readings = [
        cache.plan(first, last, range(start + head, start + head + 1), 0, device)
        for start in (0, layout.shape.kv_heads)
        for head in wanted
    ]
    for reading in readings:
        cache.extend(reading, last)
    rows = [cache.finish(reading, last) for reading in readings]
    k, v = (
        torch.cat([row.view(torch.uint8) for row in half]).view(rows[0].dtype)
        for half in (rows[: len(wanted)], rows[len(wanted) :])
    )
    return k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
