"""What a SparseKVCache refuses, and what it does when a drive or a number goes wrong."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.families.decode import tiny_model
from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import model_of
from spdk_kv.errors import CapacityError, CorruptionError, DeviceTimeout, ShapeMismatch
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.sequence import GroupReading
from spdk_kv.sparse import Settings, preset
from spdk_kv.store import EngineOptions, KVStore
from spdk_kv.store import open as open_store


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "no attention of it has a layer_idx, and a q_proj or qkv_proj"),
        ("bloom", "no attention of it has a layer_idx, and a q_proj or qkv_proj"),
        ("opt", "layer 0 does more than a norm before its attention"),
        ("t5", "it is an encoder-decoder"),
        ("qwen3_next", "layer 3 makes its query in a way that is not known here"),
    ],
)
def test_models_that_are_built_otherwise_are_refused(
    store: KVStore, family: str, reason: str
) -> None:
    with pytest.raises(ShapeMismatch, match=f"{reason}; an OffloadedKVCache reads all of it"):
        SparseKVCache(store, tiny_model(family))


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules())


def test_a_refused_model_is_as_it_was(store: KVStore) -> None:
    # Another test's cache may wait for the garbage collector, and its hooks be copied, as nothing.
    model = copy.deepcopy(tiny_model("opt"))
    before = hooks_of(model)
    implementation = model.config._attn_implementation
    with pytest.raises(ShapeMismatch):
        SparseKVCache(store, model)
    assert model.config._attn_implementation == implementation
    assert hooks_of(model) == before


def test_hooks_go_with_the_cache(store: KVStore) -> None:
    model = copy.deepcopy(model_of("Llama"))
    before = hooks_of(model)
    cache = SparseKVCache(store, model)
    assert hooks_of(model) > before
    copy.deepcopy(model)(torch.tensor([[5]]))
    del cache
    assert hooks_of(model) == before


def test_bad_arguments(store: KVStore) -> None:
    model = model_of("Llama")
    with pytest.raises(ShapeMismatch, match="the model itself"):
        SparseKVCache(store, model.config)
    with pytest.raises(ValueError, match="tokens is a multiple of group_tokens"):
        SparseKVCache(store, model, tokens=30)
    with pytest.raises(ValueError, match="selector is one of"):
        SparseKVCache(store, model, selector="best")
    with pytest.raises(ValueError, match="for the selector 'codes', not 'kvswap'"):
        SparseKVCache(store, model, selector="kvswap", settings=Settings())
    with pytest.raises(ValueError, match="leave granularity= out"):
        SparseKVCache(store, model, granularity="layer")
    settings = SparseKVCache(store, model, selector="kvswap", tokens=32).settings
    assert settings == preset("kvswap", tokens=32)
    assert SparseKVCache(store, model, settings=Settings(recent=4), tokens=32).settings == Settings(
        recent=4, tokens=32
    )


@pytest.mark.parametrize("selector", ["codes", "lowrank", "exact"])
def test_too_little_memory_is_told_before_the_prompt(store: KVStore, selector: str) -> None:
    model, inputs = model_of("Llama"), prompt(2, 300)
    options = {"tokens": 32, "selector": selector}
    with SparseKVCache(store, model, memory="100 KiB", **options) as cache:
        with pytest.raises(CapacityError, match=r"300 tokens takes .* memory= allows 100.* KiB"):
            generate(model, cache, inputs)
        assert cache.sequence is None
    with SparseKVCache(store, model, memory="4 MiB", **options) as cache:
        generate(model, cache, inputs)
        stats = cache.stats()
        assert stats["resident_nbytes"] + stats["metadata_nbytes"] < 4 << 20


def damage(folder: Path, positions: slice = slice(None)) -> None:
    """Changes a bit in every used block of the store's data file."""
    data = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    used = [at for at in range(0, len(content), 4096) if any(content[at : at + 64])]
    with data.open("r+b") as file:
        for at in used[positions]:
            file.seek(at + 7)
            file.write(bytes([content[at + 7] ^ 1]))


