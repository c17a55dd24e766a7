"""Tiny models that attend to everything, and what they say with each kind of cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from integrations.transformers.models import PAD, SIZES, generate, prompt
from spdk_kv.integrations.transformers import SparseKVCache
from spdk_kv.store import KVStore

LAYERS = SIZES["num_hidden_layers"]

# By class; what makes each of them another one.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 40, "query_pre_attn_scalar": 32},
    "Gemma3": {
        "sliding_window": 40,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Phi3": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "Olmo2": {},
    "SmolLM3": {"no_rope_layers": [1, 1, 1, 0]},
}


@cache
def model_of(family: str, attention: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """A model of the class for ``family``; the same one for the same arguments."""
    attention = attention or ("eager" if family == "Gemma2" else "sdpa")
    torch.manual_seed(3)
    name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, name)(**SIZES, **FAMILIES[family], attn_implementation=attention)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def whole_layers(model: Any) -> int:
    """How many layers attend to all tokens."""
    return sum(not sliding for sliding in DynamicCache(config=model.config).is_sliding)


def both(
    store: KVStore, model: Any, inputs: Any = None, options: Any = None, **kinds: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """What generate gives with DynamicCache, and with a SparseKVCache of ``kinds``, and its
    stats."""
    inputs = prompt(1, 150) if inputs is None else inputs
    options = options or {}
    torch.manual_seed(5)
    wanted = generate(model, DynamicCache(config=model.config), inputs, **options)
    with SparseKVCache(store, model, **kinds) as cache:
        torch.manual_seed(5)
        found = generate(model, cache, inputs, **options)
        return wanted, found, cache.stats()


def assert_equal(wanted: Any, found: Any) -> None:
    """To the last bit."""
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for step, (ours, theirs) in enumerate(zip(found.logits, wanted.logits, strict=True)):
        assert torch.equal(ours, theirs), f"logits of step {step} differ"
