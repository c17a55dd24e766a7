"""The model that is asked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model: str, gguf: str | None) -> tuple[Any, Any]:
    """The tokenizer and the model in the folder ``model``, of its file ``gguf`` if that is given;
    in float32, whatever it is stored in."""
    where = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(model, **where)
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **where)
    return tokenizer, found.eval()
