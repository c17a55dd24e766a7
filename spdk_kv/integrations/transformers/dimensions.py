"""What a model's configuration alone tells about reading a part of its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers.layers import OFFLOADED, window_of
from spdk_kv.integrations.transformers.refusal import layer_templates
from spdk_kv.types import LayerShape, dtype_itemsize, dtype_name


@dataclass(frozen=True)
class Dimensions:
    """Of a model.

    Attributes:
        layers: layers that attend to all tokens.
        heads: query heads of each.
        layer: the shape of their K and V.
        max_tokens: the longest text that it takes; None where it does not say.
        weights_nbytes: what a decode step multiplies with, experts that it passes by included.
    """

    layers: int
    heads: int
    layer: LayerShape
    max_tokens: int | None
    weights_nbytes: int


def dimensions_of(config: Any) -> Dimensions:
    """The dimensions that ``config`` of transformers has. Loads no weights.

    Raises:
        ShapeMismatch: no causal language model, or no layer of it attends to all tokens.
    """
    text = config.get_text_config(decoder=True)
    layers = whole_layers(config)
    dtype = dtype_name(getattr(text, "dtype", None) or torch.float32)
    heads = int(text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Dimensions(
        layers=len(layers),
        heads=heads,
        layer=LayerShape(int(kv_heads), int(head_dim), dtype),
        max_tokens=getattr(text, "max_position_embeddings", None),
        weights_nbytes=_multiplied(text) * dtype_itemsize(dtype),
    )


def whole_layers(config: Any) -> list[int]:
    """The numbers of the layers that attend to all tokens.

    Raises:
        ShapeMismatch: there is none, or the model cannot be offloaded at all.
    """
    text = config.get_text_config(decoder=True)
    found = [
        number
        for number, template in enumerate(layer_templates(config))
        if type(template) in OFFLOADED and window_of(template) is None
    ]
    if not found:
        raise ShapeMismatch(f"{text.model_type} has no layer that attends to all tokens")
    return found


def _multiplied(config: Any) -> int:
    """Elements of the weights that a token is multiplied with: not those of an embedding, of which
    it takes a row, unless they are those of the head as well."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ShapeMismatch(f"{config.model_type} is no causal language model: {error}") from error
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is None or head.weight is embedding
    weights = sum(weight.numel() for weight in model.parameters())
    return int(weights - (0 if tied else embedding.numel()))
