"""What counts as the same model: everything that changes a key or a value, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from integrations.transformers.models import SIZES
from spdk_kv.integrations.transformers.identity import (
    Identity,
    identity_of,
    length_limit,
    why_unmatchable,
)
from spdk_kv.integrations.transformers.weights import Undigestible, weights_digest

WINDOWS = (None,) * 4


def llama(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings)).eval()


def fingerprint(model: Any, tag: str | None = None) -> str:
    return identity_of(model, WINDOWS, tag).fingerprint


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def test_the_same_model_made_again_is_the_same() -> None:
    assert fingerprint(llama()) == fingerprint(llama()) == fingerprint(copy.deepcopy(llama()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 1}, ["the weights are others"]),
        (rope(500000.0), ["config.rope_parameters.rope_theta was 10000.0, not 500000.0"]),
        ({"rms_norm_eps": 1e-5}, ["config.rms_norm_eps was 1e-06, not 1e-05"]),
        ({"a_field_of_tomorrow": 3}, ["config.a_field_of_tomorrow was absent, not 3"]),
    ],
)
def test_what_differs_is_named(settings: dict[str, Any], said: list[str]) -> None:
    stored, now = identity_of(llama(), WINDOWS), identity_of(llama(**settings), WINDOWS)
    assert now.fingerprint != stored.fingerprint
    # The frequencies of RoPE are weights as well.
    assert [d for d in now.differences(stored) if "weights" not in d or d in said] == said
    assert now.differences(now) == []


def test_tag_dtype_and_attention_are_told_apart() -> None:
    stored = identity_of(llama(), WINDOWS)
    now = identity_of(llama().to(torch.bfloat16), (None, 40) * 2, "mine")
    said = "; ".join(now.differences(stored))
    assert "tag was None, not 'mine'" in said
    assert "dtype was 'float32', not 'bfloat16'" in said
    assert "windows was (None, None, None, None), not (None, 40, None, 40)" in said


def test_what_changes_no_key_does_not_count() -> None:
    model = llama()
    before = fingerprint(model)
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.config._attn_implementation = "eager"
    model.generation_config.temperature = 0.3
    model.train()
    assert fingerprint(model) == before
    assert fingerprint(torch.compile(model, backend="eager")) == before


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda weight: weight[3, 5].add_(0.5),
    "through .data": lambda weight: weight.data.mul_(1.01),
    "one bit": lambda weight: weight.view(torch.uint8)[60, 60].bitwise_xor_(1),
    "two rows swapped": lambda weight: weight.copy_(weight.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_change_of_any_tensor_changes_the_fingerprint(change: str, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    seen = {fingerprint(model)}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                CHANGES[change](weight)
                seen.add(fingerprint(model))
    matrices = sum(weight.dim() == 2 for weight in model.parameters())
    assert len(seen) == matrices + 1


def test_large_tensors_are_summed_up_with_every_byte_counted() -> None:
    # 1 MiB and some bytes that fill no word.
    layer = nn.Linear(1024, 257, bias=False, dtype=torch.bfloat16)
    other = copy.deepcopy(layer)
    assert weights_digest(layer, static_rope=True) == weights_digest(other, static_rope=True)
    for at in (0, 1, 77_777, 1024 * 257 - 1):
        changed = copy.deepcopy(layer)
        bits = changed.weight.data.view(-1).view(torch.int16)
        bits[at] ^= 1
        assert weights_digest(changed, static_rope=True) != weights_digest(layer, static_rope=True)
    moved = copy.deepcopy(layer)
    moved.weight.data = moved.weight.data.roll(64, 0)
    assert weights_digest(moved, static_rope=True) != weights_digest(layer, static_rope=True)


def test_digest_is_made_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from spdk_kv.integrations.transformers import weights

    model, read = llama(), []
    honest = weights._bits
    monkeypatch.setattr(weights, "_bits", lambda tensor: read.append(1) or honest(tensor))
    first = fingerprint(model)
    tensors = len(read)
    assert tensors >= len(list(model.parameters()))
    assert fingerprint(model) == first
    assert len(read) == tensors
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    assert fingerprint(model) != first
    assert len(read) == 2 * tensors


def test_order_in_memory_does_not_matter_and_tied_weights_count_once() -> None:
    model, tied = llama(), llama(tie_word_embeddings=True)
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()
    assert fingerprint(model) == fingerprint(llama())
    assert fingerprint(tied) == fingerprint(llama(tie_word_embeddings=True))
    assert fingerprint(tied) != fingerprint(model)


def test_adapters_count_with_their_weights_and_settings() -> None:
    # As peft does it: modules within the model, their state in attributes of these names.
    model = llama()
    plain = fingerprint(model)
    projection = model.model.layers[0].self_attn.q_proj
    projection.lora_A = nn.Linear(64, 4, bias=False)
    projection._active_adapter, projection._disable_adapters = ["mine"], False
    projection.scaling = {"mine": 2.0}
    seen = {plain, fingerprint(model)}
    for name, value in (("_disable_adapters", True), ("scaling", {"mine": 1.0})):
        setattr(projection, name, value)
        seen.add(fingerprint(model))
    projection.lora_A.weight.data += 0.01
    seen.add(fingerprint(model))
    assert len(seen) == 5


def test_weights_without_values_are_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(Undigestible, match="meta device"):
        weights_digest(model, static_rope=True)
    assert identity_of(model, WINDOWS).weights is None
    assert "not checked" in caplog.text
    assert identity_of(model.config, WINDOWS).weights is None


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_odd_dtypes_and_quantised_weights_are_read() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("f8", torch.ones(40000).to(torch.float8_e4m3fn))
            self.register_buffer("b", torch.ones(3, dtype=torch.bool))
            self.register_buffer("none", torch.empty(0))
            self.register_buffer("scalar", torch.tensor(1.0))
            self.register_buffer("slice", torch.arange(100_000, dtype=torch.int16)[1:])
            self.register_buffer(
                "q", torch.quantize_per_tensor(torch.ones(50, 50), 0.1, 0, torch.qint8)
            )

    one, other = Odd(), Odd()
    digest = weights_digest(one, static_rope=True)
    assert digest == weights_digest(other, static_rope=True)
    other.f8.view(torch.uint8)[39_999] ^= 1  # type: ignore[operator, index]
    assert weights_digest(other, static_rope=True) != digest


def test_identity_survives_being_written_down() -> None:
    identity = identity_of(llama(), (None, 40) * 2, "mine")
    read = Identity.from_json(json.loads(json.dumps(identity.to_json())))
    assert read == identity
    assert read.fingerprint == identity.fingerprint
    older = dataclasses.replace(identity, release="4.0")
    assert older.fingerprint == identity.fingerprint


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "yarn", "factor": 2.0}, None),
        ({"rope_type": "of tomorrow", "original_max_position_embeddings": 77}, 77),
    ],
)
def test_rope_that_depends_on_the_length_is_known(kind: dict[str, Any], limit: int | None) -> None:
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {"rope_theta": 10000.0, **kind}
    assert length_limit(config) == limit


def test_models_whose_tokens_depend_on_later_ones_are_not_matched() -> None:
    from transformers import Gemma3TextConfig, T5Config

    assert why_unmatchable(LlamaConfig()) is None
    assert why_unmatchable(Gemma3TextConfig()) is None
    assert why_unmatchable(Gemma3TextConfig(use_bidirectional_attention=True))
    assert why_unmatchable(T5Config())
