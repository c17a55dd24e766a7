"""Tensors under keys: put, get, get into memory of one's own, delete."""

import tempfile

import torch

import spdk_kv

with tempfile.TemporaryDirectory() as folder:
    with spdk_kv.open(f"file://{folder}/kv", capacity="64 MiB") as store:
        k, v = torch.randn(2, 8, 512, 128).bfloat16()
        store.put_many({"doc-17/layer-3/k": k, "doc-17/layer-3/v": v})  # both or none
        store.flush()  # from here on they survive a power cut

        assert torch.equal(store.get("doc-17/layer-3/k"), k)
        mine = torch.empty_like(v)
        store.get("doc-17/layer-3/v", out=mine)  # into memory that is there already
        assert torch.equal(mine, v)

        print(store.keys("doc-17/"))
        store.delete("doc-17/layer-3/v")

    with spdk_kv.open(f"file://{folder}/kv") as store:  # as after a restart
        print(store.keys())
