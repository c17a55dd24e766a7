"""Tiny models with random weights, as GGUF files; texts for them; and stores in their memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 2048
WIDTH = 128
LAYERS = 2
HEADS = 4
KV_HEADS = 2
VOCABULARY = 259  # <unk>, <s>, </s>, and a token per byte

# The host goes on beyond what was asked after the first byte of a longer character.
_ONLY_ASCII = dict.fromkeys((0, 1, 2, *range(3 + 128, VOCABULARY)), -1000.0)

Tensor = Callable[..., None]


def write_llama(path: Path, *, seed: int = 0) -> Path:
    """A transformer of two layers, in which every token sees every one before."""
    writer, tensor = _begin(path, "llama", seed)
    _heads(writer)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    _transformer(tensor)
    return _end(writer, path)


def write_sliding(path: Path, *, window: int = 64, seed: int = 0) -> Path:
    """Gemma's kind: some of its layers see a window only."""
    writer, tensor = _begin(path, "gemma3", seed)
    _heads(writer)
    writer.add_key_length(WIDTH // HEADS)
    writer.add_value_length(WIDTH // HEADS)
    writer.add_sliding_window(window)
    _transformer(tensor)
    for layer in range(LAYERS):
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensor(f"blk.{layer}.{name}.weight", WIDTH, ones=True)
        for name in ("attn_q_norm", "attn_k_norm"):
            tensor(f"blk.{layer}.{name}.weight", WIDTH // HEADS, ones=True)
    return _end(writer, path)


def write_mamba(path: Path, *, seed: int = 0) -> Path:
    """A recurrent model: its state is of no token in particular."""
    writer, tensor = _begin(path, "mamba", seed)
    inner, states, rank, kernel = 2 * WIDTH, 16, 4, 4
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(states)
    writer.add_ssm_time_step_rank(rank)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        tensor(f"{block}.attn_norm.weight", WIDTH, ones=True)
        tensor(f"{block}.ssm_in.weight", 2 * inner, WIDTH)
        tensor(f"{block}.ssm_conv1d.weight", inner, kernel)
        tensor(f"{block}.ssm_conv1d.bias", inner)
        tensor(f"{block}.ssm_x.weight", rank + 2 * states, inner)
        tensor(f"{block}.ssm_dt.weight", inner, rank)
        tensor(f"{block}.ssm_dt.bias", inner)
        # Negative: what a token left fades.
        tensor(f"{block}.ssm_a", inner, states, value=-1.0)
        tensor(f"{block}.ssm_d", inner, ones=True)
        tensor(f"{block}.ssm_out.weight", WIDTH, inner)
    return _end(writer, path)


def text(seed: int, tokens: int) -> list[int]:
    """Token ids, other ones for another seed from the second token on."""
    drawn = np.random.default_rng(seed).integers(3, VOCABULARY, tokens)
    drawn[0] = 1
    return [int(token) for token in drawn]


def open_llama(path: Path, **options: Any) -> Any:
    """The model in the file, on one thread: its numbers are the same each time."""
    import llama_cpp

    options = {"n_ctx": CONTEXT, "n_batch": 256, "n_threads": 1, "verbose": False, **options}
    return llama_cpp.Llama(str(path), n_threads_batch=1, seed=1, **options)


def answer(llama: Any, tokens: list[int], count: int = 8) -> list[int]:
    """The tokens that ``llama`` finds most likely after ``tokens``, by way of its cache."""
    import llama_cpp

    found: list[int] = []

    def watch(ids: Any, scores: Any) -> bool:
        found[:] = [int(token) for token in ids]
        return False

    llama.create_completion(
        tokens,
        max_tokens=count,
        temperature=0.0,
        repeat_penalty=1.0,
        logit_bias=_ONLY_ASCII,
        stopping_criteria=llama_cpp.StoppingCriteriaList([watch]),
    )
    return found[len(tokens) :]


def evaluated(llama: Any, run: Callable[[], Any]) -> int:
    """How many tokens ``llama`` computes during ``run()``."""
    counted = 0
    compute = llama.eval

    def count(tokens: Any) -> None:
        nonlocal counted
        counted += len(tokens)
        compute(tokens)

    llama.eval = count
    try:
        run()
    finally:
        del llama.eval
    return counted


def _heads(writer: Any) -> None:
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)


def _transformer(tensor: Tensor) -> None:
    narrow = WIDTH * KV_HEADS // HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"{block}.{name}.weight", WIDTH, ones=True)
        for name, rows in (("q", WIDTH), ("k", narrow), ("v", narrow), ("output", WIDTH)):
            tensor(f"{block}.attn_{name}.weight", rows, WIDTH)
        for name in ("gate", "up"):
            tensor(f"{block}.ffn_{name}.weight", 2 * WIDTH, WIDTH)
        tensor(f"{block}.ffn_down.weight", WIDTH, 2 * WIDTH)


def _begin(path: Path, architecture: str, seed: int) -> tuple[Any, Tensor]:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    kinds = gguf.TokenType
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256])
    random = np.random.default_rng(seed)

    def tensor(name: str, *shape: int, ones: bool = False, value: float | None = None) -> None:
        drawn = random.standard_normal(shape).astype(np.float32) * 0.3
        if ones:
            drawn = np.ones(shape, np.float32)
        elif value is not None:
            drawn = np.full(shape, value, np.float32)
        writer.add_tensor(name, drawn)

    tensor("token_embd.weight", VOCABULARY, WIDTH)
    tensor("output_norm.weight", WIDTH, ones=True)
    tensor("output.weight", VOCABULARY, WIDTH)
    return writer, tensor


def _end(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
