"""Caches that read a part, over restarts: what they select by is stored with the tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import model_of
from spdk_kv.errors import StoreMismatch
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache, SparseKVCache
from spdk_kv.integrations.transformers.sparse.layer import PartLayer
from spdk_kv.store import SELECTION, KVStore, companion_key
from spdk_kv.store import open as open_store

KEY = companion_key("chat", SELECTION)
ALL = 512


@pytest.fixture
def where(tmp_path: Path) -> str:
    return f"file://{tmp_path}/kv"


@pytest.fixture
def model() -> Any:
    return model_of("Llama")


def told(model: Any, cache: Any, text: torch.Tensor, **options: Any) -> list[list[int]]:
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    found: list[list[int]] = generate(model, cache, inputs, **options).sequences.tolist()
    return found


def chat(store: KVStore, model: Any, text: torch.Tensor, **kinds: Any) -> SparseKVCache:
    return SparseKVCache(store, model, name="chat", input_ids=text, **({"tokens": ALL} | kinds))


def begin(where: str, model: Any, text: torch.Tensor, **kinds: Any) -> torch.Tensor:
    """Stores a chat that begins with ``text``. Returns it with the answer, and one token more."""
    with open_store(where, capacity="64 MiB") as store, chat(store, model, text, **kinds) as cache:
        answer = torch.tensor(told(model, cache, text))
    return torch.cat([answer, torch.tensor([[7]] * len(text))], dim=1)


@pytest.mark.parametrize("selector", ["codes", "lowrank", "exact"])
def test_a_restart_reads_what_it_selects_by(where: str, model: Any, selector: str) -> None:
    text = prompt(1, 130)["input_ids"]
    longer = begin(where, model, text, selector=selector)
    with open_store(where) as store:
        cache = chat(store, model, longer, selector=selector)
        # The last token of the answer was never computed.
        assert cache.saved_tokens == longer.shape[1] - 2
        for each in cache.sparse._selectors.values():
            assert each.tokens == cache.saved_tokens
        assert len(cache.sparse._selectors) == 4
        assert cache.stats()["metadata_nbytes"] > 0
        assert told(model, cache, longer) == told(model, DynamicCache(), longer)
        cache.close()


def test_a_text_that_parts_takes_up_what_is_common(where: str, model: Any) -> None:
    text = prompt(1, 130)["input_ids"]
    begin(where, model, text)
    other = torch.cat([text[:, :90], prompt(1, 20, seed=8)["input_ids"]], dim=1)
    with open_store(where) as store, chat(store, model, other) as cache:
        assert [each.tokens for each in cache.sparse._selectors.values()] == [90] * 4
        assert told(model, cache, other) == told(model, DynamicCache(), other)
        kept = cache.sparse.selectors()[0].tokens
    # What was stored of the other text has given way.
    with open_store(where) as store, chat(store, model, other) as cache:
        assert [each.tokens for each in cache.sparse._selectors.values()] == [109] * 4
        assert kept > 109


@pytest.mark.parametrize("damage", ["deleted", "overwritten", "of another selector"])
def test_without_it_the_keys_are_read_once(
    where: str, model: Any, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = begin(where, model, prompt(1, 130)["input_ids"])
    caught_up: list[int] = []
    catch_up = PartLayer._catch_up

    def counted(part: PartLayer, sequence: Any, past: int, *args: Any) -> None:
        caught_up.append(past - part.selector.tokens)
        catch_up(part, sequence, past, *args)

    monkeypatch.setattr(PartLayer, "_catch_up", counted)
    with open_store(where) as store:
        if damage == "deleted":
            assert store.delete(KEY)
        elif damage == "overwritten":
            store.put(KEY, torch.arange(1000, dtype=torch.uint8))
        kinds = {"selector": "lowrank"} if damage == "of another selector" else {}
        # One token is computed alone, so that groups are selected for it.
        with chat(store, model, longer[:, :-1], **kinds) as cache:
            assert cache.stats()["metadata_nbytes"] == 0
            found = told(model, cache, longer[:, :-1], max_new_tokens=3)
        assert found == told(model, DynamicCache(), longer[:, :-1], max_new_tokens=3)
    assert caught_up[:4] == [longer.shape[1] - 2] * 4
    assert not any(caught_up[4:])


def test_damaged_bytes_are_told_and_computed_anew(
    where: str, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    longer = begin(where, model, prompt(1, 130)["input_ids"])
    with open_store(where) as store:
        whole = store.get(KEY)
        whole[-1000:-900] ^= 255
        store.put(KEY, whole[:-64].clone())
        with caplog.at_level(logging.WARNING), chat(store, model, longer) as cache:
            assert told(model, cache, longer) == told(model, DynamicCache(), longer)
    assert "is computed anew" in caplog.text


def test_a_flush_stores_it_and_a_kill_loses_what_came_after(where: str, model: Any) -> None:
    text = prompt(1, 130)["input_ids"]
    store = open_store(where, capacity="64 MiB")
    cache = chat(store, model, text)
    with torch.no_grad():
        model(text, **{CACHE_ARGUMENT: cache})
        store.flush()
        first = store.get(KEY)
        model(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})
        store.flush()
    assert torch.equal(store.get(KEY), first)  # a token is not worth writing all of it again
    cache.close()
    assert len(store.get(KEY)) > len(first)
    store.close()


def test_what_lies_in_layers_is_refused_and_stays(where: str, model: Any) -> None:
    text = prompt(1, 130)["input_ids"]
    with open_store(where, capacity="64 MiB") as store:
        with OffloadedKVCache(store, model, name="chat", input_ids=text) as cache:
            told(model, cache, text)
        with pytest.raises(StoreMismatch, match="granularity 'head', of which no groups"):
            chat(store, model, text)
        with OffloadedKVCache(store, model, name="chat", input_ids=text) as cache:
            assert cache.saved_tokens == 129


def test_read_as_a_whole_by_the_other_cache(where: str, model: Any) -> None:
    longer = begin(where, model, prompt(1, 130)["input_ids"])
    with (
        open_store(where) as store,
        OffloadedKVCache(store, model, name="chat", input_ids=longer) as cache,
    ):
        assert cache.saved_tokens == longer.shape[1] - 2
        assert told(model, cache, longer) == told(model, DynamicCache(), longer)


def test_padded_rows(where: str, model: Any) -> None:
    inputs = prompt(2, 90)
    with open_store(where, capacity="64 MiB") as store:
        wanted = generate(model, DynamicCache(), inputs).sequences
        for saved in (0, 89):
            cache = SparseKVCache(store, model, name="padded", tokens=ALL, **inputs)
            assert cache.saved_tokens == saved
            assert torch.equal(generate(model, cache, inputs).sequences, wanted)
            cache.close()
