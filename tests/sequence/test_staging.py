"""Staging memory follows what sequences need of it, and is given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spdk_kv

LAYERS, MIB = 2, 1 << 20


def step(sequence: spdk_kv.Sequence, tokens: int) -> int:
    """Appends to all layers and reads them; returns the bytes of K and V of one layer."""
    nbytes = 0
    for layer in range(LAYERS):
        new = torch.full((1, 2, tokens, 64), float(layer))
        sequence.append(layer, new, new)
        sequence.settle(layer)
    for layer in range(LAYERS):
        k, v = sequence.read(layer)
        assert (k == layer).all()
        assert (v == layer).all()
        nbytes = k.nbytes + v.nbytes
    return nbytes


@pytest.mark.parametrize("policy", ["direct", "adaptive"])
def test_sizes_that_a_growing_cache_has_outgrown_are_given_back(
    tmp_path: Path, policy: str
) -> None:
    path = spdk_kv.PageCacheOptions(policy=policy)
    shape = spdk_kv.KVShape(LAYERS, 2, 64, torch.float32)
    with spdk_kv.open(f"file://{tmp_path}/kv", capacity="128 MiB", page_cache=path) as store:
        sequence = store.sequence("growing", shape, temporary=True)
        sequence.read_ahead = False
        needed = [step(sequence, 1024) for _ in range(12)][-1]
        assert needed == 12 * MIB
        # Two buffers each of the last two sizes, what was appended last, unfinished chunks. All
        # sizes would be 13 * needed.
        assert store.staging.stats()["free_nbytes"] <= 4 * needed + 8 * MIB
        sequence.delete()
        assert store.staging.stats()["free_nbytes"] <= 8 * MIB


def test_another_sequence_keeps_what_it_needs(tmp_path: Path) -> None:
    shape = spdk_kv.KVShape(LAYERS, 2, 64, torch.float32)
    with spdk_kv.open(f"file://{tmp_path}/kv", capacity="128 MiB") as store:
        gone, kept = (store.sequence(name, shape, temporary=True) for name in ("gone", "kept"))
        needed = step(kept, 4096)
        step(gone, 4096)
        gone.delete()
        assert store.staging.stats()["free_nbytes"] >= needed
        step(kept, 1)
