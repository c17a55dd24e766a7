"""Reading while computing: prefetch for a sequence, futures for tensors under keys."""

import tempfile

import torch

import spdk_kv

LAYERS = 8
shape = spdk_kv.KVShape(
    layers=LAYERS, kv_heads=8, head_dim=128, dtype=torch.float32, max_tokens=256
)

with (
    tempfile.TemporaryDirectory() as folder,
    spdk_kv.open(f"file://{folder}/kv", capacity="128 MiB") as store,
):
    seq = store.sequence("request-1", shape)
    for layer in range(LAYERS):
        seq.append(layer, *torch.randn(2, 1, 8, 256, 128))

    total = 0.0
    for layer in range(LAYERS):
        seq.prefetch([layer + 1] if layer + 1 < LAYERS else [])  # returns at once
        k, v = seq.read(layer)  # mostly there already
        total += (k @ v.transpose(2, 3)).norm().item()  # computes while the next is read

    writes = [store.put_async(f"chunk-{n}", torch.full((1024, 256), n)) for n in range(4)]
    for write in writes:
        write.result(timeout=30)
    reads = [store.get_async(f"chunk-{n}") for n in range(4)]
    print([int(read.result()[0, 0]) for read in reads], f"and a norm of {total:.0f}")
