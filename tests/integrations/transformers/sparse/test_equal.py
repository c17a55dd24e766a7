"""With ``tokens`` at least the length, decoding with a SparseKVCache is dense decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import FAMILIES, assert_equal, both, model_of
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.sparse import Settings
from spdk_kv.store import KVStore

ALL = 512


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_are_dense_decoding(store: KVStore, family: str) -> None:
    wanted, found, stats = both(store, model_of(family), tokens=ALL)
    assert_equal(wanted, found)
    assert stats["misses"] > 0
    assert stats["hits"] > 5 * stats["misses"]
    assert stats["read_nbytes_per_token"] > 0


@pytest.mark.parametrize("selector", ["codes", "kvswap", "exact", "lowrank", "previous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches(store: KVStore, selector: str, attention: str) -> None:
    model = model_of("Qwen3", attention)
    wanted, found, _ = both(store, model, prompt(3, 90), tokens=ALL, selector=selector)
    assert_equal(wanted, found)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["sampling", "beams", "sampled beams"],
)
def test_ways_to_generate(store: KVStore, options: dict[str, Any]) -> None:
    wanted, found, _ = both(store, model_of("Llama"), prompt(2, 70), options, tokens=ALL)
    assert_equal(wanted, found)


@pytest.mark.parametrize("group_tokens", [4, 16])
def test_turns_and_crops(store: KVStore, group_tokens: int) -> None:
    model, settings = model_of("Gemma3"), Settings(tokens=ALL, group_tokens=group_tokens)
    told = []
    for cache in (
        DynamicCache(config=model.config),
        SparseKVCache(store, model, settings=settings),
    ):
        cache.activate_past_recording()
        first = generate(model, cache, prompt(1, 80)).sequences
        turn = torch.cat([first, prompt(1, 30, seed=9)["input_ids"]], dim=1)
        second = generate(model, cache, {"input_ids": turn}).sequences
        cache.crop(-7)
        third = torch.cat([second[:, :-8], prompt(1, 5, seed=4)["input_ids"]], dim=1)
        told.append([second.tolist(), generate(model, cache, {"input_ids": third})])
    assert told[0][0] == told[1][0]
    assert_equal(told[0][1], told[1][1])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 19, 20, 21])
def test_short_prompts(store: KVStore, length: int) -> None:
    wanted, found, _ = both(
        store, model_of("Llama"), prompt(1, length), {"max_new_tokens": 30}, tokens=64
    )
    assert_equal(wanted, found)


def test_rows_of_padding_alone(store: KVStore) -> None:
    inputs = prompt(2, 60)
    inputs["attention_mask"][1] = 0
    model = model_of("Llama", "eager")
    wanted, found, _ = both(store, model, inputs, tokens=ALL)
    assert torch.equal(found.sequences[0], wanted.sequences[0])
    assert_equal(wanted, found)


def test_chunked_prompt(store: KVStore) -> None:
    wanted, found, _ = both(
        store, model_of("Qwen2"), prompt(2, 100), {"prefill_chunk_size": 33}, tokens=ALL
    )
    assert_equal(wanted, found)


@pytest.mark.parametrize("resident", [1, 3, 4])
def test_layers_that_stay_in_memory(store: KVStore, resident: int) -> None:
    wanted, found, stats = both(store, model_of("Llama"), tokens=ALL, resident_layers=resident)
    assert_equal(wanted, found)
    assert (stats["misses"] == 0) == (resident == 4)


def test_begun_in_inference_mode_and_continued_without(store: KVStore) -> None:
    model, inputs, token = model_of("Llama"), prompt(2, 60), torch.tensor([[5], [9]])
    ours, theirs = SparseKVCache(store, model, tokens=ALL), DynamicCache()
    for each in (ours, theirs):
        with torch.inference_mode():
            model(**inputs, **{CACHE_ARGUMENT: each})
            model(token, **{CACHE_ARGUMENT: each})
            each.reorder_cache(torch.tensor([1, 1]))
    with torch.no_grad():
        for _ in range(3):
            found, wanted = (model(token, **{CACHE_ARGUMENT: each}) for each in (ours, theirs))
            assert torch.equal(found.logits, wanted.logits)
    ours.close()


def test_a_compiled_model_selects_as_well(store: KVStore) -> None:
    torch._dynamo.reset()
    model, token = model_of("Llama"), torch.tensor([[5]])
    compiled = torch.compile(model, backend="eager")
    ours, theirs = SparseKVCache(store, compiled, tokens=ALL), DynamicCache()
    with torch.no_grad():
        for ids in (prompt(1, 60)["input_ids"], token, token):
            found = compiled(input_ids=ids, **{CACHE_ARGUMENT: ours}).logits
            assert torch.equal(found, model(ids, **{CACHE_ARGUMENT: theirs}).logits)
    assert ours.stats()["hits"] > 0
    ours.close()
    torch._dynamo.reset()
