"""The KV cache of one request: append token by token, read a layer, part of it, and go back."""

import tempfile

import torch

import spdk_kv

LAYERS, HEADS, DIM = 4, 8, 64
shape = spdk_kv.KVShape(
    layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="bfloat16", max_tokens=2048
)

with (
    tempfile.TemporaryDirectory() as folder,
    spdk_kv.open(f"file://{folder}/kv", capacity="64 MiB") as store,
):
    seq = store.sequence("request-1", shape)
    prompt = torch.randn(2, 1, HEADS, 1000, DIM).bfloat16()  # K and V
    for layer in range(LAYERS):
        seq.append(layer, *prompt)

    for _ in range(3):  # three decode steps
        for layer in range(LAYERS):
            k, v = seq.read(layer)
            seq.append(layer, *torch.randn(2, 1, HEADS, 1, DIM).bfloat16())

    assert torch.equal(seq.read(0, tokens=slice(0, 1000))[0], prompt[0])
    assert torch.equal(seq.read(0, tokens=slice(0, 1000), heads=[5])[1], prompt[1][:, 5:6])
    seq.truncate(1000)  # the prompt alone again
    print(seq.tokens(), "tokens in each of", LAYERS, "layers,", seq.nbytes >> 20, "MiB")
