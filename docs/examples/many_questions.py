"""One document, many questions: each is asked in a process of its own, and computes the rest."""

import subprocess
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spdk_kv
from spdk_kv.integrations.transformers import CACHE_ARGUMENT, PromptCache


def ask(folder: str, number: int) -> None:
    torch.manual_seed(0)  # the same weights and document in every process
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    document = torch.randint(1, 256, (1, 1500))
    text = torch.cat([document, torch.randint(1, 256, (1, 10 + number))], dim=1)
    with spdk_kv.open(f"file://{folder}/kv", capacity="256 MiB") as store:
        prompts = PromptCache(store, model)
        with prompts.open(text) as cache:
            print(cache.saved_tokens, "of", text.shape[1], "tokens are there already")
            model.generate(text, max_new_tokens=10, **{CACHE_ARGUMENT: cache})
            prompts.save(cache, tokens=document.shape[1])


if len(sys.argv) > 1:
    ask(sys.argv[1], int(sys.argv[2]))
else:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            subprocess.run([sys.executable, __file__, folder, str(number)], check=True)
