"""Caches with a name: taken up by who brings the same model and text, and by nobody else."""

from __future__ import annotations

import copy
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from integrations.transformers.models import (
    PAD,
    feed,
    generate,
    model_of,
    prompt,
    random_kv,
)
from spdk_kv.errors import ClosedError, NameInUse, ShapeMismatch, StoreMismatch
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.integrations.transformers.note import decode
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store


@pytest.fixture
def where(tmp_path: Path) -> str:
    return f"file://{tmp_path}/kv"


@pytest.fixture
def model() -> Any:
    return model_of("llama")


def ids(tokens: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    return prompt(batch, tokens, seed)["input_ids"]


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def wanted(model: Any, text: torch.Tensor, **options: Any) -> list[list[int]]:
    return told(model, DynamicCache(config=model.config), text, **options)


def told(model: Any, cache: Any, text: torch.Tensor, **options: Any) -> list[list[int]]:
    # Without the mask, generate would take a PAD in the text for padding.
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    with torch.no_grad():
        model(ids(1))  # dynamic RoPE remembers the longest text until a short one comes
    return generate(model, cache, inputs, **options).sequences.tolist()


def run(
    where: str, model: Any, text: torch.Tensor, name: str = "chat", **arguments: Any
) -> tuple[int, int]:
    """Goes on from what is stored, and checks the tokens. Returns how many were there, and how
    many are noted now."""
    with open_store(where, capacity="64 MiB") as store:
        with OffloadedKVCache(store, model, name=name, input_ids=text, **arguments) as cache:
            assert cache.get_seq_length() == cache.saved_tokens
            assert told(model, cache, text) == wanted(model, text)
            saved = cache.saved_tokens
        return saved, known(store, name)


def note_of(store: KVStore, name: str) -> bytes:
    return store.sequence(name).note


def known(store: KVStore, name: str = "chat") -> int:
    note = decode(note_of(store, name))
    assert note is not None
    return len(note.ids)


# -- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_goes_on_from_the_longest_common_beginning(where: str, family: str) -> None:
    model, text = model_of(family), ids(100)
    assert run(where, model, text) == (0, 111)
    assert run(where, model, text) == (99, 111), "the same script again: one token is computed"
    assert run(where, model, joined(text, ids(30, 2))) == (100, 141)
    assert run(where, model, joined(text, ids(3, 2), ids(3, 3))) == (103, 117)
    assert run(where, model, text[:, :40]) == (39, 51)
    assert run(where, model, ids(60, 9)) == (0, 71), "nothing in common"
    assert run(where, model, ids(1, 9)) == (0, 12), "a single token is always computed"


def test_a_chat_goes_on_from_its_answer(where: str, model: Any) -> None:
    text = ids(50)
    for turn in range(3):
        saved, _ = run(where, model, text)
        assert saved == (0 if turn == 0 else text.shape[1] - 21)
        text = joined(torch.tensor(wanted(model, text)), ids(20, turn + 5))


def test_padded_rows_go_on_as_generate_pads_them(where: str, model: Any) -> None:
    inputs = prompt(3, 90)

    def run_padded(inputs: Any, tokens: int) -> int:
        with (
            open_store(where, capacity="64 MiB") as store,
            OffloadedKVCache(store, model, name="chat", **inputs) as cache,
        ):
            plain = generate(model, DynamicCache(config=model.config), inputs)
            assert generate(model, cache, inputs).sequences.tolist() == plain.sequences.tolist()
            assert known(store) == tokens
            return cache.saved_tokens

    assert run_padded(inputs, 101) == 0
    assert run_padded(inputs, 101) == 89
    longer = {
        "input_ids": joined(inputs["input_ids"], ids(9, 4, 3)),
        "attention_mask": joined(inputs["attention_mask"], torch.ones(3, 9, dtype=torch.int64)),
    }
    assert run_padded(longer, 110) == 90
    # Padded otherwise: the tokens are elsewhere, or other ones.
    other = {name: tensor.clone() for name, tensor in longer.items()}
    other["attention_mask"][2, :20] = 0
    other["input_ids"][2, :20] = PAD
    assert run_padded(other, 110) == 14
    with (
        open_store(where) as store,
        OffloadedKVCache(store, model, name="chat", input_ids=other["input_ids"]) as cache,
    ):
        assert cache.saved_tokens == 0, "without the mask the padding would be text"


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 5},
        {"prefill_chunk_size": 16},
    ],
    ids=str,
)
def test_what_is_noted_is_what_was_computed(where: str, model: Any, options: Any) -> None:
    text = joined(ids(30), ids(30))
    with open_store(where, capacity="64 MiB") as store:
        with OffloadedKVCache(store, model, name="chat", input_ids=text) as cache:
            torch.manual_seed(3)
            told(model, cache, text, **options)
            rows, tokens = cache._batch, cache.get_seq_length()
        note = decode(note_of(store, "chat"))
        assert note is not None
        assert note.ids.shape == (tokens, rows)
        full = torch.tensor(note.ids.T.astype("int64"))
        assert torch.equal(full[:, :60], text.expand(rows, -1))
        # The K/V there is that of the text there.
        judge = DynamicCache(config=model.config)
        with torch.no_grad():
            model(full, **{CACHE_ARGUMENT: judge})
        for layer in range(4):
            for found, right in zip(
                store.sequence("chat").read(layer),
                (judge.layers[layer].keys, judge.layers[layer].values),
                strict=True,
            ):
                torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
    longer = joined(full, ids(4, 8, rows))
    with (
        open_store(where) as store,
        OffloadedKVCache(store, model, name="chat", input_ids=longer) as cache,
    ):
        assert cache.saved_tokens == tokens
        assert told(model, cache, longer) == wanted(model, longer)


