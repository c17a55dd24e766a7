"""Caches that fork, and batches that grow or shrink, without a copy of what is stored."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.families.decode import tiny_model
from integrations.transformers.models import config_of, feed, generate, model_of, prompt
from spdk_kv.errors import ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.store import KVStore
from store.helpers import open_store


def told(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> list[Any]:
    found: list[Any] = generate(model, cache, {"input_ids": ids}, **options).sequences.tolist()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_branches_of_one_prompt_say_what_they_would_alone(store: KVStore, family: str) -> None:
    model, document = model_of(family), prompt(1, 150)["input_ids"]
    turns = [torch.cat([document, prompt(1, 20 + n, seed=n)["input_ids"]], dim=1) for n in range(4)]
    wanted = [told(model, DynamicCache(config=model.config), turn) for turn in turns]
    trunk = OffloadedKVCache(store, model.config)
    with torch.no_grad():
        model(document, **{CACHE_ARGUMENT: trunk})
    branches = [trunk.fork(), copy.deepcopy(trunk), trunk.fork(100)]
    assert [branch.get_seq_length() for branch in branches] == [150, 150, 100]
    found = [told(model, trunk, turns[3])]
    trunk.close()
    found += [told(model, branch, turn) for branch, turn in zip(branches, turns, strict=False)]
    assert found == [wanted[3], *wanted[:3]]
    for branch in branches:
        branch.close()
    assert store.sequences() == []


@pytest.mark.parametrize("family", ["lfm2_moe", "qwen3_next", "falcon_h1"])
def test_states_go_along(store: KVStore, family: str) -> None:
    model, document = tiny_model(family, 0), prompt(1, 60)["input_ids"]
    turns = [torch.cat([document, prompt(1, 9, seed=n)["input_ids"]], dim=1) for n in range(2)]
    wanted = [told(model, DynamicCache(config=model.config), turn) for turn in turns]
    trunk = OffloadedKVCache(store, model.config)
    with torch.no_grad():
        model(document, **{CACHE_ARGUMENT: trunk})
    branch = trunk.fork()
    assert [told(model, branch, turns[0]), told(model, trunk, turns[1])] == wanted
    if family != "lfm2_moe":
        with pytest.raises(SpdkKvError, match="cannot go back"):
            trunk.fork(30)


def test_what_a_fork_refuses(store: KVStore) -> None:
    cache = OffloadedKVCache(store, config_of("llama"))
    assert cache.fork().get_seq_length() == 0
    feed([cache], 10)
    for tokens in (-1, 11):
        with pytest.raises(ShapeMismatch, match=f"10 tokens per row, not {tokens}"):
            cache.fork(tokens)


def test_a_fork_of_a_named_cache_knows_its_text_and_has_no_name(store: KVStore) -> None:
    model, text = model_of("llama"), prompt(1, 80)["input_ids"]
    with OffloadedKVCache(store, model, name="doc") as cache, torch.no_grad():
        model(text, **{CACHE_ARGUMENT: cache})
        branch = cache.fork(50)
        assert branch.history is not None
        assert branch.history.text.ids[:, 0].tolist() == text[0, :50].tolist()
        assert branch.sequence is not None
        assert branch.sequence.temporary
    longer = torch.cat([text, text], dim=1)
    wanted = told(model, DynamicCache(config=model.config), longer)
    assert told(model, branch, longer) == wanted


@pytest.mark.parametrize("resident", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_several_answers_to_one_prompt_share_it(store: KVStore, family: str, resident: int) -> None:
    model, document = model_of(family), prompt(1, 130)["input_ids"]
    answers = {}
    for kind in ("theirs", "ours"):
        cache: Any = DynamicCache(config=model.config)
        if kind == "ours":
            cache = OffloadedKVCache(store, model.config, resident_layers=resident)
        with torch.no_grad():
            model(document, **{CACHE_ARGUMENT: cache})
        before = store.stats()["used_nbytes"]
        cache.batch_repeat_interleave(4)
        if kind == "ours":
            assert store.stats()["used_nbytes"] == before
        torch.manual_seed(3)
        four = torch.cat([document, prompt(1, 3, seed=8)["input_ids"]], dim=1).repeat(4, 1)
        answers[kind] = told(model, cache, four, do_sample=True, temperature=2.0)
    assert answers["ours"] == answers["theirs"]
    assert len({tuple(answer) for answer in answers["ours"]}) > 1


@pytest.mark.parametrize("seed", range(3))
def test_any_changes_of_the_batch(store: KVStore, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = config_of("llama")
    theirs, ours = DynamicCache(config=config), OffloadedKVCache(store, config)
    batch = 1
    for _ in range(30):
        feed([theirs, ours], rng.choice([1, 3, 40]), batch)
        action = rng.randrange(5)
        if action == 0:
            count = -rng.randrange(min(90, theirs.get_seq_length()) + 1)
            theirs.crop(count)
            ours.crop(count)
        elif action == 1:
            rows = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            theirs.reorder_cache(rows)
            ours.reorder_cache(rows)
        elif action == 2 and batch < 5:
            theirs.batch_repeat_interleave(2)
            ours.batch_repeat_interleave(2)
            batch *= 2
        elif action == 3 and batch > 1:
            rows = torch.tensor(rng.sample(range(batch), rng.randrange(1, batch)))
            theirs.batch_select_indices(rows)
            ours.batch_select_indices(rows)
            batch = len(rows)
        elif action == 4:
            forked = ours.fork()
            ours.close()
            ours = forked
        assert ours.get_seq_length() == theirs.get_seq_length()
    ours.close()
    assert store.sequences() == []


def test_a_cache_with_a_name_changes_its_batch(tmp_path: Any) -> None:
    model, text = model_of("llama"), prompt(1, 70)["input_ids"]
    four = text.repeat(4, 1)
    with (
        open_store(tmp_path / "kv") as store,
        OffloadedKVCache(store, model, name="doc") as cache,
        torch.no_grad(),
    ):
        model(text, **{CACHE_ARGUMENT: cache})
        cache.batch_repeat_interleave(4)
        assert cache.sequence is not None
        assert cache.sequence.shape.batch == 4
        assert store.sequences() == ["doc"]
    longer = torch.cat([four, prompt(1, 4, seed=5)["input_ids"].repeat(4, 1)], dim=1)
    wanted = told(model, DynamicCache(config=model.config), longer)
    with (
        open_store(tmp_path / "kv") as store,
        OffloadedKVCache(store, model, name="doc", input_ids=longer) as cache,
    ):
        assert cache.saved_tokens == 70
        assert told(model, cache, longer) == wanted


def test_sixteen_caches_in_sixteen_threads(store: KVStore) -> None:
    model, document = model_of("llama"), prompt(1, 90)["input_ids"]
    trunk = OffloadedKVCache(store, model.config)
    with torch.no_grad():
        model(document, **{CACHE_ARGUMENT: trunk})
    forks = [trunk.fork() for _ in range(16)]
    turns = [torch.cat([document, prompt(1, 5, seed=n)["input_ids"]], dim=1) for n in range(16)]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = told(model, forks[number], turns[number], max_new_tokens=4)
        forks[number].close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, turn in enumerate(turns):
        alone = told(model, DynamicCache(config=model.config), turn, max_new_tokens=4)
        assert found[number] == alone
