"""The same questions through the real read path: a `SparseKVCache` on a store.

What `masked` finds with everything in memory has to be found here as well: the same selectors, but
the model's own attention, over what was read from the drive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from masked import MaskedModel
from tasks import Questions

import spdk_kv
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, SparseKVCache
from spdk_kv.sparse import Settings


@dataclass(frozen=True)
class Answered:
    """Log-probabilities of the tokens that count, ``[rows, scored, vocabulary]``, and what the
    cache says of itself."""

    log_probabilities: torch.Tensor
    stats: dict[str, Any]


def through_store(
    model: MaskedModel,
    text: list[tuple[torch.Tensor, torch.Tensor]],
    questions: Questions,
    settings: Settings,
    folder: Path,
) -> Answered:
    """Answers as `Asking.run` does, with a store in ``folder``. ``text`` is K and V of every layer,
    ``[tokens, kv_heads, head_dim]``; each row of the batch has its copy on the drive."""
    rows = len(questions.prompts)
    nbytes = 2 * rows * sum(k.nbytes + v.nbytes for k, v in text) + (64 << 20)
    with model.as_it_is() as own, spdk_kv.open(f"file://{folder}/kv", capacity=nbytes) as store:
        return _answered(own, text, questions, settings, store)


def _answered(
    model: Any,
    text: list[tuple[torch.Tensor, torch.Tensor]],
    questions: Questions,
    settings: Settings,
    store: spdk_kv.KVStore,
) -> Answered:
    rows = len(questions.prompts)
    with SparseKVCache(store, model, settings=settings) as cache, torch.inference_mode():
        for layer, pair in enumerate(text):
            k, v = (one.transpose(0, 1).expand(rows, -1, -1, -1) for one in pair)
            cache.update(k, v, layer)
        _pass(model, questions.prompts, cache)
        found = []
        for at in range(max(questions.scored)):
            logits = _pass(model, questions.answers[:, at : at + 1], cache)
            if at + 1 in questions.scored:
                found.append(torch.log_softmax(logits[:, -1].float(), dim=-1))
        return Answered(torch.stack(found, dim=1), cache.stats())


def _pass(model: Any, ids: torch.Tensor, cache: SparseKVCache) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
    return logits
