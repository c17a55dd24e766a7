"""Reads of scattered groups of tokens, as a decode step makes them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.types import KVShape, LayerShape

# Tokens that are appended at once; bounds what noise takes of memory.
_SLICE_TOKENS = 1024
_LEAST_READS = 3
# The largest chunk. The last one of a layer stays in memory, and reads of it would be too quick.
_CHUNK_NBYTES = 16384

Advance = Callable[[int], None]


@dataclass(frozen=True)
class GroupReads:
    """Transfers of one kind.

    Attributes:
        groups: groups of each.
        nbytes: asked of the drive by each, on average.
        seconds: of the median one, until K and V were in memory and checked.
        reads: how many were measured.
    """

    groups: int
    nbytes: int
    seconds: float
    reads: int


@contextmanager
def filled_sequence(
    store: KVStore,
    layer: LayerShape,
    tokens: int,
    layers: int,
    advance: Advance | None = None,
) -> Iterator[Sequence]:
    """A temporary sequence of granularity ``token``, full of noise that is on the drive; deleted
    at the end.

    Blocks on the drive. ``advance`` is called with the tokens of each slice. Raises what the store
    raises.
    """
    shape = KVShape.of_layers([layer] * layers, tokens)
    name = f"tune-{time.monotonic_ns():x}"
    sequence = store.sequence(name, shape, granularity="token", temporary=True)
    try:
        random = np.random.default_rng(0)
        for number in range(layers):
            for begin in range(0, tokens, _SLICE_TOKENS):
                count = min(_SLICE_TOKENS, tokens - begin)
                k = _noise(random, layer.kv_heads, count, layer.head_dim, layer.dtype)
                v = _noise(random, layer.kv_heads, count, layer.value_dim or 0, layer.value_dtype)
                sequence.append(number, k, v)
                if advance is not None:
                    advance(count)
        # Reads of what is still on its way to the drive would come from memory.
        for number in range(layers):
            sequence.settle(number)
        yield sequence
    finally:
        sequence.delete()


def read_groups(
    sequence: Sequence, group_tokens: int, groups: int, seconds: float, seed: int = 1
) -> GroupReads:
    """Reads ``groups`` groups of random places at a time, layer by layer, for ``seconds``.

    Blocks on the drive. At least three reads are made, however long they take.
    """
    layer = sequence.shape.layer(0)
    in_memory = -(-_CHUNK_NBYTES // (layer.key_nbytes + layer.value_nbytes))
    tokens = sequence.tokens(0)
    layer_groups = max(tokens - in_memory, group_tokens) // group_tokens
    groups = min(groups, layer_groups)
    random = np.random.default_rng(seed)

    def chosen() -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        numbers = np.sort(random.choice(layer_groups, groups, replace=False)).astype(np.int64)
        return np.stack([np.zeros_like(numbers), numbers], axis=1)

    return _repeated(sequence, group_tokens, chosen, seconds)


def read_whole(sequence: Sequence, group_tokens: int, seconds: float) -> GroupReads:
    """As :func:`read_groups`, of all groups of a layer: one contiguous read."""
    numbers = np.arange(sequence.tokens(0) // group_tokens, dtype=np.int64)
    everything = np.stack([np.zeros_like(numbers), numbers], axis=1)
    return _repeated(sequence, group_tokens, lambda: everything, seconds)


def _repeated(
    sequence: Sequence,
    group_tokens: int,
    chosen: Callable[[], np.ndarray[tuple[int, ...], np.dtype[np.int64]]],
    seconds: float,
) -> GroupReads:
    took: list[float] = []
    nbytes = groups = 0
    layers = cycle(range(sequence.shape.layers))
    # The first one has its buffers made.
    sequence.read_groups(next(layers), chosen(), group_tokens)
    until = time.perf_counter() + seconds
    while len(took) < _LEAST_READS or time.perf_counter() < until:
        wanted = chosen()
        groups = len(wanted)
        began = time.perf_counter()
        reading = sequence.start_groups(next(layers), wanted, group_tokens)
        reading.finish()
        took.append(time.perf_counter() - began)
        nbytes += reading.nbytes
    return GroupReads(groups, nbytes // len(took), statistics.median(took), len(took))


def _noise(
    random: np.random.Generator, heads: int, tokens: int, width: int, dtype: str
) -> torch.Tensor:
    """[1, heads, tokens, width] of a dtype, any bits."""
    wanted: torch.dtype = getattr(torch, dtype)
    elements = heads * tokens * width
    content = bytearray(random.bytes(elements * wanted.itemsize))
    flat = torch.frombuffer(content, dtype=wanted) if elements else torch.empty(0, dtype=wanted)
    return flat.view(1, heads, tokens, width)
