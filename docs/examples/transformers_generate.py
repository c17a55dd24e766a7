"""Text generation with the KV cache on the drive, and the same tokens as with it in memory."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spdk_kv
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache

# Random weights stand for LlamaForCausalLM.from_pretrained("...").
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(1, 256, (1, 300))
options = {
    "attention_mask": torch.ones_like(prompt),
    "max_new_tokens": 20,
    "do_sample": False,
}

with (
    tempfile.TemporaryDirectory() as folder,
    spdk_kv.open(f"file://{folder}/kv", capacity="256 MiB") as store,
    OffloadedKVCache(store, config) as cache,
):
    found = model.generate(prompt, **{CACHE_ARGUMENT: cache}, **options)
    assert torch.equal(found, model.generate(prompt, **options))
    print("the same tokens; at most", cache.stats()["resident_layers_peak"], "layers in memory")
