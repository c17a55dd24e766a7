"""Low-rank keys by what `spdk-kv fit` wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from integrations.transformers.models import generate, prompt
from integrations.transformers.sparse.helpers import LAYERS, model_of
from spdk_kv.integrations.transformers import SparseKVCache
from spdk_kv.sparse.adapters.files import save_adapters
from spdk_kv.store import KVStore

pytest.importorskip("safetensors", reason="safetensors is not installed")


def test_a_file_of_adapters_is_what_keys_are_projected_by(store: KVStore, tmp_path: Path) -> None:
    model, rng = model_of("Llama"), np.random.default_rng(0)
    width = model.config.num_key_value_heads * model.config.head_dim
    fitted = {
        layer: np.linalg.qr(rng.standard_normal((width, 8)))[0].astype(np.float32)
        for layer in range(LAYERS)
    }
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, fitted, {})
    for given in (path, str(path), fitted):
        with SparseKVCache(
            store, model, selector="lowrank", tokens=16, adapters=given
        ) as cache:  # fmt: skip
            generate(model, cache, prompt(1, 100), max_new_tokens=3)
            assert cache.stats()["misses"] > 0
            for layer, selector in cache.sparse.selectors().items():
                kept = selector.state()["adapter"]
                assert np.array_equal(kept.reshape(width, -1), fitted[layer])