def test_damaged_groups_are_an_error_and_the_cache_goes_on(tmp_path: Path) -> None:
    model, told = model_of("Llama"), prompt(1, 200)["input_ids"]
    options = EngineOptions(segment="64 KiB")
    with open_store(f"file://{tmp_path}/kv", capacity="64 MiB", engine=options) as store:
        cache = SparseKVCache(store, model, tokens=64)
        with torch.no_grad():
            model(told, **{CACHE_ARGUMENT: cache})
            assert cache.sequence is not None
            for layer in range(4):
                cache.sequence.settle(layer)
            damage(tmp_path / "kv")
            with pytest.raises(CorruptionError):
                model(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})
            damage(tmp_path / "kv")  # as it was
            cache.crop(0)
            assert cache.get_seq_length() == 200
            found = model(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache}).logits
            fresh = SparseKVCache(store, model, tokens=64)
            model(told, **{CACHE_ARGUMENT: fresh})
            wanted = model(torch.tensor([[5]]), **{CACHE_ARGUMENT: fresh}).logits
        assert torch.equal(found, wanted)
        cache.close()
        fresh.close()


@pytest.mark.parametrize("failure", [DeviceTimeout("late"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [0, 1, 3])
def test_what_fails_between_is_never_taken_for_what_was_read(
    store: KVStore, failure: BaseException, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_of("Llama"), prompt(2, 120)
    finish, calls = GroupReading.finish, [0]

    def failing(reading: GroupReading, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call + 1:
            raise failure
        return finish(reading, **options)

    cache, theirs = SparseKVCache(store, model, tokens=512), DynamicCache()
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        for each in (cache, theirs):
            model(**inputs, **{CACHE_ARGUMENT: each})
        monkeypatch.setattr(GroupReading, "finish", failing)
        for _ in range(4):
            wanted = model(token, **{CACHE_ARGUMENT: theirs}).logits
            try:
                found = model(token, **{CACHE_ARGUMENT: cache}).logits
            except type(failure):
                cache.crop(-1)  # of the layers that have the token, all or some
                found = model(token, **{CACHE_ARGUMENT: cache}).logits
            assert torch.equal(found, wanted)
    assert calls[0] > call
    cache.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("settings", [Settings(tokens=16, recent=16), preset("kvswap", tokens=16)])
def test_keys_that_are_no_numbers_are_read_as_they_are(
    store: KVStore, value: float, settings: Settings
) -> None:
    model = copy.deepcopy(model_of("Llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3] = value
        cache = SparseKVCache(store, model, settings=settings)
        model(prompt(1, 90)["input_ids"], **{CACHE_ARGUMENT: cache})
        for token in (5, 6, 7):
            model(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 93
    assert cache.stats()["misses"] > 0
    cache.close()


def test_a_pass_of_another_model_in_between_changes_nothing(store: KVStore) -> None:
    model, inputs = model_of("Llama"), prompt(1, 100)
    wanted = generate(model, DynamicCache(), inputs).sequences
    with (
        SparseKVCache(store, model, tokens=512) as cache,
        SparseKVCache(store, model, tokens=16) as other,
    ):
        generate(model, other, prompt(1, 70, seed=4))
        assert torch.equal(generate(model, cache, inputs).sequences, wanted)
        assert other.get_seq_length() == 81


def test_passes_in_two_threads_are_kept_apart(store: KVStore) -> None:
    model, texts = model_of("Llama"), (prompt(1, 100), prompt(2, 90, seed=4))
    wanted = [generate(model, DynamicCache(), text).sequences for text in texts]
    cache, other = (SparseKVCache(store, model, tokens=512) for _ in texts)
    found: list[torch.Tensor] = []
    passes = [0]

    def amid_a_pass(*_: object) -> None:
        passes[0] += 1
        if passes[0] == 4:
            thread = threading.Thread(
                target=lambda: found.append(generate(model, other, texts[1]).sequences)
            )
            thread.start()
            thread.join()

    hook = model.model.layers[1].mlp.register_forward_hook(amid_a_pass)
    found.append(generate(model, cache, texts[0]).sequences)
    hook.remove()
    assert torch.equal(found[1], wanted[0])
    assert torch.equal(found[0], wanted[1])
    assert other.stats()["hits"] > 0
    cache.close()
    other.close()
