"""What OffloadedKVCache promises beside equal tokens: changes as in DynamicCache, and memory."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.models import (
    WINDOW,
    config_of,
    feed,
    generate,
    leased_nbytes,
    model_of,
    prompt,
    random_kv,
)
from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.transformers import OffloadedKVCache
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from support.waiting import PATIENCE_S

# -- the same answers as DynamicCache, whatever is done to it ------------------------------------


@pytest.mark.parametrize("resident", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_random_changes_give_what_dynamic_cache_gives(
    store: KVStore, seed: int, resident: int
) -> None:
    rng, batch = random.Random(seed), 2
    torch.manual_seed(seed)
    theirs = DynamicCache(config=config_of())
    theirs.activate_past_recording()
    ours = OffloadedKVCache(store, config_of(), max_tokens=1000, resident_layers=resident)
    for _ in range(25):
        feed([theirs, ours], rng.choice([1, 1, 1, 2, 5, 70]), batch)
        action = rng.randrange(6)
        if action == 0:
            count = -min(rng.choice([0, 1, 3, 60]), theirs.get_seq_length())
            theirs.crop(count)
            ours.crop(count)
        elif action == 1:
            rows = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            theirs.reorder_cache(rows)
            ours.reorder_cache(rows)
        elif action == 2 and rng.random() < 0.5:
            repeats = 2 if batch < 4 else 1
            theirs.batch_repeat_interleave(repeats)
            ours.batch_repeat_interleave(repeats)
            batch *= repeats
        elif action == 3 and batch > 2:
            rows = torch.tensor(rng.sample(range(batch), batch - 1))
            theirs.batch_select_indices(rows)
            ours.batch_select_indices(rows)
            batch -= 1
        elif action == 4 and rng.random() < 0.2:
            theirs.reset()
            ours.reset()
            theirs.activate_past_recording()
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.stats()["resident_layers_peak"] <= resident
    ours.close()


def test_layers_look_to_transformers_as_they_do_in_dynamic_cache(store: KVStore) -> None:
    theirs, ours = DynamicCache(config=config_of()), OffloadedKVCache(store, config_of())
    assert ours.is_sliding == theirs.is_sliding == [True, False, True, False]
    assert ours.is_compileable is theirs.is_compileable is False
    assert [ours.get_max_length(n) for n in range(4)] == [WINDOW, -1, WINDOW, -1]
    assert len(ours) == 4
    assert ours.get_seq_length() == 0


def test_crop_past_the_window_and_generate_again(store: KVStore) -> None:
    # DynamicCache cannot: it dropped what left the window. So the judge is a fresh generation.
    model, inputs = model_of("mistral"), prompt(1, 120)
    wanted = generate(model, DynamicCache(config=model.config), inputs, max_new_tokens=20)
    with OffloadedKVCache(store, model.config) as cache:
        generate(model, cache, inputs, max_new_tokens=20)
        cache.crop(-(cache.get_seq_length() - 60))
        again = generate(model, cache, inputs, max_new_tokens=20)
    assert again.sequences.tolist() == wanted.sequences.tolist()


def test_second_turn_continues_from_the_cache(store: KVStore) -> None:
    model = model_of("gemma3")
    told = []
    for cache in (DynamicCache(config=model.config), OffloadedKVCache(store, model.config)):
        first = generate(model, cache, prompt(1, 80)).sequences
        turn = torch.cat([first, prompt(1, 50, seed=9)["input_ids"]], dim=1)
        told.append(generate(model, cache, {"input_ids": turn}).sequences.tolist())
    assert told[0] == told[1]


def test_reset_makes_batch_and_dtype_free_again(store: KVStore) -> None:
    cache = OffloadedKVCache(store, config_of("llama"))
    for dtype, batch in ((torch.float32, 1), (torch.bfloat16, 3)):
        model, inputs = model_of("llama", dtype), prompt(batch, 90)
        wanted = generate(model, DynamicCache(config=model.config), inputs)
        found = generate(model, cache, inputs)
        assert found.sequences.tolist() == wanted.sequences.tolist()
        cache.reset()
        assert cache.get_seq_length() == 0
    assert store.sequences() == []


def test_mask_selects_rows(store: KVStore) -> None:
    cache = OffloadedKVCache(store, config_of("llama"), max_tokens=200)
    k, v = random_kv(3, 70)
    for layer in range(4):
        cache.update(k, v, layer)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    new = random_kv(2, 1)
    keys, _ = cache.update(*new, 0)
    assert torch.equal(keys, torch.cat([k[[0, 2]], new[0]], dim=2))


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_leases_never_hold_more_layers_than_stated(store: KVStore, resident: int) -> None:
    """Measured by the staging pool, not by the cache's own count."""
    model, inputs = model_of("llama"), prompt(2, 1000)
    cache = OffloadedKVCache(store, model.config, resident_layers=resident)
    held: list[int] = []

    def look(*_: object, **__: object) -> None:
        held.append(store.staging.stats()["leased_nbytes"])

    hooks = [layer.self_attn.o_proj.register_forward_hook(look) for layer in model.model.layers]
    generate(model, cache, inputs, max_new_tokens=8)
    for hook in hooks:
        hook.remove()
    layer_nbytes = 2 * 1008 * 2 * 2 * 64 * 4
    unfinished_nbytes = 4 * 2 * 2 * (16 << 10)  # of each of two heads
    # Kept layers live outside the pool; those lent or on their way live in it.
    in_pool = min(resident, 2)
    slack = unfinished_nbytes + in_pool * 2 * 4 * (16 << 10)
    assert max(held) <= in_pool * layer_nbytes + slack
    assert max(held) > (in_pool - 0.5) * layer_nbytes
    assert cache.stats()["resident_layers_peak"] == resident
    cache.close()
    assert leased_nbytes(store) == 0


def test_layer_that_the_caller_holds_on_to_is_counted(store: KVStore) -> None:
    cache = OffloadedKVCache(store, config_of("llama"), max_tokens=100)
    held = [cache.update(*random_kv(1, 10), layer) for layer in range(4)]
    assert cache.stats()["resident_layers"] == 4
    del held
    assert cache.stats()["resident_layers"] <= 2


def test_memory_is_that_of_the_stated_layers(store: KVStore) -> None:
    tensors = _kv_nbytes_alive()
    model = model_of("llama")
    cache = OffloadedKVCache(store, model.config, resident_layers=3)
    generate(model, cache, prompt(1, 500))
    layer_nbytes = 2 * 512 * 2 * 64 * 4
    assert _kv_nbytes_alive() - tensors <= 2 * layer_nbytes
    cache.close()


def _kv_nbytes_alive() -> int:
    gc.collect()
    # By type: isinstance() would wake torch's lazy attributes, which warn.
    tensors = [tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for tensor in tensors
        if tensor.dim() == 4 and tensor.shape[-1] == 64
    }
    return sum(storages.values())


def test_close_and_the_last_reference_delete_a_temporary_cache(store: KVStore) -> None:
    for way in ("close", "del"):
        cache = OffloadedKVCache(store, config_of("llama"), max_tokens=100)
        feed([cache], 50)
        assert len(store.sequences()) == 1
        if way == "close":
            cache.close()
            cache.close()
        else:
            del cache
        deadline = time.monotonic() + PATIENCE_S
        while store.sequences() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.sequences() == []


def test_cache_may_outlive_its_store(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/kv", capacity="64 MiB")
    cache = OffloadedKVCache(store, config_of("llama"), max_tokens=100)
    feed([cache], 50)
    store.close()
    with pytest.raises(SpdkKvError):
        feed([cache], 1)
    cache.close()
