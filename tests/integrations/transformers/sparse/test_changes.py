"""Forks, and changes of length and rows between steps that read a part."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import model_of
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.sparse import Settings
from spdk_kv.store import KVStore

SETTINGS = Settings(tokens=512, recent=7)


def logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids, **{CACHE_ARGUMENT: cache}).logits
    return found


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_random_changes_give_what_dynamic_cache_gives(store: KVStore, seed: int) -> None:
    rng, batch, model = random.Random(seed), 2, model_of("Qwen3")
    theirs = DynamicCache(config=model.config)
    theirs.activate_past_recording()
    ours = SparseKVCache(store, model, settings=SETTINGS)
    for _ in range(30):
        count = rng.choice([1, 1, 1, 1, 1, 2, 40])
        ids = torch.randint(2, 90, (batch, count), generator=torch.manual_seed(rng.randrange(999)))
        assert torch.equal(logits(model, ours, ids), logits(model, theirs, ids))
        action = rng.randrange(8)
        if action == 0:
            drop = -min(rng.choice([0, 1, 3, 30]), theirs.get_seq_length() - 1)
            theirs.crop(drop)
            ours.crop(drop)
        elif action == 1:
            rows = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            theirs.reorder_cache(rows)
            ours.reorder_cache(rows)
        elif action == 2 and batch < 4:
            theirs.batch_repeat_interleave(2)
            ours.batch_repeat_interleave(2)
            batch *= 2
        elif action == 3 and batch > 2:
            rows = torch.tensor(rng.sample(range(batch), batch - 1))
            theirs.batch_select_indices(rows)
            ours.batch_select_indices(rows)
            batch -= 1
        elif action == 4 and rng.random() < 0.3:
            theirs.reset()
            ours.reset()
            theirs.activate_past_recording()
    assert ours.stats()["hits"] > 0
    ours.close()
    assert store.sequences() == []


@pytest.mark.parametrize("tokens", [512, 16])
def test_forks_go_their_own_ways(store: KVStore, tokens: int) -> None:
    model, document = model_of("Qwen3"), prompt(1, 150)["input_ids"]
    turns = [torch.cat([document, prompt(1, 8 + n, seed=n)["input_ids"]], dim=1) for n in range(3)]

    def told(cache: Any, turn: torch.Tensor) -> list[list[int]]:
        found: list[list[int]] = generate(model, cache, {"input_ids": turn}).sequences.tolist()
        return found

    trunk = SparseKVCache(store, model, tokens=tokens)
    with torch.no_grad():
        logits(model, trunk, document)
    branches = [trunk.fork(), trunk.fork(100), trunk]
    assert [branch.get_seq_length() for branch in branches] == [150, 100, 150]
    for branch in branches[:2]:  # nothing is read to select by
        assert {each.tokens for each in branch.sparse._selectors.values()} == {
            branch.get_seq_length()
        }
    other = trunk.fork()
    other.crop(-60)  # before any pass, and so is what it selects by
    assert {each.tokens for each in other.sparse._selectors.values()} == {90}
    other.close()
    found = [told(branch, turn) for branch, turn in zip(branches, turns, strict=True)]
    for turn, branch, answer in zip(turns, branches, found, strict=True):
        assert branch.stats()["misses"] > 0
        if tokens == 512:
            assert answer == told(DynamicCache(), turn)
        branch.close()
    assert store.sequences() == []


def test_a_reset_cache_begins_anew_with_another_batch(store: KVStore) -> None:
    model = model_of("Llama")
    cache = SparseKVCache(store, model, tokens=512)
    for batch in (2, 3):
        inputs = prompt(batch, 60)
        wanted = generate(model, DynamicCache(), inputs).sequences
        assert torch.equal(generate(model, cache, inputs).sequences, wanted)
        cache.reset()
        assert cache.stats()["resident_nbytes"] == cache.stats()["metadata_nbytes"] == 0
