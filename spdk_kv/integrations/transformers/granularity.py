"""How a new sequence lies, chosen by what will compute on it."""

from __future__ import annotations

import torch

from spdk_kv.placement import CHUNK_NBYTES
from spdk_kv.types import Granularity, KVShape

# Each extent keeps its unfinished chunk in memory. 32 MiB are 2,048 extents: 128 layers of 8 KV
# heads, or 32 layers of 32.
_MOST_TAILS_NBYTES = 32 << 20


def fastest_granularity(shape: KVShape, device: torch.device) -> Granularity:
    """``head`` for attention on the CPU, which walks the tokens of one head after the other: over
    rows of all heads it took 1.7 (bfloat16) to 2.5 times (float32) the time at 16K tokens.
    ``layer`` on a GPU, and where the extents of all heads would hold too much memory."""
    heads = sum(shape.layer(number).kv_heads for number in range(shape.layers))
    if device.type == "cpu" and 2 * heads * CHUNK_NBYTES <= _MOST_TAILS_NBYTES:
        return "head"
    return "layer"
