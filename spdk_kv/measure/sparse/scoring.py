"""How long it takes to select groups, and what is kept for that."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from spdk_kv.sparse import Selector, Settings
from spdk_kv.types import LayerShape

_SLICE_TOKENS = 2048
_LEAST_CALLS = 3


@dataclass(frozen=True)
class Scoring:
    """One layer and batch row.

    Attributes:
        seconds: of one selection.
        token_nbytes: memory that is kept per token.
    """

    seconds: float
    token_nbytes: float


def time_selection(layer: LayerShape, heads: int, tokens: int, seconds: float) -> Scoring:
    """Selects groups among ``tokens`` tokens of random keys for ``seconds``, at least three times.

    Blocks. Groups are of 4 tokens: larger ones, of which there are fewer, take a little less.
    """
    settings = Settings(recent=0)
    selector = Selector(settings)
    random = torch.Generator().manual_seed(0)
    for begin in range(0, tokens, _SLICE_TOKENS):
        count = min(_SLICE_TOKENS, tokens - begin)
        selector.append(torch.randn(1, layer.kv_heads, count, layer.head_dim, generator=random))
    query = torch.randn(1, heads, layer.head_dim, generator=random)
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < _LEAST_CALLS or time.perf_counter() < until:
        began = time.perf_counter()
        selector.select(query, whole_groups=settings.whole_groups(tokens))
        took.append(time.perf_counter() - began)
    return Scoring(statistics.median(took), selector.keys.token_nbytes)
