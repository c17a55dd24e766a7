"""Ways in which the layers of one decode step get their K and V, each over the real path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

import spdk_kv
from spdk_kv.integrations.transformers.sparse.layer import PartLayer
from spdk_kv.integrations.transformers.sparse.resident import Counters
from spdk_kv.sparse import Selector, Settings
from spdk_kv.types import LayerShape

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The attention of a model: ``heads`` query heads over ``kv_heads``."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def token_nbytes(self) -> int:
        """Bytes of K and V of one token in all layers, in bfloat16."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    def cached(self, batch: int) -> spdk_kv.KVShape:
        """The shape of its KV cache."""
        return spdk_kv.KVShape(
            self.layers, self.kv_heads, self.head_dim, torch.bfloat16, None, batch
        )

    @property
    def layer(self) -> LayerShape:
        """That of one layer."""
        return LayerShape(self.kv_heads, self.head_dim, torch.bfloat16)


SHAPE_8B = Shape(layers=32, heads=32, kv_heads=8, head_dim=128)


class Way(ABC):
    """Gives a layer what its new token attends to."""

    name: str

    def ask(self, layer: int, query: torch.Tensor) -> None:  # noqa: B027
        """``query``, ``[batch, heads, head_dim]``, is what ``layer`` will want. Does not wait."""

    @abstractmethod
    def attended(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """All that the new token attends to, itself included. Blocks until it is there."""

    @property
    @abstractmethod
    def read_nbytes(self) -> int:
        """Bytes asked of the drive so far."""

    @property
    @abstractmethod
    def memory_nbytes(self) -> int:
        """Bytes of host memory for K, V and what is known of them."""


class FullFromDrive(Way):
    """All of K and V, read ahead of the layers in their order."""

    name = "full"

    def __init__(self, sequence: spdk_kv.Sequence) -> None:
        self._sequence = sequence
        self._read_nbytes = 0
        self._largest = 0

    def attended(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        self._sequence.append(layer, k, v)
        keys, values = self._sequence.read(layer)
        self._read_nbytes += keys.nbytes + values.nbytes
        self._largest = max(self._largest, keys.nbytes + values.nbytes)
        return keys, values

    @property
    def read_nbytes(self) -> int:
        return self._read_nbytes

    @property
    def memory_nbytes(self) -> int:
        return 2 * self._largest  # this layer's, and the one that is read ahead


class FromMemory(Way):
    """All of K and V, in memory."""

    name = "dense in memory"

    def __init__(self, layers: list[Pair]) -> None:
        self._layers = layers

    def attended(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        return self._layers[layer]

    @property
    def read_nbytes(self) -> int:
        return 0

    @property
    def memory_nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._layers)


class Part(Way):
    """What a selector chooses, from the drive."""

    def __init__(
        self,
        name: str,
        sequence: spdk_kv.Sequence,
        shape: Shape,
        settings: Settings,
        selectors: list[Selector],
    ) -> None:
        self.name = name
        self._sequence = sequence
        self.counters = Counters()
        self._layers = [
            PartLayer(number, shape.layer, sequence.shape.batch, selector, self.counters)
            for number, selector in enumerate(selectors)
        ]
        self.settings = settings

    def ask(self, layer: int, query: torch.Tensor) -> None:
        self._layers[layer].choose(self._sequence, query, None)

    def attended(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        past = self._sequence.tokens(layer)
        self._sequence.append(layer, k, v)
        pair = self._layers[layer].attended(k, v, past)
        assert pair is not None, "nothing was asked for"
        return pair

    @property
    def read_nbytes(self) -> int:
        return self.counters.read_nbytes

    @property
    def memory_nbytes(self) -> int:
        return sum(each.resident_nbytes + each.selector.nbytes for each in self._layers)


class PartFromMemory(Way):
    """What a selector chooses, of K and V that are in memory as a whole."""

    def __init__(
        self, name: str, layers: list[Pair], settings: Settings, selectors: list[Selector]
    ) -> None:
        self.name = name
        self._layers = [
            (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()) for k, v in layers
        ]
        self._selectors = selectors
        self._settings = settings
        self._chosen: dict[int, torch.Tensor] = {}

    def ask(self, layer: int, query: torch.Tensor) -> None:
        tokens, size = self._layers[layer][0].shape[1], self._settings.group_tokens
        whole = self._settings.whole_groups(tokens)
        groups = torch.from_numpy(self._selectors[layer].select(query, whole_groups=whole))
        old = (groups[:, :, None] * size + torch.arange(size)).flatten(1)
        newest = torch.arange(whole * size, tokens).expand(len(groups), -1)
        self._chosen[layer] = torch.cat([old, newest], 1)

    def attended(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        index = self._chosen.pop(layer)
        rows = torch.arange(len(index))[:, None]
        keys, values = (
            torch.cat([whole[rows, index], new.transpose(1, 2)], 1).transpose(1, 2)
            for whole, new in zip(self._layers[layer], (k, v), strict=True)
        )
        return keys, values

    @property
    def read_nbytes(self) -> int:
        return 0

    @property
    def memory_nbytes(self) -> int:
        kept = sum(k.nbytes + v.nbytes for k, v in self._layers)
        return kept + sum(each.nbytes for each in self._selectors)
