"""K and V of unlike width or dtype, and layers unlike each other: stored as they come."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.families.decode import tiny_model
from integrations.transformers.models import assert_same, generate, model_of, prompt
from spdk_kv.errors import ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.integrations.transformers.shapes import guessed, shape_of
from spdk_kv.integrations.transformers.stream import LayerStream, StreamOptions
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from spdk_kv.types import LayerShape
from support.interrupts import interrupted_everywhere
from support.rounds import rounds

# An interrupt may come within a finalizer, where Python reports it and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Latents of K and V, wider heads without a window, more heads in a window, latents and an index.
FAMILIES = ["deepseek_v3", "gemma4_text", "mimo_v2_flash", "glm_moe_dsa", "kimi_linear"]
KV_ALONE = FAMILIES[:3]
MODES: list[dict[str, Any]] = [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]


@cache
def small(family: str) -> Any:
    return tiny_model(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(store: KVStore, family: str) -> None:
    stats = assert_same(store, small(family), prompt(2, 150), resident_layers=1)
    assert stats["read_nbytes"] > 0


@pytest.mark.parametrize("resident", [2, 3, 4])
def test_any_number_of_resident_layers(store: KVStore, resident: int) -> None:
    stats = assert_same(store, small("mimo_v2_flash"), prompt(2, 150), resident_layers=resident)
    assert stats["resident_layers_peak"] == resident


@pytest.mark.parametrize("options", MODES, ids=["beams", "samples"])
@pytest.mark.parametrize("family", FAMILIES[::2])
def test_beams_and_samples(store: KVStore, family: str, options: dict[str, Any]) -> None:
    assert_same(store, small(family), prompt(2, 60), options=options)


@pytest.mark.parametrize("family", KV_ALONE)
def test_heads_apart_where_they_can_be(store: KVStore, family: str) -> None:
    assert_same(store, small(family), prompt(2, 100), granularity="head")


@pytest.mark.parametrize("family", KV_ALONE)
def test_lasting_cache_is_taken_up(tmp_path: Path, family: str) -> None:
    model, inputs, where = small(family), prompt(1, 60), f"file://{tmp_path}/kv"
    wanted = generate(model, DynamicCache(config=model.config), inputs, max_new_tokens=20)
    with open_store(where, capacity="64 MiB") as store:
        kv = OffloadedKVCache(store, model.config, name="chat")
        generate(model, kv, inputs, max_new_tokens=10)
    with open_store(where) as store:
        assert store.sequences() == ["chat"]
        kv = OffloadedKVCache(store, model.config, name="chat")
        begun = {"input_ids": wanted.sequences[:, :70]}
        found = generate(model, kv, begun, max_new_tokens=10)
    assert found.sequences.tolist() == wanted.sequences.tolist()


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_autocast(store: KVStore, granularity: str) -> None:
    model, told = model_of("llama"), []
    for kv in (
        DynamicCache(config=model.config),
        OffloadedKVCache(store, model.config, granularity=granularity),  # type: ignore[arg-type]
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            told.append(generate(model, kv, prompt(2, 80)))
        shape = (kv.layers[0].keys.dtype, kv.layers[0].values.dtype)
        assert shape == (torch.float32, torch.bfloat16)
    assert told[0].sequences.tolist() == told[1].sequences.tolist()
    for ours, theirs in zip(told[1].logits, told[0].logits, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad(), pytest.raises(ShapeMismatch, match="the sequence holds bfloat16"):
        model(torch.tensor([[5], [5]]), **{CACHE_ARGUMENT: kv})


# -- without a model -----------------------------------------------------------------------------

WIDE = LayerShape(1, 32, "float32")
NARROW = LayerShape(2, 8, "float32", 4, "bfloat16")
SHAPES = [NARROW, NARROW, WIDE, NARROW, WIDE]
WINDOWS = (20, 20, None, 20, None)


def test_layers_are_guessed_by_kind() -> None:
    assert guessed([NARROW], WINDOWS) == [NARROW] * 5
    assert guessed(SHAPES[:3], WINDOWS) == SHAPES
    k, v = pair_of(3, 0, 5)
    assert shape_of(k, v) == NARROW
    for wrong in (v[:1], v[:, :1], v[:, :, :1], v[0]):
        with pytest.raises(ShapeMismatch, match="differ in width only"):
            shape_of(k, wrong)


def pair_of(layer: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens ``first`` on, which tell their layer and token."""
    shape = SHAPES[layer]
    value = (torch.arange(first, first + count) + 1000.0 * layer).reshape(1, 1, count, 1)
    k = value.expand(2, shape.kv_heads, count, shape.head_dim).contiguous()
    v = -value.expand(2, shape.kv_heads, count, shape.value_dim or 0).contiguous()
    return k, v.to(getattr(torch, shape.value_dtype))


def run_pass(stream: LayerStream, past: int, count: int) -> None:
    for layer in range(len(SHAPES)):
        k, v = stream.update(layer, *pair_of(layer, past, count))
        first = 0 if WINDOWS[layer] is None else max(0, past - 19)
        wanted = pair_of(layer, first, past + count - first)
        assert torch.equal(k, wanted[0])
        assert torch.equal(v, wanted[1])


@pytest.mark.parametrize("name", [None, "chat"])
def test_first_pass_finds_the_shapes_and_may_be_interrupted_anywhere(
    store: KVStore, name: str | None
) -> None:
    stream = LayerStream(store, StreamOptions(WINDOWS, None, 3, name, "layer"))

    def prepare(at: int) -> None:
        stream.clear()
        assert store.sequences() == []

    def check(at: int) -> None:
        if len({stream.tokens(layer) for layer in range(len(SHAPES))}) > 1:
            with pytest.raises(SpdkKvError, match="half-way"):
                run_pass(stream, stream.tokens(0), 5)
        stream.truncate(0)
        past = stream.tokens(0)
        assert past in (0, 40)
        run_pass(stream, past, 7)
        assert len(store.sequences()) == 1

    interrupted_everywhere(prepare, lambda at: run_pass(stream, 0, 40), check, step=rounds(211, 13))
    assert stream.sequence is not None
    assert [stream.sequence.shape.layer(layer) for layer in range(5)] == SHAPES
    stream.clear()
