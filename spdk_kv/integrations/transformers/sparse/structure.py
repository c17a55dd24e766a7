"""Where a model's attention gets its query from: found by what its layers have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers.sparse.projection import Projection

RopeKey = tuple[int, tuple[object, ...]]
"""A call of one of the rotary modules: its number, and what it was given beside tensors."""


@dataclass(frozen=True)
class Found:
    """One decoder layer: the module, its attention, and its place among the layers of the cache."""

    number: int
    decoder: nn.Module
    attention: nn.Module


@dataclass(frozen=True)
class Query:
    """How the query of one layer is made.

    Attributes:
        projection: Of the attention's input.
        rope: Which call of a rotary module turns it; None where nothing does.
        scaling: What the products with keys are multiplied by.
    """

    projection: Projection
    rope: RopeKey | None
    scaling: float


@dataclass(frozen=True)
class Structure:
    """A model whose queries can be predicted.

    Attributes:
        owner: The module that has the decoder layers, and calls them one after the other.
        decoders: The layers, those without attention included.
        rotary: Modules of the owner that compute cos and sin, before the layers are called.
        layers: Those with attention, by their number in the cache.
        queries: Of those that attend to all tokens.
    """

    owner: nn.Module
    decoders: tuple[nn.Module, ...]
    rotary: tuple[nn.Module, ...]
    layers: Mapping[int, Found]
    queries: Mapping[int, Query]


def refused(name: str, reason: str) -> ShapeMismatch:
    """The error for a model that a SparseKVCache cannot serve."""
    return ShapeMismatch(
        f"{name} cannot read a part of its K/V: {reason}; an OffloadedKVCache reads all of it"
    )


def normed(decoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The input of the attention of ``decoder``, for its own; the same where the layer's norm comes
    after attention."""
    norm: Any = getattr(decoder, "input_layernorm", None)
    return hidden if norm is None else norm(hidden)


def attention_layers(
    root: nn.Module, name: str
) -> tuple[nn.Module, tuple[nn.Module, ...], dict[int, Found]]:
    """The module that has the decoder layers, the layers, and those of them that have attention.

    Raises:
        ShapeMismatch: There are none, or not in one list.
    """
    found: dict[int, Found] = {}
    lists: set[str] = set()
    for path, module in root.named_modules():
        number = getattr(module, "layer_idx", None)
        if not isinstance(number, int) or not _projects(module):
            continue
        decoder_path = path.rpartition(".")[0]
        if number in found:
            raise refused(name, f"two of its attention modules have the number {number}")
        found[number] = Found(number, root.get_submodule(decoder_path), module)
        lists.add(decoder_path.rpartition(".")[0])
    if not found:
        raise refused(name, "no attention of it has a layer_idx, and a q_proj or qkv_proj")
    if len(lists) > 1:
        raise refused(name, f"its layers are in several lists, {sorted(lists)}")
    path = lists.pop()
    owner = root.get_submodule(path.rpartition(".")[0])
    return owner, tuple(root.get_submodule(path).children()), found


def _projects(module: nn.Module) -> bool:
    names = dict(module.named_children())
    return "q_proj" in names or "qkv_proj" in names
