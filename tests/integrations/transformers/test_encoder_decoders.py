"""Encoder-decoders: their decoder's self-attention is offloaded, with DynamicCache's tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from integrations.transformers.families.decode import inputs_of, tiny_model
from integrations.transformers.models import generate, read_nbytes
from spdk_kv.errors import ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers import (
    CACHE_ARGUMENT,
    OffloadedEncoderDecoderCache,
    OffloadedKVCache,
)
from spdk_kv.store import KVStore

FAMILIES = ["t5", "bart", "whisper", "t5gemma2"]


@cache
def model_of(family: str, seed: int = 0) -> Any:
    return tiny_model(family, seed)


def plain(config: Any) -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache())


def wrapped(store: KVStore, config: Any, **options: Any) -> EncoderDecoderCache:
    return EncoderDecoderCache(OffloadedKVCache(store, config, **options), DynamicCache())


def told_by(family: str, kv: Any, **options: Any) -> tuple[list[Any], list[torch.Tensor]]:
    model = model_of(family)
    torch.manual_seed(5)
    out = generate(model, kv, inputs_of(model), **options)
    return out.sequences.tolist(), list(out.logits)


@pytest.mark.parametrize("make", [wrapped, OffloadedEncoderDecoderCache])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(store: KVStore, family: str, make: Callable[..., Any]) -> None:
    config, before = model_of(family).config, read_nbytes(store)
    wanted = told_by(family, plain(config), max_new_tokens=60)
    # Rows of one head are so short that 60 tokens fill no chunk.
    found = told_by(family, make(store, config, granularity="layer"), max_new_tokens=60)
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert torch.equal(ours, theirs)
    if family != "t5gemma2":  # whose windows are in memory
        assert read_nbytes(store) > before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5}],
    ids=["beams", "samples"],
)
def test_beams_and_samples(store: KVStore, family: str, options: dict[str, Any]) -> None:
    config = model_of(family).config
    wanted = told_by(family, plain(config), **options)
    with OffloadedEncoderDecoderCache(store, config, resident_layers=3) as kv:
        found = told_by(family, kv, **options)
        assert kv.stats()["kept_layers"] == 1
    assert found[0] == wanted[0]
    assert store.sequences() == []


def test_assisted_decoding_crops_it(store: KVStore) -> None:
    model, told = model_of("bart"), []
    inputs = {name: tensor[:1] for name, tensor in inputs_of(model).items()}
    for kv in (plain(model.config), OffloadedEncoderDecoderCache(store, model.config)):
        options = {"assistant_model": model_of("bart", 1), "max_new_tokens": 24}
        told.append(generate(model, kv, inputs, **options).sequences.tolist())
    assert told[0] == told[1]


def test_rows_are_chosen_in_both(store: KVStore) -> None:
    model, told = model_of("bart"), []
    for kv in (plain(model.config), OffloadedEncoderDecoderCache(store, model.config)):
        generate(model, kv, inputs_of(model))
        kv.batch_repeat_interleave(2)
        kv.batch_select_indices(torch.tensor([3, 1, 0]))
        with torch.no_grad():
            out = model(
                encoder_outputs=(torch.zeros(3, 13, 64),),
                decoder_input_ids=torch.tensor([[5]] * 3),
                **{CACHE_ARGUMENT: kv},
            )
        told.append(out.logits)
    assert torch.equal(*told)


def test_second_generation_after_reset(store: KVStore) -> None:
    model = model_of("t5")
    kv = OffloadedEncoderDecoderCache(store, model.config)
    first = generate(model, kv, inputs_of(model)).sequences
    kv.reset()
    assert kv.get_seq_length() == 0
    assert torch.equal(generate(model, kv, inputs_of(model)).sequences, first)
    kv.close()
    kv.close()


def test_bare_cache_says_what_to_take(store: KVStore) -> None:
    model = model_of("t5")
    with pytest.raises(SpdkKvError, match="OffloadedEncoderDecoderCache"):
        generate(model, OffloadedKVCache(store, model.config), inputs_of(model))
    with pytest.raises(ValueError, match="without name="):
        OffloadedEncoderDecoderCache(store, model.config, name="chat")


def test_refused_when_it_is_made(store: KVStore) -> None:
    with pytest.raises(ShapeMismatch, match="mllama mixes"):
        OffloadedEncoderDecoderCache(store, CONFIG_MAPPING["mllama"]())