def test_a_crop_and_another_question_are_noted(store: KVStore, model: Any) -> None:
    text = ids(60)
    with OffloadedKVCache(store, model, name="chat", input_ids=text) as cache:
        told(model, cache, text)
        cache.crop(60 - cache.get_seq_length())
        assert known(store) == 60
        longer = joined(text, ids(5, 4))
        assert told(model, cache, longer) == wanted(model, longer)
        note = decode(note_of(store, "chat"))
        assert note is not None
        assert note.ids[:65, 0].tolist() == longer[0].tolist()
        cache.reset()
        assert told(model, cache, text) == wanted(model, text)
        assert known(store) == 71


# -- what is not known is not taken up -----------------------------------------------------------


def forward(model: Any, cache: Any, *args: Any, **given: Any) -> None:
    with torch.no_grad():
        model(*args, **given, **{CACHE_ARGUMENT: cache})


UNKNOWN: dict[str, Any] = {
    "inputs_embeds": lambda model, cache, text: forward(
        model, cache, inputs_embeds=model.model.embed_tokens(text)
    ),
    "a mask within the text": lambda model, cache, text: forward(
        model, cache, text, attention_mask=(torch.arange(text.shape[1]) != 3)[None].long()
    ),
    "a mask of one's own": lambda model, cache, text: forward(
        model, cache, text, attention_mask=torch.zeros(1, 1, text.shape[1], text.shape[1])
    ),
    "positions": lambda model, cache, text: forward(
        model, cache, text, position_ids=torch.arange(text.shape[1])[None] + 5
    ),
    "padding without positions": lambda model, cache, text: forward(
        model, cache, text, attention_mask=(torch.arange(text.shape[1]) > 3)[None].long()
    ),
    "an argument that nobody knows": lambda model, cache, text: forward(
        model, cache, text, of_tomorrow=torch.ones(1)
    ),
    "the inner model": lambda model, cache, text: forward(model.model, cache, text),
    "no model": lambda model, cache, text: feed([cache], text.shape[1]),
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_is_not_known_for_sure_is_computed_anew(where: str, model: Any, way: str) -> None:
    text = ids(40)
    longer = joined(text, ids(40, 2))
    with (
        open_store(where, capacity="64 MiB") as store,
        OffloadedKVCache(store, model, name="chat") as cache,
    ):
        UNKNOWN[way](model, cache, text)
        assert cache.get_seq_length() == 40
        assert known(store) == 0
        forward(model, cache, ids(5, 3))
        assert known(store) == 0, "what follows depends on it"
    assert run(where, model, longer)[0] == 0
    assert run(where, model, longer)[0] == 79


def test_unknown_tokens_behind_known_ones_leave_those(where: str, model: Any) -> None:
    text = ids(40)
    with (
        open_store(where, capacity="64 MiB") as store,
        OffloadedKVCache(store, model, name="chat", input_ids=text) as cache,
    ):
        forward(model, cache, text)
        forward(model, cache, inputs_embeds=model.model.embed_tokens(ids(9, 3)))
        forward(model, cache, ids(4, 6))
        assert cache.get_seq_length() == 53
        assert known(store) == 40
        cache.crop(-13)
        forward(model, cache, ids(4, 6))
        assert known(store) == 44, "known again from where it was cropped to"
    assert run(where, model, joined(text, ids(4, 6), ids(9)))[0] == 44


@pytest.mark.parametrize("given", ["positional", "explicit", "compiled", "wrapped"])
def test_tokens_are_seen_however_the_model_is_called(
    store: KVStore, model: Any, given: str
) -> None:
    text, called = ids(40), model
    if given == "compiled":
        called = torch.compile(model, backend="eager")
    if given == "wrapped":

        class Adapter(nn.Module):  # as peft's
            def __init__(self) -> None:
                super().__init__()
                self.base = model

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self.base(*args, **kwargs)

        called = Adapter()
    with OffloadedKVCache(store, called, name="chat") as cache:
        if given == "explicit":
            mask, positions = torch.ones_like(text), torch.arange(40)[None]
            forward(
                called, cache, input_ids=text, attention_mask=mask, position_ids=positions,
                use_cache=True, output_attentions=False, logits_to_keep=1,
            )  # fmt: skip
        else:
            forward(called, cache, text)
        forward(called, cache, ids(1, 3))
        assert known(store) == 41


def test_a_pass_that_failed_is_not_taken_for_the_next_one(store: KVStore, model: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("before the first layer")

    with OffloadedKVCache(store, model, name="chat") as cache:
        forward(model, cache, ids(40))
        hook = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="first layer"):
            forward(model, cache, ids(1, 4))
        hook.remove()
        feed([cache], 1)
        assert cache.get_seq_length() == 41
        assert known(store) == 40


def test_rope_that_depends_on_the_length_is_matched_below_its_limit(where: str) -> None:
    model = copy.deepcopy(model_of("llama"))
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model.config.max_position_embeddings = 100
    model = type(model)(model.config).eval()
    model.generation_config.eos_token_id = None
    text, room = ids(60), {"max_tokens": 300}
    assert run(where, model, text, **room) == (0, 71)
    assert run(where, model, joined(text, ids(9, 2)), **room) == (60, 80)
    longer = joined(text, ids(60, 2))
    assert run(where, model, longer, **room)[0] == 0, "K of the beginning is another"
    assert run(where, model, text, **room)[0] == 0, "that was computed in something longer"
    assert run(where, model, text, **room)[0] == 59


# -- the model -----------------------------------------------------------------------------------


def test_another_model_is_refused_with_what_differs(where: str, model: Any) -> None:
    text = ids(40)
    run(where, model, text)
    other = model_of("llama", torch.float32, "sdpa", 1)
    with open_store(where) as store:
        with pytest.raises(StoreMismatch, match=r"the weights are others.*store.sequence\('chat'"):
            OffloadedKVCache(store, other, name="chat", input_ids=text)
        with pytest.raises(StoreMismatch, match="tag was None, not 'mine'"):
            OffloadedKVCache(store, model, name="chat", input_ids=text, tag="mine")
        assert known(store) == 51, "nothing was changed"
        store.sequence("chat").delete()
    assert run(where, other, text)[0] == 0
    assert run(where, model_of("llama", torch.float32, "eager", 1), text)[0] == 39


def test_weights_changed_in_place_are_other_weights(where: str) -> None:
    model, text = copy.deepcopy(model_of("llama")), ids(40)
    run(where, model, text)
    model.model.layers[2].mlp.up_proj.weight.data *= 1.1
    with open_store(where) as store, pytest.raises(StoreMismatch, match="weights"):
        OffloadedKVCache(store, model, name="chat", input_ids=text)


@pytest.mark.parametrize("missing", ["model", "ids"])
def test_without_model_or_text_a_name_begins_anew_and_says_so(
    where: str, model: Any, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = ids(40)
    run(where, model, text)
    given = {"input_ids": text} if missing == "model" else {}
    with open_store(where) as store:
        source = model.config if missing == "model" else model
        with OffloadedKVCache(store, source, name="chat", **given) as cache:
            assert cache.get_seq_length() == cache.saved_tokens == 0
            assert "51 stored tokens are not taken up" in caplog.text
            assert "pass the model itself and input_ids=" in caplog.text
            assert known(store) == 51, "stored until the first tokens come"
            assert told(model, cache, text) == wanted(model, text)
            assert known(store) == (0 if missing == "model" else 51)
    assert run(where, model, text)[0] == (0 if missing == "model" else 39)


@pytest.mark.parametrize("note", [b"", b"\0" * 80, b"KVNOTE00 of an older release"])
def test_a_note_that_cannot_be_read_is_a_miss(
    where: str, model: Any, note: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    text = ids(40)
    run(where, model, text)
    with open_store(where) as store:
        store.sequence("chat").note = note
    with caplog.at_level(logging.WARNING):
        assert run(where, model, text)[0] == 0
    assert "begins anew" in caplog.text
    assert run(where, model, text)[0] == 39


def test_a_copied_or_saved_model_does_not_take_the_watch_along(
    store: KVStore, model: Any, tmp_path: Path
) -> None:
    with OffloadedKVCache(store, model, name="chat") as cache:
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        forward(twin, cache, ids(40))
        assert known(store) == 0
    for each in (model, twin):
        assert all("Hook" not in type(hook).__name__ for hook in each._forward_pre_hooks.values())


# -- one writer of a name ------------------------------------------------------------------------


def test_a_name_has_one_live_cache(store: KVStore, model: Any) -> None:
    text = ids(40)
    for source in (model, model.config):
        first = OffloadedKVCache(store, source, name="chat")
        with pytest.raises(NameInUse, match=f"'chat' is being written.*{id(first):#x}"):
            OffloadedKVCache(store, model, name="chat", input_ids=text)
        with OffloadedKVCache(store, model, name="other") as other:
            told(model, other, text)
        assert told(model, first, text) == wanted(model, text)
        first.close()
        with pytest.raises(ClosedError, match="was closed"):
            told(model, first, text)
        second = OffloadedKVCache(store, model, name="chat", input_ids=text)
        first.close()  # again: the name is the second one's
        with pytest.raises(NameInUse):
            OffloadedKVCache(store, model, name="chat", input_ids=text)
        del second
        gc.collect()
    hooks = len(model._forward_pre_hooks)
    third = OffloadedKVCache(store, model, name="chat", input_ids=text)
    assert third.saved_tokens in (0, 39)
    assert len(model._forward_pre_hooks) == hooks + 1
    del third
    gc.collect()
    assert len(model._forward_pre_hooks) == hooks


def test_names_of_different_stores_are_different(
    store: KVStore, tmp_path: Path, model: Any
) -> None:
    with open_store(f"file://{tmp_path}/other", capacity="64 MiB") as other:
        caches = [OffloadedKVCache(each, model, name="chat") for each in (store, other)]
        for cache in caches:
            assert told(model, cache, ids(40)) == wanted(model, ids(40))
            cache.close()


def test_many_caches_on_one_model_each_see_their_own(store: KVStore, model: Any) -> None:
    caches = [OffloadedKVCache(store, model, name=f"chat {n}", max_tokens=100) for n in range(8)]
    texts = [ids(20 + n, n) for n in range(8)]
    for cache, text in zip(caches, texts, strict=True):
        forward(model, cache, text)
    for cache in reversed(caches):
        forward(model, cache, ids(1, 5))
    for n, (cache, text) in enumerate(zip(caches, texts, strict=True)):
        note = decode(note_of(store, f"chat {n}"))
        assert note is not None
        assert note.ids[:, 0].tolist() == joined(text, ids(1, 5))[0].tolist()
        cache.close()


# -- arguments -----------------------------------------------------------------------------------


def test_bad_arguments(store: KVStore, model: Any) -> None:
    with pytest.raises(ValueError, match="with a name="):
        OffloadedKVCache(store, model, input_ids=ids(4))
    for wrong in ([1, 2], torch.zeros(1, 3), torch.zeros(1, 0, dtype=torch.int64)):
        with pytest.raises(ShapeMismatch, match="input_ids"):
            OffloadedKVCache(store, model, name="chat", input_ids=wrong)
    with pytest.raises(ShapeMismatch, match="attention_mask"):
        OffloadedKVCache(
            store, model, name="chat", input_ids=ids(4), attention_mask=torch.ones(1, 3)
        )
    one_row = ids(4)[0]
    with OffloadedKVCache(store, model, name="chat", input_ids=one_row) as cache:
        assert told(model, cache, one_row[None]) == wanted(model, one_row[None])


def test_a_batch_that_cannot_change_keeps_its_text(store: KVStore, model: Any) -> None:
    with OffloadedKVCache(store, model, name="chat", max_tokens=100) as cache:
        forward(model, cache, ids(40))
        with pytest.raises(ShapeMismatch, match="without name="):
            cache.batch_repeat_interleave(2)
        assert known(store) == 40
        cache.update(*random_kv(1, 1), 0)
        assert known(store) == 40
