"""Which models an OffloadedKVCache can serve, told from their configuration."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers.layers import IN_MEMORY, OFFLOADED

NO_KV = "takes no cache"
IN_THE_MODEL = "keeps its recurrent states in the model itself, where no cache can change them"
OWN_CACHE = "keeps its states in a cache of its own"
LOOPS = "runs layers several times, each time with a cache of its own"

REFUSED = {
    "mllama": "mixes the K/V of images into the layers of its text",
    "mllama_text_model": "mixes the K/V of images into the layers of its text",
    "recurrent_gemma": IN_THE_MODEL,
    "reformer": OWN_CACHE,
    "rwkv": OWN_CACHE,
    "xlstm": OWN_CACHE,
    "xlnet": OWN_CACHE,
    "minimax": OWN_CACHE,
    "openai-gpt": NO_KV,
    "dory": LOOPS,
    "inkling2_loop": LOOPS,
    "inkling2_loop_text": LOOPS,
}
"""By ``model_type``: what DynamicCache(config=...) does not tell."""


def layer_templates(config: Any) -> list[Any]:
    """The layers that DynamicCache has for the model, in order.

    DynamicCache decides what each layer is, so that the two always agree.

    Raises:
        ShapeMismatch: The model cannot be offloaded, and why.
    """
    name = getattr(config, "model_type", "") or type(config).__name__
    try:
        text_config = config.get_text_config(decoder=True)
        layers = list(DynamicCache(config=text_config).layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShapeMismatch(
            f"{name} is not a configuration for which transformers makes a DynamicCache "
            f"({type(error).__name__}: {error}), so nothing of it can be offloaded"
        ) from error
    for one in (config, text_config):
        reason = REFUSED.get(getattr(one, "model_type", ""))
        if reason is not None:
            raise ShapeMismatch(f"{name} {reason}: it cannot be offloaded")
    for number, layer in enumerate(layers):
        if type(layer) not in OFFLOADED and type(layer) not in IN_MEMORY:
            raise ShapeMismatch(
                f"layer {number} of {name} is cached as {type(layer).__name__}, which cannot be "
                "offloaded: use DynamicCache for this model"
            )
    if not any(type(layer) in OFFLOADED for layer in layers):
        raise ShapeMismatch(
            f"{name} has no layers with a KV cache, so there is nothing to offload: use "
            "DynamicCache for this model"
        )
    return layers
