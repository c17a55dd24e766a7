"""OffloadedKVCache that lasts, and what it says when something is wrong."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from integrations.transformers.models import (
    assert_same,
    config_of,
    feed,
    generate,
    leased_nbytes,
    model_of,
    prompt,
    random_kv,
)
from spdk_kv.errors import CapacityError, CorruptionError, ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store

# -- lasting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_named_cache_is_taken_up_by_another_store(tmp_path: Path, family: str) -> None:
    model, inputs = model_of(family), prompt(2, 130)
    wanted = generate(model, DynamicCache(config=model.config), inputs, max_new_tokens=30)
    where = f"file://{tmp_path}/kv"
    with (
        open_store(where, capacity="64 MiB") as store,
        OffloadedKVCache(store, model, name="chat", resident_layers=3) as cache,
    ):
        generate(model, cache, inputs, max_new_tokens=15)
    begun = wanted.sequences[:, : 130 + 15]
    mask = torch.ones_like(begun)
    mask[:, :130] = inputs["attention_mask"]
    inputs = {"input_ids": begun, "attention_mask": mask}
    with open_store(where) as store:
        assert store.sequences() == ["chat"]
        with OffloadedKVCache(store, model, name="chat", **inputs) as cache:
            assert cache.get_seq_length() == 130 + 14
            found = generate(model, cache, inputs, max_new_tokens=15)
            assert cache.stats()["read_nbytes"] > 0
        assert leased_nbytes(store, 4 * 2 * (16 << 10)) <= 4 * 2 * (16 << 10)
    assert found.sequences.tolist() == wanted.sequences.tolist()


def test_record_made_between_two_layers_is_brought_into_step(tmp_path: Path) -> None:
    where, model, text = f"file://{tmp_path}/kv", model_of("llama"), prompt(1, 90)["input_ids"]
    with open_store(where, capacity="64 MiB") as store:
        cache = OffloadedKVCache(store, model, name="chat", max_tokens=200)
        with torch.no_grad():
            model(text, **{CACHE_ARGUMENT: cache})
        cache.update(*random_kv(1, 3), 0)
        cache.close()
    longer = torch.cat([text, text], dim=1)
    with open_store(where) as store:
        cache = OffloadedKVCache(store, model, name="chat", input_ids=longer)
        assert cache.sequence is not None
        assert [cache.sequence.tokens(layer) for layer in range(4)] == [90] * 4
        feed([cache], 1)


def test_named_cache_refuses_another_shape(store: KVStore) -> None:
    model, text = model_of("llama"), prompt(1, 50)["input_ids"]
    with OffloadedKVCache(store, model, name="chat", max_tokens=100) as cache, torch.no_grad():
        model(text, **{CACHE_ARGUMENT: cache})
    with pytest.raises(ShapeMismatch, match="made for 100 tokens, not 500"):
        OffloadedKVCache(store, model, name="chat", max_tokens=500, input_ids=text)
    # Nothing is taken up, so any shape will do.
    with OffloadedKVCache(store, model.config, name="chat", max_tokens=500) as cache:
        feed([cache], 120, batch=2)


# -- trouble -------------------------------------------------------------------------------------


def test_too_many_tokens_change_nothing_and_say_what_to_do(store: KVStore) -> None:
    cache = OffloadedKVCache(store, config_of("llama"), max_tokens=100)
    feed([cache], 90)
    with pytest.raises(CapacityError, match="max_tokens=111 or more"):
        feed([cache], 21)
    assert cache.get_seq_length() == 90
    feed([cache], 10)


def test_store_too_small_says_what_to_do(tmp_path: Path) -> None:
    with open_store(f"file://{tmp_path}/kv", capacity="1 MiB") as store:
        cache = OffloadedKVCache(store, config_of("llama"), max_tokens=2000)
        with pytest.raises(CapacityError, match="smaller max_tokens="):
            feed([cache], 10)
        # By default it takes no more than it needs.
        small = OffloadedKVCache(store, config_of("llama"))
        feed([small], 10)
        assert small.sequence is not None
        assert small.sequence.shape.max_tokens is None
        assert store.stats()["used_nbytes"] == 4 * 2 * 2 * 16384  # a chunk of each head


def test_half_finished_forward_pass_is_noticed_and_mended_by_crop(store: KVStore) -> None:
    ours, theirs = (
        OffloadedKVCache(store, config_of("llama"), max_tokens=300),
        DynamicCache(config=config_of("llama")),
    )
    feed([ours, theirs], 80)
    ours.update(*random_kv(1, 1), 0)
    ours.update(*random_kv(1, 1), 1)
    with pytest.raises(SpdkKvError, match=r"ended half-way; crop\(0\)"):
        feed([ours], 1)
    ours.crop(0)
    feed([ours, theirs], 1)


def test_damaged_bytes_are_an_error_and_not_other_tokens(tmp_path: Path) -> None:
    model = model_of("llama")
    with open_store(f"file://{tmp_path}/kv", capacity="64 MiB") as store:
        cache = OffloadedKVCache(store, model.config)
        told = generate(model, cache, prompt(1, 100)).sequences
        for number in range(4):
            assert cache.sequence is not None
            cache.sequence.settle(number)
        data = max((tmp_path / "kv").rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        used = [at for at in range(0, len(content), 4096) if any(content[at : at + 64])]
        for at in used:
            content[at + 7] ^= 1
        with data.open("r+b") as file:
            for at in used:
                file.seek(at)
                file.write(content[at : at + 64])
        cache.crop(0)
        # Two tokens more: the first layer was read ahead before the damage.
        with pytest.raises(CorruptionError):
            generate(model, cache, {"input_ids": told}, max_new_tokens=3)
        cache.close()


def test_gradients_are_refused(store: KVStore) -> None:
    model = model_of("llama")
    with pytest.raises(SpdkKvError, match="no_grad"):
        model(**prompt(1, 8), **{CACHE_ARGUMENT: OffloadedKVCache(store, model.config)})


def test_begun_in_inference_mode_and_continued_without(store: KVStore) -> None:
    model, inputs = model_of("llama"), prompt(1, 33)
    cache = OffloadedKVCache(store, model.config)
    with torch.inference_mode():
        model(**inputs, **{CACHE_ARGUMENT: cache})
    with torch.no_grad():
        for _ in range(40):
            model(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 73


@pytest.mark.parametrize(
    ("model_type", "complaint"),
    [
        ("mamba", "no layers with a KV cache"),
        ("mllama", "mixes the K/V of images"),
        ("rwkv", "a cache of its own"),
        ("reformer", "a cache of its own"),
        ("xlnet", "a cache of its own"),
        ("recurrent_gemma", "in the model itself"),
        ("blt", "not a configuration for which transformers makes a DynamicCache"),
        ("pi0", "not a configuration for which transformers makes a DynamicCache"),
        ("deepseek_v4", "not a configuration for which|cached as"),
    ],
)
def test_models_without_anything_to_offload_are_refused_when_the_cache_is_made(
    store: KVStore, model_type: str, complaint: str
) -> None:
    with pytest.raises(ShapeMismatch, match=complaint):
        OffloadedKVCache(store, AutoConfig.for_model(model_type))


def test_neither_copied_nor_pickled(store: KVStore) -> None:
    cache = OffloadedKVCache(store, config_of("llama"), max_tokens=100)
    feed([cache], 4)
    with pytest.raises(TypeError, match=r"not copied by copy\.copy: .*make another"):
        copy.copy(cache)
    for write in (pickle.dumps, lambda what: torch.save(what, io.BytesIO())):
        with pytest.raises(TypeError, match=r"pickle or torch\.save: make it with name="):
            write(cache)
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            take(cache.layers[0])


def test_layers_give_out_what_attention_sees(store: KVStore) -> None:
    """As generate of Whisper takes it from them."""
    theirs, ours = DynamicCache(config=config_of()), OffloadedKVCache(store, config_of())
    assert ours.layers[0].keys is ours.layers[0].values is None
    feed([theirs, ours], 70)
    for layer, wanted in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(layer.keys, wanted.keys)
        assert torch.equal(layer.values, wanted.values)
    feed([theirs, ours], 1)


def test_bad_arguments(store: KVStore) -> None:
    config = config_of("llama")
    with pytest.raises(ValueError, match="resident_layers is 1 or more"):
        OffloadedKVCache(store, config, resident_layers=0)
    with pytest.raises(ValueError, match="max_tokens is 1 or more"):
        OffloadedKVCache(store, config, max_tokens=0)
    cache = OffloadedKVCache(store, config, max_tokens=100)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)
    with pytest.raises(SpdkKvError, match="change together"):
        cache.layers[0].crop(-1)
    feed([cache], 4)
    with pytest.raises(ShapeMismatch, match="the sequence holds float32"):
        cache.update(*random_kv(1, 1, torch.float16), 0)
    with pytest.raises(ShapeMismatch, match="differ in width only"):
        OffloadedKVCache(store, config).update(random_kv(1, 1)[0], torch.zeros(1, 1, 1, 64), 0)


def test_two_caches_at_once_do_not_disturb_each_other(store: KVStore) -> None:
    model = model_of("llama")
    with OffloadedKVCache(store, model.config) as other:
        generate(model, other, prompt(2, 60))
        assert_same(store, model, prompt(1, 90))
        assert other.get_seq_length() == 60 + 11
