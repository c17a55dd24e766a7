"""Models with layers that keep states and no K/V: those stay in memory, attention is offloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.families.decode import tiny_model
from integrations.transformers.models import assert_same, generate, prompt
from spdk_kv.errors import CapacityError, SpdkKvError
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.store import KVStore

# Recurrence, several states per layer, convolution alone, both kinds in one layer, an indexer.
STATES = ["qwen3_next", "granitemoehybrid", "olmo_hybrid", "lfm2_moe", "falcon_h1"]
FAMILIES = [*STATES, "gemma3n_text", "qwen4_exp_text", "qwen3_5_text", "nemotron_h", "zamba2"]
DTYPES = [torch.bfloat16, torch.float32]
CROPPABLE = ["lfm2_moe", "gemma3n_text"]


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return tiny_model(family, seed).to(dtype)


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, DTYPES[n % 2]) for n, family in enumerate(FAMILIES)], ids=str
)
def test_greedy(store: KVStore, family: str, dtype: torch.dtype) -> None:
    assert_same(store, model_of(family, dtype), prompt(3, 100), resident_layers=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search(store: KVStore, family: str) -> None:
    assert_same(store, model_of(family), prompt(2, 70), options={"num_beams": 3})


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_sampling_with_a_seed(store: KVStore, family: str) -> None:
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
    assert_same(store, model_of(family), prompt(2, 60), options=options)


@pytest.mark.parametrize("family", FAMILIES[1::2])
def test_chunked_prefill(store: KVStore, family: str) -> None:
    assert_same(store, model_of(family), prompt(1, 150), options={"prefill_chunk_size": 64})


@pytest.mark.parametrize("family", CROPPABLE)
def test_assisted_decoding(store: KVStore, family: str) -> None:
    for seed in (0, 1):
        options = {"assistant_model": model_of(family, seed=seed), "max_new_tokens": 30}
        assert_same(store, model_of(family), prompt(1, 60), options=options)


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_second_turn_and_another_batch_after_reset(store: KVStore, family: str) -> None:
    model, told = model_of(family), []
    for kv in (DynamicCache(config=model.config), OffloadedKVCache(store, model.config)):
        first = generate(model, kv, prompt(1, 40)).sequences
        turn = torch.cat([first, prompt(1, 9, seed=9)["input_ids"]], dim=1)
        told.append(generate(model, kv, {"input_ids": turn}).sequences.tolist())
    assert told[0] == told[1]
    wanted = generate(model, DynamicCache(config=model.config), prompt(3, 30))
    kv.reset()
    assert kv.get_seq_length() == 0
    assert generate(model, kv, prompt(3, 30)).sequences.tolist() == wanted.sequences.tolist()


@pytest.mark.parametrize("family", FAMILIES[1::2])
def test_rows_are_chosen_in_states_as_well(store: KVStore, family: str) -> None:
    """DynamicCache cannot: the judge is a prompt of the chosen rows."""
    model, inputs = model_of(family), {"input_ids": prompt(1, 30)["input_ids"].repeat(3, 1)}
    inputs["input_ids"][1, 5:] += 1
    inputs["input_ids"][2, 7:] -= 1
    kv = OffloadedKVCache(store, model.config, max_tokens=200)
    generate(model, kv, inputs, max_new_tokens=2)
    for rows in ([2, 0], [2, 2, 0, 0]):
        if len(rows) == 2:
            kv.batch_select_indices(torch.tensor(rows))
        else:
            kv.batch_repeat_interleave(2)
        told = _next_logits(model, kv)
        fresh = OffloadedKVCache(store, model.config, max_tokens=200)
        generate(model, fresh, {"input_ids": inputs["input_ids"][rows]}, max_new_tokens=2)
        for _ in range(len(rows) // 2):
            wanted = _next_logits(model, fresh)
        assert torch.allclose(told, wanted, atol=1e-4)


def _next_logits(model: Any, kv: Any) -> torch.Tensor:
    token = torch.full((kv.sequence.shape.batch, 1), 7)
    with torch.no_grad():
        logits: torch.Tensor = model(token, **{CACHE_ARGUMENT: kv}).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_look_to_transformers_as_they_do_in_dynamic_cache(
    store: KVStore, family: str
) -> None:
    config = model_of(family).config
    theirs, ours = DynamicCache(config=config), OffloadedKVCache(store, config)
    for kv in (theirs, ours):
        kv.activate_past_recording()
    for what in ("is_sliding", "is_linear", "is_dummy", "is_croppable", "is_initialized"):
        assert getattr(ours, what) == getattr(theirs, what), what
    numbers = range(len(theirs))
    for what in ("get_max_length", "is_recording_past"):
        ask = [[getattr(kv, what)(number) for number in numbers] for kv in (ours, theirs)]
        if what == "get_max_length":
            assert ask[0] == ask[1]
    assert len(ours) == len(theirs)
    for kv in (ours, theirs):
        generate(model_of(family), kv, prompt(1, 10), max_new_tokens=3)
    assert ours.is_initialized == theirs.is_initialized
    assert ours.is_croppable == theirs.is_croppable
    assert ours.get_seq_length() == theirs.get_seq_length() == 12


# -- what states cannot do -----------------------------------------------------------------------


def test_recurrent_states_do_not_go_back_but_to_the_beginning(store: KVStore) -> None:
    model = model_of("qwen3_next")
    kv = OffloadedKVCache(store, model.config)
    kv.activate_past_recording()
    wanted = generate(model, kv, prompt(1, 30)).sequences.tolist()
    with pytest.raises(SpdkKvError, match=r"recurrent states.*reset\(\)"):
        kv.crop(-3)
    assert kv.get_seq_length() == 41
    kv.crop(0)
    kv.crop(-41)
    assert kv.get_seq_length() == 0
    assert generate(model, kv, prompt(1, 30)).sequences.tolist() == wanted


def test_convolution_goes_back_as_far_as_it_was_recorded(store: KVStore) -> None:
    model = model_of("lfm2_moe")
    kv = OffloadedKVCache(store, model.config)
    ids = prompt(1, 40)["input_ids"]
    with torch.no_grad():
        model(ids[:, :30], **{CACHE_ARGUMENT: kv})
        with pytest.raises(SpdkKvError, match=r"activate_past_recording\(\) before"):
            kv.crop(-3)
        kv.activate_past_recording()
        kv.crop(0)
        model(ids[:, 30:], **{CACHE_ARGUMENT: kv})
        with pytest.raises(SpdkKvError, match="reach back no further"):
            kv.crop(-14)
        kv.crop(-4)
        found = model(ids[:, 36:], **{CACHE_ARGUMENT: kv}).logits
        theirs = DynamicCache(config=model.config)
        theirs.activate_past_recording()
        model(ids[:, :30], **{CACHE_ARGUMENT: theirs})
        theirs.crop(0)
        model(ids[:, 30:], **{CACHE_ARGUMENT: theirs})
        theirs.crop(-4)
        wanted = model(ids[:, 36:], **{CACHE_ARGUMENT: theirs}).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", STATES)
@pytest.mark.parametrize("after", [0, 2])
def test_pass_that_ended_half_way_is_noticed(store: KVStore, family: str, after: int) -> None:
    model = model_of(family)
    kv = OffloadedKVCache(store, model.config)
    generate(model, kv, prompt(1, 30), max_new_tokens=2)
    layers = next(part.layers for part in model.modules() if hasattr(part, "layers"))
    hook = layers[after].register_forward_hook(_interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[5]]), **{CACHE_ARGUMENT: kv})
    hook.remove()
    for call in (lambda: _next_logits(model, kv), lambda: kv.crop(0)):
        with pytest.raises(SpdkKvError, match=r"half-way.*reset\(\)"):
            call()
    kv.reset()
    generate(model, kv, prompt(2, 30), max_new_tokens=2)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_too_many_tokens_are_noticed_afterwards_too(store: KVStore) -> None:
    model = model_of("qwen3_next")
    kv = OffloadedKVCache(store, model.config, max_tokens=20)
    with pytest.raises(CapacityError, match="room for 20 tokens"):
        generate(model, kv, prompt(1, 19))
    with pytest.raises(SpdkKvError, match="half-way"):
        _next_logits(model, kv)


def test_look_at_a_state_between_two_passes_is_none(store: KVStore) -> None:
    model = model_of("granitemoehybrid")
    kv = OffloadedKVCache(store, model.config)
    generate(model, kv, prompt(1, 30), max_new_tokens=2)
    assert kv.get_conv_state(2) is not None
    assert kv.get_recurrent_state(2) is not None
    assert kv.has_previous_state()
    _next_logits(model, kv)
