"""The shapes of the layers' K and V, learnt from the layers as they come."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from spdk_kv.errors import ShapeMismatch
from spdk_kv.types import KVShape, LayerShape


def shape_of(k: torch.Tensor, v: torch.Tensor) -> LayerShape:
    """The shape of the layer that ``k`` and ``v``, ``[batch, kv_heads, tokens, width]``, are of.

    Raises ShapeMismatch where they are no pair: widths and dtypes may differ, and nothing else.
    """
    if k.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ShapeMismatch(
            f"k is {list(k.shape)} but v is {list(v.shape)}: they may differ in width only, not in "
            "batch, heads or tokens"
        )
    return LayerShape(k.shape[1], k.shape[3], k.dtype, v.shape[3], v.dtype)


def guessed(known: Items[LayerShape], kinds: Items[object]) -> list[LayerShape]:
    """The shapes of all layers, of which the first ``known`` ones have come.

    A layer is taken to be like the last one that came of its kind, or else like the last one of
    all: models that mix shapes do it by kind of attention (Gemma 4: windows are narrower).
    """
    by_kind = dict(zip(kinds, known, strict=False))
    return [*known, *(by_kind.get(kind, known[-1]) for kind in kinds[len(known) :])]


def changed(shape: KVShape, number: int, layer: LayerShape, kinds: Items[object]) -> KVShape:
    """``shape`` with another ``layer`` at ``number``, and those after it guessed anew."""
    known = [shape.layer(before) for before in range(number)]
    return KVShape.of_layers(guessed([*known, layer], kinds), shape.max_tokens, shape.batch)
