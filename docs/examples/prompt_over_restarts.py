"""A prompt computed once and continued by other processes: the cache has a name and stays."""

import subprocess
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spdk_kv
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, OffloadedKVCache


def turn(folder: str) -> None:
    torch.manual_seed(0)  # the same weights and prompt in every process
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(1, 256, (1, 1500))
    with (
        spdk_kv.open(f"file://{folder}/kv", capacity="256 MiB") as store,
        OffloadedKVCache(store, model, name="manual", input_ids=prompt) as cache,
    ):
        print(cache.saved_tokens, "tokens are there already")
        model.generate(prompt, max_new_tokens=10, **{CACHE_ARGUMENT: cache})


if len(sys.argv) > 1:
    turn(sys.argv[1])
else:
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # each in a process of its own
            subprocess.run([sys.executable, __file__, folder], check=True)
