"""Prompts that are stored once and gone on from by anyone with the same model."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Lfm2Config

from integrations.transformers.models import feed, generate, model_of, prompt
from spdk_kv.errors import ShapeMismatch, StoreMismatch
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache, PromptCache
from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from support.places import ROOT
from support.rounds import rounds

ROOM = {"max_tokens": 500}


@pytest.fixture
def model() -> Any:
    return model_of("llama")


def ids(tokens: int, seed: int = 1) -> torch.Tensor:
    return prompt(1, tokens, seed)["input_ids"]


def tiny_lfm2() -> Lfm2Config:
    """Of a model with convolutional layers."""
    return Lfm2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def told(model: Any, cache: Any, text: torch.Tensor) -> list[list[int]]:
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return generate(model, cache, inputs).sequences.tolist()


def ask(prompts: PromptCache, model: Any, text: torch.Tensor) -> int:
    """Checks that the answer is the right one. Returns how many tokens were there."""
    with prompts.open(text) as cache:
        assert cache.get_seq_length() == cache.saved_tokens
        assert told(model, cache, text) == told(model, DynamicCache(config=model.config), text)
        return cache.saved_tokens


def put(prompts: PromptCache, model: Any, text: torch.Tensor) -> str:
    with prompts.open(text) as cache, torch.no_grad():
        model(text[:, cache.saved_tokens :], **{CACHE_ARGUMENT: cache})
        saved = prompts.save(cache)
        assert saved.tokens == text.shape[1]
        return saved.name


# -- the longest beginning -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "qwen3"])
def test_a_document_is_computed_once(store: KVStore, family: str) -> None:
    model, document = model_of(family), ids(150)
    prompts = PromptCache(store, model, **ROOM)
    assert ask(prompts, model, document) == 0
    put(prompts, model, document)
    assert ask(prompts, model, document) == 149, "one token is computed"
    for seed in range(3):
        assert ask(prompts, model, joined(document, ids(20, seed + 5))) == 150
    assert ask(prompts, model, joined(document[:, :101], ids(9, 7))) == 101
    assert ask(prompts, model, ids(30, 77)) == 0
    assert len(store.sequences()) == 1


def test_the_longest_of_several_is_taken(store: KVStore, model: Any) -> None:
    prompts = PromptCache(store, model, **ROOM)
    document, first, second = ids(100), ids(30, 2), ids(30, 3)
    for text in (document, joined(document, first), joined(document, second), ids(40, 8)):
        put(prompts, model, text)
    assert ask(prompts, model, joined(document, first, ids(5, 6))) == 130
    assert ask(prompts, model, joined(document, second[:, :11], ids(5, 6))) == 111
    assert ask(prompts, model, joined(document, ids(5, 6))) == 100


def test_a_second_turn_goes_on_from_the_first(store: KVStore, model: Any) -> None:
    prompts, text, begun = PromptCache(store, model, **ROOM), ids(60), 0
    for turn in range(4):
        with prompts.open(text) as cache:
            assert cache.saved_tokens == begun
            answer = torch.tensor(told(model, cache, text))
            prompts.save(cache)
            begun = cache.get_seq_length()
        text = joined(answer, ids(8, turn + 20))
    assert ask(prompts, model, text) == begun


def test_what_caches_with_a_name_hold_counts_as_well(store: KVStore, model: Any) -> None:
    document = ids(90)
    with OffloadedKVCache(store, model, name="before", **ROOM) as cache:
        told(model, cache, document)
    prompts = PromptCache(store, model, **ROOM)
    assert ask(prompts, model, joined(document, ids(5, 3))) == 90
    other = ids(70, 4)
    with OffloadedKVCache(store, model, name="later", **ROOM) as cache:
        told(model, cache, other)
    assert ask(prompts, model, joined(other, ids(5, 3))) == 70
    # While one of them is in use, too; and what it forgets is not found any more.
    with OffloadedKVCache(store, model, name="later", input_ids=other, **ROOM) as cache:
        assert ask(prompts, model, joined(other, ids(5, 3))) == 69
        told(model, cache, other)
        assert ask(prompts, model, joined(other, ids(5, 3))) == 70
        cache.reset()
        assert ask(prompts, model, joined(other, ids(5, 3))) == 0
    assert ask(prompts, model, joined(document, ids(5, 3))) == 90


def test_two_prompt_caches_of_a_store_share_what_they_save(store: KVStore, model: Any) -> None:
    one, other = PromptCache(store, model, **ROOM), PromptCache(store, model, **ROOM)
    put(one, model, ids(60))
    assert ask(other, model, ids(60)) == 59


# -- identity ------------------------------------------------------------------------------------


def test_prompts_of_another_model_or_tag_are_not_found(store: KVStore, model: Any) -> None:
    document = ids(60)
    put(PromptCache(store, model, **ROOM), model, document)
    assert ask(PromptCache(store, model, tag="mine", **ROOM), model, document) == 0
    other = model_of("llama", torch.float32, "sdpa", 1)
    prompts = PromptCache(store, other, **ROOM)
    assert ask(prompts, other, document) == 0
    put(prompts, other, document)
    assert ask(prompts, other, document) == 59
    assert len(prompts.list()) == 1


def test_an_adapter_that_comes_and_goes_has_prompts_of_its_own(store: KVStore) -> None:
    model, document = copy.deepcopy(model_of("llama")), ids(60)
    prompts = PromptCache(store, model, **ROOM)
    put(prompts, model, document)
    weight = model.model.layers[1].self_attn.k_proj.weight
    before = weight.detach().clone()
    weight.data += 0.05 * torch.randn_like(weight)  # as peft merges it
    assert ask(prompts, model, document) == 0
    put(prompts, model, document)
    assert ask(prompts, model, document) == 59
    weight.data.copy_(before)
    assert ask(prompts, model, document) == 59
    assert len(prompts.list()) == 1


# -- saving --------------------------------------------------------------------------------------


def test_saving_the_same_again_changes_nothing(store: KVStore, model: Any) -> None:
    prompts, document = PromptCache(store, model, **ROOM), ids(60)
    name = put(prompts, model, document)
    stored = store.sequence(name)
    assert put(prompts, model, document) == name
    assert store.sequence(name) is stored
    assert store.sequences() == [name]


def test_a_beginning_of_it_can_be_saved(store: KVStore, model: Any) -> None:
    prompts, text = PromptCache(store, model, **ROOM), ids(60)
    with prompts.open(text) as cache:
        told(model, cache, text)
        assert prompts.save(cache, tokens=40).tokens == 40
        assert cache.get_seq_length() == 71
        name = prompts.save(cache, tokens=40).name
        assert not store.sequence(name).pinned
        assert prompts.save(cache, tokens=40, pin=True).name == name
        assert store.sequence(name).pinned
    assert ask(prompts, model, text) == 40


def test_what_cannot_be_a_prompt_says_why(store: KVStore, model: Any, tmp_path: Path) -> None:
    prompts, text = PromptCache(store, model, **ROOM), ids(20)
    with pytest.raises(ShapeMismatch, match="one text at a time, not a batch of 3"):
        prompts.open(prompt(3, 20)["input_ids"])
    with pytest.raises(TypeError, match="takes the model itself"):
        PromptCache(store, model.config)
    with pytest.raises(ShapeMismatch, match="states beside K/V"):
        PromptCache(store, AutoModelForCausalLM.from_config(tiny_lfm2()))
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(StoreMismatch, match="have no values"):
        PromptCache(store, empty)
    with pytest.raises(ValueError, match="those of a PromptCache"):
        OffloadedKVCache(store, model, name="prompt-cache/mine")
    with prompts.open(text) as cache:
        with pytest.raises(ShapeMismatch, match="has no tokens"):
            prompts.save(cache)
        feed([cache], 20)
        with pytest.raises(ShapeMismatch, match="not known: tokens came without"):
            prompts.save(cache)
    with prompts.open(text) as cache, torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(text), **{CACHE_ARGUMENT: cache})
        with pytest.raises(ShapeMismatch, match="not known: the model was given inputs_embeds"):
            prompts.save(cache)
    with OffloadedKVCache(store, model.config) as cache, pytest.raises(ShapeMismatch):
        prompts.save(cache)
    with OffloadedKVCache(store, model, name="rows", **ROOM) as cache:
        generate(model, cache, prompt(2, 20))
        with pytest.raises(ShapeMismatch, match="not a batch of 2"):
            prompts.save(cache)
    other = model_of("llama", torch.float32, "sdpa", 1)
    with OffloadedKVCache(store, other, name="other", **ROOM) as cache:
        told(other, cache, text)
        with pytest.raises(StoreMismatch, match="of another model: the weights"):
            prompts.save(cache)
    with (
        open_store(f"file://{tmp_path}/other", capacity="64 MiB") as elsewhere,
        OffloadedKVCache(elsewhere, model, name="other", **ROOM) as cache,
    ):
        told(model, cache, text)
        with pytest.raises(StoreMismatch, match="another store"):
            prompts.save(cache)


def test_hits_and_times_last(tmp_path: Path, model: Any) -> None:
    where, document = f"file://{tmp_path}/kv", ids(60)
    with open_store(where, capacity="64 MiB") as store:
        prompts = PromptCache(store, model, **ROOM)
        name = put(prompts, model, document)
        (before,) = prompts.list()
        assert (before.name, before.tokens, before.hits) == (name, 60, 0)
        ask(prompts, model, document)
    with open_store(where) as store:
        prompts = PromptCache(store, model, **ROOM)
        ask(prompts, model, joined(document, ids(4)))
        (after,) = prompts.list()
        assert (after.name, after.tokens, after.hits) == (name, 60, 2)
        assert after.used_s > before.used_s


# -- trouble -------------------------------------------------------------------------------------


def test_what_is_gone_gives_way_to_the_next_best(store: KVStore, model: Any) -> None:
    prompts, document = PromptCache(store, model, **ROOM), ids(100)
    names = [put(prompts, model, document[:, :tokens]) for tokens in (50, 80, 100)]
    asked = joined(document, ids(5, 3))
    for name, left in zip(reversed(names), (80, 50, 0), strict=True):
        store.sequence(name).delete()
        assert ask(prompts, model, asked) == left
    assert prompts.list() == []
    put(prompts, model, document)
    assert ask(prompts, model, asked) == 100


def test_a_note_that_says_something_else_now_is_not_believed(store: KVStore, model: Any) -> None:
    prompts = PromptCache(store, model, **ROOM)
    name, other = put(prompts, model, ids(60)), put(prompts, model, ids(50, 9))
    for note in (store.sequence(other).note, b"", b"rubbish"):
        store.sequence(name).note = note
        assert ask(prompts, model, ids(60)) == 0
        assert ask(prompts, model, ids(50, 9)) == 49
    # Saved again it is there again, whatever was under its name.
    assert put(prompts, model, ids(60)) == name
    assert ask(prompts, model, ids(60)) == 59


def test_a_writer_that_changes_it_amid_the_fork_is_noticed(
    store: KVStore, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, document = PromptCache(store, model, **ROOM), ids(60)
    changes = []
    honest = Sequence.fork

    def fork(parent: Sequence, *args: Any, **kwargs: Any) -> Sequence:
        forked = honest(parent, *args, **kwargs)
        if changes:
            changes.pop()()
        return forked

    monkeypatch.setattr(Sequence, "fork", fork)
    with OffloadedKVCache(store, model, name="chat", **ROOM) as cache:
        told(model, cache, document)
    changes.append(lambda: OffloadedKVCache(store, model, name="chat", input_ids=ids(3), **ROOM))
    assert ask(prompts, model, document) == 0
    with OffloadedKVCache(store, model, name="chat", **ROOM) as cache:
        told(model, cache, document)
    assert ask(prompts, model, document) == 59
    with OffloadedKVCache(store, model, name="chat", input_ids=document, **ROOM) as cache:
        changes.append(lambda: cache.crop(-10))
        assert ask(prompts, model, document) == 0
    assert not changes


def test_many_threads_ask_and_save_at_once(store: KVStore, model: Any) -> None:
    prompts, document, failed = PromptCache(store, model, **ROOM), ids(64), []
    put(prompts, model, document)

    def work(number: int) -> None:
        try:
            for turn in range(3):
                text = joined(document, ids(4, number), ids(4, 100 * number + turn))
                with prompts.open(text) as cache, torch.no_grad():
                    assert cache.saved_tokens >= 64
                    model(text[:, cache.saved_tokens :], **{CACHE_ARGUMENT: cache})
                    prompts.save(cache)
                assert prompts.open(text).saved_tokens == 71
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(prompts.list()) == 1 + 16 * 3
    assert ask(prompts, model, joined(document, ids(4, 3), ids(4, 301))) == 71


CHILD = """
import sys
from integrations.transformers.models import model_of
from integrations.transformers.test_prompts import ROOM, ids, put
from spdk_kv.integrations.transformers import PromptCache
from spdk_kv.store import open as open_store

