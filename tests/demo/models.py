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


def write_gguf(path: Path) -> Path:
    """A GGUF file of a tiny Llama whose tokens are bytes; returns its path."""
    import numpy as np
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    width, inner, kv_heads, layers = 64, 96, 2, 2
    tokens = [*bytes_to_unicode().values(), "th", "<end>"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    kv = kv_heads * width // 4
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width),
                "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width),
                "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
            }.items()
        }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
