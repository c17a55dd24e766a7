"""Tiny models with random weights, and the comparison of a cache with DynamicCache."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.store import KVStore
from support.waiting import PATIENCE_S

VOCABULARY = 96
WINDOW = 40
PAD = 0

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # 512 bytes per token and layer in float32: a chunk of 16 KiB fills every 32 tokens.
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Far from uniform attention, so that a wrong key or value shows in the tokens.
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 64,
        },
    ),
}


@cache
def model_of(
    family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> Any:
    """A model of ``family``; the same one for the same arguments."""
    torch.manual_seed(seed)
    kind, config_kind, extra = FAMILIES[family]
    config = config_kind(**SIZES, **extra, attn_implementation=attention)
    model = kind(config).eval().to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def prompt(batch: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``; every row but the first is padded on the left."""
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 7 * row] = 0
        ids[row, : 7 * row] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Tokens and logits of ``model.generate`` with ``cache``."""
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(
        **inputs,
        **options,
        **{CACHE_ARGUMENT: cache},
        return_dict_in_generate=True,
        output_logits=True,
    )


def assert_same(
    store: KVStore, model: Any, inputs: Any, *, options: Any = None, **kinds: Any
) -> Any:
    """Generates with both caches; equal to the last bit, with reads from the store in between.

    ``options`` are generate's, ``kinds`` the cache's. Returns the cache's stats.
    """
    options = options or {}
    torch.manual_seed(5)
    wanted = generate(model, DynamicCache(config=model.config), inputs, **options)
    before = read_nbytes(store)
    with OffloadedKVCache(store, model.config, **kinds) as cache:
        torch.manual_seed(5)
        found = generate(model, cache, inputs, **options)
        stats = cache.stats()
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for step, (ours, theirs) in enumerate(zip(found.logits, wanted.logits, strict=True)):
        assert torch.equal(ours, theirs), f"logits of step {step} differ"
    stats["drive_read_nbytes"] = read_nbytes(store) - before
    return stats


def read_nbytes(store: KVStore) -> int:
    """Bytes that sequences read, by either path."""
    counters = store.stats()["residency"]
    return int(counters["direct_read_nbytes"] + counters["cached_read_nbytes"])


def config_of(family: str = "gemma3") -> Any:
    return model_of(family).config


def random_kv(batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(batch, 2, tokens, 64).to(dtype) for _ in range(2)]


def feed(caches: list[Any], tokens: int, batch: int = 1, layers: int = 4) -> None:
    """One forward pass's updates of all caches with the same K/V; the answers must be the same."""
    for layer in range(layers):
        k, v = random_kv(batch, tokens)
        sizes = [cache.get_mask_sizes(tokens, layer) for cache in caches]
        found = [cache.update(k, v, layer) for cache in caches]
        for size, (keys, values) in zip(sizes, found, strict=True):
            assert size == sizes[0]
            assert torch.equal(keys, found[0][0])
            assert torch.equal(values, found[0][1])
        del found, keys, values  # or the cache counts them as a layer in memory


def leased_nbytes(store: KVStore, at_most: int = 0) -> int:
    """What the staging pool has out, once the drive is done with what was dropped in flight: the
    engine notices that on its next call."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        store.paths.stats()
        leased = store.staging.stats()["leased_nbytes"]
        if leased <= at_most or time.monotonic() > deadline:
            return leased
