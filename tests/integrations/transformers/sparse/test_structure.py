"""Queries as they are predicted are the queries that the model makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from integrations.transformers.models import prompt
from integrations.transformers.sparse.helpers import FAMILIES, model_of, whole_layers
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.integrations.transformers.sparse.steps import Steps
from spdk_kv.integrations.transformers.sparse.structure import normed
from spdk_kv.store import KVStore


@pytest.mark.parametrize("family", FAMILIES)
def test_query_of_the_true_input_is_the_models_own(
    store: KVStore, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    asked: list[torch.Tensor] = []
    made: dict[int, torch.Tensor] = {}
    enter, interface = Steps.enter, AttentionInterface.get_interface

    def watched(self: Any, *args: Any) -> Any:
        attention = interface(self, *args)

        def attend(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made[module.layer_idx] = query
            return attention(module, query, *args, **kwargs)

        return attend

    def entering(steps: Steps, place: int, hidden: torch.Tensor) -> None:
        if steps._active and hidden.shape[1] == 1 and place in steps._structure.queries:
            asked.append(steps._query(place, normed(steps._structure.decoders[place], hidden)))
        enter(steps, place, hidden)

    monkeypatch.setattr(Steps, "enter", entering)
    monkeypatch.setattr(AttentionInterface, "get_interface", watched)
    with SparseKVCache(store, model) as cache, torch.no_grad():
        model(prompt(1, 33)["input_ids"], **{CACHE_ARGUMENT: cache})
        model(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})
        whole = sorted(cache._structure.queries)
        scalings = [cache._structure.queries[number].scaling for number in whole]
    assert len(asked) == len(whole) == whole_layers(model)
    for number, query in zip(whole, asked, strict=True):
        torch.testing.assert_close(query, made[number], rtol=1e-5, atol=1e-5)
        assert made[number].abs().max() > 0.1
    assert set(scalings) == {32**-0.5 if "Gemma" in family else 64**-0.5}
