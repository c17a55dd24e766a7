"""Fitting to texts: the keys that come through forward passes in slices are those of one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, fitting
from spdk_kv.integrations.transformers.dimensions import dimensions_of, whole_layers
from spdk_kv.integrations.transformers.fitting import gather_keys
from spdk_kv.types import LayerShape
from support.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), max_tokens=64)


def keys_of(model: Any, ids: list[int]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """K of each layer as one forward pass leaves them, [tokens, kv_heads * head_dim]."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([ids]), **{CACHE_ARGUMENT: cache})
    return [
        layer.keys[0].transpose(0, 1).flatten(1).double().numpy()
        for layer in cache.layers
        if layer.keys is not None
    ]


def gemma() -> Any:
    """Layers 0 and 2 have a window, layer 1 has none."""
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=128,
    )
    return Gemma3ForCausalLM(config).eval()


def test_keys_of_slices_and_texts_are_those_of_whole_passes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_SLICE_TOKENS", 7)
    first, second = [1, 5, 3, 9] * 8, [2, 7, 4] * 5
    read: list[int] = []
    found = gather_keys(model, [first, second], advance=read.append)
    assert set(found) == {0, 1, 2}
    assert read == [7, 7, 7, 7, 4, 7, 7, 1]
    pairs = zip(keys_of(model, first), keys_of(model, second), strict=True)
    for number, (one, other) in enumerate(pairs):
        _, values, vectors = np.linalg.svd(np.concatenate([one, other]))
        matrix, energy = found[number].directions(3)
        np.testing.assert_allclose(np.abs(vectors[:3] @ matrix), np.eye(3), atol=1e-3)
        assert energy == pytest.approx((values[:3] ** 2).sum() / (values**2).sum(), rel=1e-4)


def test_a_text_longer_than_the_model_takes_begins_anew(model: Any) -> None:
    ids = [1, 5, 3, 9, 2] * 20
    found = gather_keys(model, [ids])
    apart = gather_keys(model, [ids[:64], ids[64:]])
    assert found[0].tokens == 100
    np.testing.assert_array_equal(found[2].directions(4)[0], apart[2].directions(4)[0])


def test_layers_with_a_window_are_left_out() -> None:
    model = gemma()
    assert set(gather_keys(model, [[3, 4, 5] * 10])) == {1}
    found = dimensions_of(model.config)
    assert (found.layers, found.heads) == (1, 2)
    assert found.layer == LayerShape(1, 16, torch.float32)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="no layers with a KV cache"):
        whole_layers(MambaConfig(num_hidden_layers=2, hidden_size=16))
    config = gemma().config
    config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(ShapeMismatch, match="no layer that attends to all tokens"):
        dimensions_of(config)


def test_keys_that_are_not_finite_name_their_layer(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1: keys are not finite"):
        gather_keys(model, [[1, 2, 3]])


def test_dimensions_come_from_the_configuration(model: Any) -> None:
    found = dimensions_of(model.config)
    assert (found.layers, found.heads, found.max_tokens) == (3, 4, 64)
    assert found.layer == LayerShape(2, 16, torch.float32)
    weights = sum(each.numel() for each in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert found.weights_nbytes == 4 * (weights - embedding)
