"""A full store says what was asked, what is free, and what can be deleted, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spdk_kv import CapacityError, KVShape
from store.helpers import open_store

MIB = 1 << 20
SHAPE = KVShape(layers=2, kv_heads=4, head_dim=64, dtype="float16", max_tokens=4096)


def test_sequences_that_fill_a_store_are_named_as_what_to_delete(tmp_path: Path) -> None:
    with open_store(tmp_path / "kv") as store:
        held = [store.sequence(name, SHAPE) for name in ("monday", "tuesday")]
        with pytest.raises(CapacityError) as full:
            store.sequence("wednesday", SHAPE)
        said = str(full.value)
        assert "are free" in said
        assert "belong to sequences" in said
        # What it advises works.
        assert "store.sequences()" in said
        assert "store.sequence(name).delete()" in said
        assert sorted(store.sequences()) == ["monday", "tuesday"]
        held[0].delete()
        store.sequence("wednesday", SHAPE)


def test_blobs_that_are_never_evicted_are_named_as_what_to_delete(tmp_path: Path) -> None:
    with open_store(tmp_path / "kv", eviction="none") as store:
        for number in range(3):
            store.put(str(number), torch.zeros(4 * MIB, dtype=torch.uint8))
        with pytest.raises(CapacityError, match=r"belong to blobs.*store\.delete\(key\)"):
            store.put("more", torch.zeros(8 * MIB, dtype=torch.uint8))
        assert store.delete("0")
        assert store.delete("1")
        store.put("more", torch.zeros(8 * MIB, dtype=torch.uint8))
