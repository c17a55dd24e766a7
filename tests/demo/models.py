"""Tiny models with tokenizers, as transformers and llama.cpp save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spdk_kv.demo.asking.question import shipped_question

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def save_model(folder: Path, *, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """A model with random weights in ``folder`` whose tokens are words of the demo's document;
    returns the folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    found = dict.fromkeys(["[unk]", *shipped_question().document.split()])
    words = {word: number for number, word in enumerate(list(found)[:300])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]")
    fast.chat_template = template
    fast.save_pretrained(folder)
    options = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096, "initializer_range": 0.2, "sliding_window": None,
        "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**options | changes))
    model.save_pretrained(folder)
    return folder
