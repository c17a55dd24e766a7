"""A step attends to what was selected, and to nothing else; the bytes are those of the drive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import model_of
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.integrations.transformers.sparse.stream import SparseStream
from spdk_kv.sparse import Settings, preset
from spdk_kv.store import KVStore


class Watched:
    """For each layer of each step that read a part: the positions that it attended to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, torch.Tensor]] = []
        attended = SparseStream._attended

        def compared(
            stream: SparseStream, sequence: Any, layer: int, past: int, k: Any, v: Any
        ) -> Any:
            chosen = stream._parts[layer].chosen(past) if layer in stream._parts else None
            pair = attended(stream, sequence, layer, past, k, v)
            if chosen is not None and k.shape[2] == 1:
                positions = chosen.positions(stream.settings.group_tokens)
                self.steps.append((layer, positions))
                for found, whole in zip(pair, sequence.read(layer), strict=True):
                    index = positions[:, None, :, None].expand(-1, whole.shape[1], -1, 64)
                    assert torch.equal(found, whole.gather(2, index))
            return pair

        monkeypatch.setattr(SparseStream, "_attended", compared)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(tokens=32, recent=16),
        Settings(tokens=32, group_tokens=16, pool=1.0, recent=16),
        Settings(tokens=24, correction=0.95, recent=16),
        Settings(tokens=16, sinks=0, recent=0, pool=1.0, correction=1.0),
        preset("kvswap", tokens=16),
        preset("previous", tokens=32),
    ],
    ids=["codes", "groups of 16", "corrected", "corrected, small pool", "kvswap", "previous"],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_bytes_are_those_of_the_selected_tokens(
    store: KVStore, monkeypatch: pytest.MonkeyPatch, settings: Settings, options: Any
) -> None:
    watched = Watched(monkeypatch)
    model, new = model_of("Gemma3"), 14
    with SparseKVCache(store, model, settings=settings) as cache:
        generate(model, cache, prompt(2, 170), max_new_tokens=new, **options)
        stats = cache.stats()
    # Of the first new token the prompt's pass is the step; two of four layers have windows.
    assert len(watched.steps) == 2 * (new - 1)
    for _, positions in watched.steps:
        assert positions.shape[1] <= settings.tokens + settings.recent + settings.group_tokens
        assert (positions.diff(dim=1) > 0).all()
        assert (positions[:, -1:] == positions.max()).all()
    assert stats["hits"] > 0
    assert (stats["corrections"] > 0) == (settings.correction is not None)
    newest = settings.recent + settings.group_tokens
    assert settings.tokens < stats["selected_tokens"] <= settings.tokens + newest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_attention_to_the_selected_tokens(
    store: KVStore, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    watched = Watched(monkeypatch)
    model, inputs, steps = model_of("Qwen3", attention), prompt(3, 120), 6
    with SparseKVCache(store, model, tokens=24) as cache:
        found = generate(model, cache, inputs, max_new_tokens=steps + 1)
    wanted = []
    cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate counts them
        model(**inputs, position_ids=positions, **{CACHE_ARGUMENT: cache})
        for step in range(steps):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            token = found.sequences[:, 120 + step, None]
            with only(model, dict(watched.steps[4 * step : 4 * step + 4])):
                out = model(
                    token,
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    **{CACHE_ARGUMENT: cache},
                )
            wanted.append(out.logits[:, -1])
    for step, logits in enumerate(wanted):
        torch.testing.assert_close(found.logits[step + 1], logits, rtol=1e-4, atol=1e-4)


@contextmanager
def only(model: Any, positions: dict[int, torch.Tensor]) -> Iterator[None]:
    """Attention is masked, but for ``positions`` of each layer."""

    def mask(module: Any, args: Any, kwargs: Any) -> Any:
        seen = torch.zeros_like(kwargs["attention_mask"], dtype=torch.bool)
        index = positions[module.layer_idx]
        seen.scatter_(-1, index[:, None, None].expand(*seen.shape[:3], -1), True)
        given = kwargs["attention_mask"]
        if given.dtype == torch.bool:
            return args, {**kwargs, "attention_mask": given & seen}
        least = torch.finfo(given.dtype).min
        return args, {**kwargs, "attention_mask": given.masked_fill(~seen, least)}

    hooks = [
        layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True)
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_fewer_bytes_than_everything(store: KVStore) -> None:
    model = model_of("Llama")
    with SparseKVCache(store, model, tokens=32) as cache:
        generate(model, cache, prompt(1, 600), max_new_tokens=20)
        stats = cache.stats()
        assert cache.sequence is not None
        everything = cache.sequence.nbytes
    assert 0 < stats["read_nbytes_per_token"] < everything / 4
    assert 0 < stats["resident_nbytes"] < everything / 2
    assert 0 < stats["metadata_nbytes"] < everything / 4


def test_calls_that_nobody_chose_for_attend_to_everything(store: KVStore) -> None:
    theirs, model = DynamicCache(), model_of("Llama")
    with SparseKVCache(store, model, tokens=16) as ours:
        for count in (90, 1, 1, 3, 1):
            for layer in range(4):
                k, v = torch.randn(2, 2, 2, count, 64)
                pair = ours.update(k, v, layer)
                for found, wanted in zip(pair, theirs.update(k, v, layer), strict=True):
                    assert torch.equal(found, wanted)
