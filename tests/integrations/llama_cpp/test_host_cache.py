"""The cache under a real Llama: what is stored, what is found again, and what is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integrations.llama_cpp.models import answer, evaluated, open_llama, text
from spdk_kv.integrations.llama_cpp import StateCache
from spdk_kv.store import KVStore

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

EVERY = 64
# What the end of an answer adds: its last token is never computed.
COUNT = 8


@pytest.fixture
def llama(model_path: Path) -> Iterator[Any]:
    with_model = open_llama(model_path)
    yield with_model
    with_model.close()


def cached(llama: Any, store: KVStore, **options: Any) -> StateCache:
    cache = StateCache(store, llama, **{"every": EVERY, "least_tokens": 16, **options})
    llama.set_cache(cache)
    return cache


def remember(path: Path, store: KVStore, *prompts: list[int], **options: Any) -> list[list[int]]:
    """The answers of a Llama of its own to ``prompts``, the states of which are stored."""
    llama = open_llama(path, **options)
    cache = cached(llama, store)
    answers = [answer(llama, prompt, COUNT) for prompt in prompts]
    cache.wait()
    llama.close()
    return answers


def test_fulfils_the_contract_of_the_host(llama: Any, store: KVStore) -> None:
    cache = cached(llama, store)
    assert isinstance(cache, llama_cpp.llama_cache.BaseLlamaCache)
    assert cache.capacity_bytes == 64 << 20
    assert 0 < cache.cache_size < 1 << 20  # the digest of the model's file
    with pytest.raises(KeyError):
        cache[text(1, 100)]
    assert text(1, 100) not in cache


@pytest.mark.parametrize(
    "options",
    [{}, {"flash_attn": True}, {"flash_attn": True, "type_k": 8, "type_v": 8}],
    ids=["plain", "flash attention", "8 bits"],
)
def test_a_prompt_asked_before_is_computed_from_its_last_token_on(
    model_path: Path, store: KVStore, options: dict[str, Any]
) -> None:
    prompt = text(1, 500)
    [expected] = remember(model_path, store, prompt, **options)
    llama = open_llama(model_path, **options)
    cache = cached(llama, store)
    got: list[int] = []
    computed = evaluated(llama, lambda: got.extend(answer(llama, prompt, COUNT)))
    assert got == expected
    assert len(got) == COUNT - 1
    # The last token of the prompt, and all of the answer but its last.
    assert computed == COUNT
    assert cache.stats()["restored_tokens"] == 500
    llama.close()


def test_what_comes_back_is_the_state_that_was_stored(model_path: Path, store: KVStore) -> None:
    prompt = text(1, 300)
    first, second = open_llama(model_path), open_llama(model_path)
    cache = cached(first, store)
    answer(first, prompt, 1)
    cache.wait()
    other = cached(second, store)
    assert other[prompt].input_ids.tolist() == prompt
    assert second.n_tokens == first.n_tokens == 300
    assert bytes(second.save_state().llama_state) == bytes(first.save_state().llama_state)
    first.close()
    second.close()


def test_a_longer_prompt_goes_on_from_the_longest_beginning(
    model_path: Path, store: KVStore
) -> None:
    prompt = text(1, 200)
    remember(model_path, store, prompt, [*prompt, *text(2, 200)[1:]])
    longer = [*prompt, *text(3, 100)[1:]]
    [expected] = remember(model_path, store, longer)
    store_free = open_llama(model_path)
    assert answer(store_free, longer, COUNT) == expected
    store_free.close()
    llama = open_llama(model_path)
    cache = cached(llama, store)
    further = [*longer, *text(4, 50)[1:]]
    assert evaluated(llama, lambda: answer(llama, further, COUNT)) == 49 + COUNT - 1
    assert cache.stats()["restored_tokens"] == len(longer)
    llama.close()


def test_nothing_is_taken_out_by_looking(model_path: Path, store: KVStore) -> None:
    prompt = text(1, 200)
    remember(model_path, store, prompt)
    for _ in range(3):
        llama = open_llama(model_path)
        cache = cached(llama, store)
        assert evaluated(llama, lambda llama=llama: answer(llama, prompt, COUNT)) == COUNT
        assert cache.stats()["hits"] == 1
        llama.close()


def test_prompts_that_share_their_first_token_only_are_strangers(
    model_path: Path, store: KVStore
) -> None:
    long, short = text(1, 400), text(2, 60)
    assert long[0] == short[0]
    remember(model_path, store, long)
    llama = open_llama(model_path)
    cache = cached(llama, store)
    assert short not in cache
    assert evaluated(llama, lambda: answer(llama, short, COUNT)) == 60 + COUNT - 1
    assert evaluated(llama, lambda: answer(llama, long, COUNT)) == COUNT
    llama.close()


def test_short_prompts_are_neither_stored_nor_looked_for(llama: Any, store: KVStore) -> None:
    cache = cached(llama, store, least_tokens=100)
    before = set(store.keys())
    answer(llama, text(1, 90), COUNT)
    cache.wait()
    assert set(store.keys()) == before
    answer(llama, text(2, 100), COUNT)
    cache.wait()
    assert text(2, 100)[:99] not in cache
    assert text(2, 100) in cache


def test_only_what_is_new_is_stored(llama: Any, store: KVStore) -> None:
    cache = cached(llama, store)
    prompt = text(1, 4 * EVERY)
    answer(llama, prompt, COUNT)
    cache.wait()
    # Four pieces, and what was answered.
    assert cache.stats()["saved"] == 5
    answer(llama, prompt, COUNT)
    assert cache.stats()["saved"] == 5
    answer(llama, [*prompt, *text(2, EVERY + 1)[1:]], COUNT)
    cache.wait()
    assert cache.stats()["saved"] == 7


def test_what_the_context_holds_already_is_not_read(llama: Any, store: KVStore) -> None:
    cache = cached(llama, store)
    prompt = text(1, 300)
    expected = answer(llama, prompt, COUNT)
    cache.wait()
    assert answer(llama, prompt, COUNT) == expected
    assert cache.stats()["live"] == 1
    assert cache.stats()["read_nbytes"] == 0


def test_only_what_the_context_lacks_is_read(model_path: Path, store: KVStore) -> None:
    prompt = text(1, 8 * EVERY)
    [expected] = remember(model_path, store, prompt)
    llama = open_llama(model_path)
    cache = cached(llama, store)
    answer(llama, [*prompt[: 5 * EVERY], *text(9, 30)[1:]], COUNT)
    assert cache.stats()["restored_tokens"] == 5 * EVERY
    assert answer(llama, prompt, COUNT) == expected
    assert cache.stats()["restored_tokens"] == 8 * EVERY
    llama.close()


def test_storing_changes_nothing_in_the_context(model_path: Path, store: KVStore) -> None:
    prompt = text(1, 300)
    plain, llama = open_llama(model_path), open_llama(model_path)
    cached(llama, store)
    for asked in (prompt, [*prompt, *text(2, 50)], prompt[:150], text(3, 200)):
        assert answer(llama, asked, COUNT) == answer(plain, asked, COUNT)
        assert bytes(llama.save_state().llama_state) == bytes(plain.save_state().llama_state)
    plain.close()
    llama.close()


def test_who_saves_a_state_gets_all_of_it(llama: Any, store: KVStore) -> None:
    cached(llama, store)
    answer(llama, text(1, 100), COUNT)
    state = llama.save_state()
    assert state.llama_state_size == len(state.llama_state) > 100 * 100
    assert state.scores.shape[1] == llama.n_vocab()
    tokens = state.n_tokens
    answer(llama, text(2, 50), COUNT)
    llama.load_state(state)
    assert llama.n_tokens == tokens


def test_the_host_copies_nothing_to_store_it(llama: Any, store: KVStore) -> None:
    class Watching(StateCache):
        def __setitem__(self, key: Any, value: Any) -> None:
            given.append(value)
            super().__setitem__(key, value)

    given: list[Any] = []
    llama.set_cache(Watching(store, llama))
    answer(llama, text(1, 100), COUNT)
    assert [(state.llama_state, state.scores.size) for state in given] == [(b"", 0)]
    llama.set_cache(llama_cpp.LlamaRAMCache())
    answer(llama, text(2, 100), COUNT)
    assert llama.cache.cache_size > 100 * 100


def test_scores_that_are_not_kept_are_no_numbers(model_path: Path, store: KVStore) -> None:
    asked = "a prompt to be told of " * 5

    def ask(llama: Any) -> Any:
        told = llama.create_completion(asked, max_tokens=4, temperature=0.0, logprobs=1, echo=True)
        return told["choices"][0]["logprobs"]["token_logprobs"]

    plain = open_llama(model_path, logits_all=True)
    tokens = plain.tokenize(asked.encode())
    expected = ask(plain)
    plain.close()
    remember(model_path, store, tokens, logits_all=True)
    llama = open_llama(model_path, logits_all=True)
    cached(llama, store)
    answer(llama, text(2, 200), COUNT)  # whose scores are not those of the prompt
    got = ask(llama)
    end = len(tokens)
    assert np.allclose(got[end:], expected[end:], atol=1e-4)
    assert all(math.isnan(value) for value in got[1 : end - 1])
    assert not any(math.isnan(value) for value in expected[1:])
    llama.close()


def test_pictures_are_refused(llama: Any, store: KVStore) -> None:
    class Seeing:
        clip_model_path = "eyes.gguf"

    cache = cached(llama, store)
    llama.chat_handler = Seeing()
    before = set(store.keys())
    answer(llama, text(1, 100), COUNT)
    cache.wait()
    assert set(store.keys()) == before
    with pytest.raises(ValueError, match="pictures"):
        StateCache(store, llama)


@pytest.mark.parametrize("wrong", [{"least_tokens": 0}, {"every": 0}])
def test_settings_that_make_no_sense_are_refused(
    llama: Any, store: KVStore, wrong: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        StateCache(store, llama, **wrong)
