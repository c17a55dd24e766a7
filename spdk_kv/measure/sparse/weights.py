"""How fast weights go through the processor: what bounds a decode step with K and V in memory."""

from __future__ import annotations

import statistics
import time

import torch

from spdk_kv.units import MIB

# More than caches hold, so that weights come from memory as those of a model do.
_NBYTES = 128 * MIB
_WIDTH = 2048
_LEAST_ROUNDS = 3


def weights_nbytes_per_s(dtype: str, batch: int, seconds: float) -> float:
    """Bytes of weights per second, multiplied with ``batch`` vectors, on torch's threads.

    Blocks for about ``seconds``.
    """
    wanted: torch.dtype = getattr(torch, dtype)
    rows = _NBYTES // (_WIDTH * wanted.itemsize)
    weights = torch.ones((rows // _WIDTH, _WIDTH, _WIDTH), dtype=wanted)
    hidden = torch.ones((batch, _WIDTH), dtype=wanted)
    took: list[float] = []
    until = time.perf_counter() + seconds
    with torch.inference_mode():
        while len(took) < _LEAST_ROUNDS or time.perf_counter() < until:
            began = time.perf_counter()
            for each in weights:
                torch.nn.functional.linear(hidden, each)
            took.append(time.perf_counter() - began)
    return weights.nbytes / statistics.median(took)
