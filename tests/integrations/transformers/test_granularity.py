"""How a new cache lies on the drive, when nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integrations.transformers.models import config_of, feed, model_of, prompt, random_kv
from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.integrations.transformers.granularity import fastest_granularity
from spdk_kv.store import KVStore
from spdk_kv.store import open as open_store
from spdk_kv.types import Granularity, KVShape


@pytest.mark.parametrize(
    ("layers", "heads", "device", "wanted"),
    [
        (32, 8, "cpu", "head"),
        (32, 8, "cuda", "layer"),
        (32, 32, "cpu", "head"),  # 32 MiB of unfinished chunks
        (33, 32, "cpu", "layer"),
    ],
)
def test_what_computes_on_it_decides(layers: int, heads: int, device: str, wanted: str) -> None:
    shape = KVShape(layers, heads, 128, torch.bfloat16)
    assert fastest_granularity(shape, torch.device(device)) == wanted


@pytest.mark.parametrize("asked", [None, "layer", "head"])
def test_what_is_asked_for_counts(store: KVStore, asked: Granularity | None) -> None:
    with OffloadedKVCache(store, config_of("llama"), granularity=asked) as cache:
        feed([cache], 10)
        assert cache.sequence is not None
        assert cache.sequence.granularity == (asked or "head")
        cache.batch_repeat_interleave(3)
        assert cache.sequence.granularity == (asked or "head")


def test_a_stored_cache_stays_as_it_was(tmp_path: Path) -> None:
    where, model = f"file://{tmp_path}/kv", model_of("llama")
    text = prompt(1, 301)["input_ids"]
    with (
        open_store(where, capacity="64 MiB") as store,
        OffloadedKVCache(store, model, name="chat", granularity="layer") as cache,
        torch.no_grad(),
    ):
        model(text[:, :300], **{CACHE_ARGUMENT: cache})
    with (
        open_store(where) as store,
        OffloadedKVCache(store, model, name="chat", input_ids=text) as cache,
    ):
        assert cache.sequence is not None
        assert cache.sequence.granularity == "layer"
        k, _ = cache.update(*random_kv(1, 1), 0)
        assert k.shape[2] == 301
