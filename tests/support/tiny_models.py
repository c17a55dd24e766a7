"""Folders with a tiny model and a tokenizer, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "a key and its value lie on the drive until somebody asks for them"
WORDS = TEXT.split()


def save_tiny_llama(folder: Path, max_tokens: int = 2048) -> LlamaForCausalLM:
    """A Llama with random weights: 3 layers, 4 query and 2 KV heads of 16; one token per word."""
    known = {word: number for number, word in enumerate([*WORDS, "?"])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