store = open_store(sys.argv[1], capacity="64 MiB")
prompts = PromptCache(store, model_of("llama"), **ROOM)
put(prompts, model_of("llama"), ids(60))
store.flush()
put(prompts, model_of("llama"), ids(60, 2))
print("ready", flush=True)
sys.stdin.read()
"""


def test_after_kill_9_what_was_flushed_is_there(tmp_path: Path, model: Any) -> None:
    where = f"file://{tmp_path}/kv"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, where],
        cwd=ROOT / "tests",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with open_store(where) as store:
        prompts = PromptCache(store, model, **ROOM)
        assert ask(prompts, model, joined(ids(60), ids(5, 5))) == 60
        # Perhaps flushed in the background, perhaps not.
        assert ask(prompts, model, joined(ids(60, 2), ids(5, 5))) in (0, 60)


def test_kills_amid_saving_and_going_on_leave_the_right_tokens(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(tmp_path), str(rounds(4, 200)), "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "durable" in ran.stdout


def test_a_prompt_of_one_token_and_a_wrapped_model(store: KVStore, model: Any) -> None:
    wrapped = nn.Sequential(model)
    prompts = PromptCache(store, wrapped, **ROOM)
    assert ask(prompts, model, ids(1)) == 0
    put(prompts, model, ids(1))
    assert ask(prompts, model, ids(1)) == 0
    assert ask(prompts, model, joined(ids(1), ids(3, 5))) == 1
