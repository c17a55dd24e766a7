"""A sequence as plain tensors, to hold the real one against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import spdk_kv
from store.helpers import bytes_of, tensor_of


def shape_of(**changed: Any) -> spdk_kv.KVShape:
    """A small shape: two layers, rows of 240 bytes that divide no chunk."""
    fields = {
        "layers": 2,
        "kv_heads": 3,
        "head_dim": 20,
        "dtype": torch.bfloat16,
        "max_tokens": 600,
        "batch": 2,
    }
    return spdk_kv.KVShape(**(fields | changed))


class Reference:
    """K and V of every layer, ``[batch, kv_heads, tokens, head_dim]``, in memory."""

    def __init__(self, shape: spdk_kv.KVShape, seed: int = 0, device: str = "cpu") -> None:
        self.shape = shape
        self.device = device
        """Where what is appended comes from."""
        self.seed = seed
        self.layers = [self.tokens(0) for _ in range(shape.layers)]

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens of random bits, never the same ones twice."""
        self.seed += 2
        dtype = getattr(torch, self.shape.dtype)
        size = (self.shape.batch, self.shape.kv_heads, count, self.shape.head_dim)
        return tensor_of(dtype, size, self.seed), tensor_of(dtype, size, self.seed + 1)

    def append(self, sequence: spdk_kv.Sequence, count: int, layer: int | None = None) -> None:
        for number in range(self.shape.layers) if layer is None else [layer]:
            k, v = self.tokens(count)
            sequence.append(number, k.to(self.device), v.to(self.device))
            self.layers[number] = (
                joined(self.layers[number][0], k),
                joined(self.layers[number][1], v),
            )

    def truncate(self, sequence: spdk_kv.Sequence, tokens: int, layer: int | None = None) -> None:
        sequence.truncate(tokens, layer=layer)
        for number in range(self.shape.layers) if layer is None else [layer]:
            k, v = self.layers[number]
            self.layers[number] = (k[:, :, :tokens], v[:, :, :tokens])

    def reorder(self, sequence: spdk_kv.Sequence, rows: list[int]) -> None:
        sequence.reorder(rows)
        self.layers = [(picked(k, 0, rows), picked(v, 0, rows)) for k, v in self.layers]

    def check(self, sequence: spdk_kv.Sequence, **options: Any) -> None:
        """Every layer reads as it should."""
        for number in range(self.shape.layers):
            self.check_layer(sequence, number, **options)

    def check_layer(self, sequence: spdk_kv.Sequence, number: int, **options: Any) -> None:
        assert sequence.tokens(number) == self.layers[number][0].shape[2]
        tokens, heads = options.get("tokens"), options.get("heads")
        for found, wanted in zip(
            sequence.read(number, **options), self.layers[number], strict=True
        ):
            if tokens is not None:
                wanted = wanted[:, :, tokens]
            if heads is not None:
                listed = range(self.shape.kv_heads)[heads] if isinstance(heads, slice) else heads
                wanted = picked(wanted, 1, list(listed))
            assert found.dtype == wanted.dtype
            assert found.shape == wanted.shape
            assert bytes_of(found) == bytes_of(wanted)


# Through bytes, since torch joins and indexes not every dtype.


def joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    both = [part.contiguous().view(torch.uint8) for part in (first, second)]
    return torch.cat(both, 2).view(first.dtype)


def picked(tensor: torch.Tensor, dim: int, index: list[int]) -> torch.Tensor:
    chosen = torch.tensor(index, dtype=torch.long)
    return tensor.contiguous().view(torch.uint8).index_select(dim, chosen).view(tensor.dtype)


def begun(
    store: spdk_kv.KVStore, granularity: Any = "layer", steps: Iterable[int] = (), **changed: Any
) -> tuple[spdk_kv.Sequence, Reference]:
    """A new sequence to which so many tokens were appended in each of ``steps``, and what it
    should hold."""
    shape = shape_of(**changed)
    sequence = store.sequence("s", shape, granularity=granularity)
    reference = Reference(shape)
    for count in steps:
        reference.append(sequence, count)
    return sequence, reference
