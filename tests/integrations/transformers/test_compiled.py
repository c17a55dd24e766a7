"""torch.compile of a model, and of the function that calls it: the same tokens as plainly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from integrations.transformers.families.decode import tiny_model
from integrations.transformers.models import prompt
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.store import KVStore
from support.rounds import LONG

STEPS = 4
BACKENDS = ["eager", *(["inductor"] if LONG else [])]
# Compiling takes seconds per layer.
FAMILIES = {
    "llama": {"num_hidden_layers": 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
    },
}


def model_of(family: str) -> Any:
    return tiny_model(family, head_dim=64, **FAMILIES[family])


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decoded(store: KVStore, model: Any, forward: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and logits of ``forward``, which is ``model`` or compiled from it."""
    tokens, logits = prompt(1, 60)["input_ids"], []
    told = []
    with OffloadedKVCache(store, model.config, resident_layers=1) as cache, torch.no_grad():
        for _ in range(STEPS):
            out = forward(input_ids=tokens, **{CACHE_ARGUMENT: cache}).logits[:, -1:]
            tokens = out.argmax(-1)
            told.append(int(tokens))
            logits.append(out)
        assert cache.stats()["read_nbytes"] > 0
    return told, logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_model(store: KVStore, family: str, backend: str) -> None:
    model = model_of(family)
    wanted = decoded(store, model, model)
    found = decoded(store, model, torch.compile(model, backend=backend))
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    if backend == "eager":
        for ours, theirs in zip(found[1], wanted[1], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(not LONG, reason="compiles for long: run it with --long")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_forward_in_inference_mode(store: KVStore, backend: str) -> None:
    model = model_of("llama")
    wanted = decoded(store, model, model)[0]

    @torch.compile(backend=backend)
    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    with torch.inference_mode():
        assert decoded(store, model, forward)[0] == wanted


@pytest.mark.skipif(not LONG, reason="compiles for long: run it with --long")
def test_generate_of_a_compiled_model(store: KVStore) -> None:
    model, told = model_of("llama"), []
    for forward in (model.forward, torch.compile(model.forward, backend="eager")):
        own, model.forward = model.__dict__.get("forward"), forward
        try:
            with OffloadedKVCache(store, model.config) as cache:
                out = model.generate(
                    **prompt(2, 40), **{CACHE_ARGUMENT: cache}, max_new_tokens=8, do_sample=False
                )
        finally:
            del model.forward
            assert own is None
        told.append(out.tolist())
    assert told[0] == told[1]
