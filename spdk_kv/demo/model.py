"""The demo's model, tokenizer and text."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from spdk_kv.terminal import CommandFailed

if TYPE_CHECKING:
    import torch

_SEED = 0
_LAYERS = 8
# Wide enough that the text does not end in a loop of one byte, as it does at transformers' 0.02.
_INITIALIZER_RANGE = 0.08
_GGUF = b"GGUF"  # what such a file begins with


class Tokenizer(Protocol):
    """What the demo needs of a tokenizer; those of transformers have it."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """One token per byte of the UTF-8 text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@dataclass(frozen=True)
class DemoModel:
    """A causal language model of transformers, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Tokenizer
    label: str
    trained: bool


def require_transformers() -> None:
    """Raises CommandFailed where transformers cannot be imported."""
    try:
        import transformers
    except ImportError as error:
        raise CommandFailed(
            f"the demo needs transformers, which does not load ({error}): "
            "pip install 'spdk_kv[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def random_model(most_tokens: int, layers: int = _LAYERS) -> DemoModel:
    """A small Llama over bytes, float32, with the same random weights every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=most_tokens,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config).eval()
    return DemoModel(model, ByteTokenizer(), "a small Llama with random weights", False)


def load_model(path: Path) -> DemoModel:
    """The model and tokenizer in the folder or GGUF file ``path``, on the CPU. Blocks.

    A GGUF file takes much longer than a folder, and its weights take the memory of whole ones.

    Raises:
        CommandFailed: There is none, transformers cannot load it, or `gguf` is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, where = path, {}
    if path.is_file():
        _require_gguf(path)
        folder, where = path.parent, {"gguf_file": path.name}
    elif not (path / "config.json").is_file():
        raise CommandFailed(f"{path} has no config.json: it is not a transformers model's folder")
    options: dict[str, Any] = {"local_files_only": True, **where}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    # transformers has no common error for a missing file, broken JSON and an unknown model.
    except Exception as error:
        raise CommandFailed(
            f"{path} does not hold a model and tokenizer that transformers can load: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    label = path.stem if where else path.resolve().name
    return DemoModel(model.eval(), tokenizer, label, True)


def _require_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_GGUF)) != _GGUF:
            raise CommandFailed(f"{path} is neither a GGUF file nor a transformers model's folder")
    if find_spec("gguf") is None:
        raise CommandFailed("a GGUF file needs the package gguf: pip install 'spdk_kv[demo]'")


def read_text(path: Path | None) -> str:
    """The text in ``path``, or the demo's own story.

    Raises click.BadParameter if it is empty or not UTF-8.
    """
    if path is None:
        return (files("spdk_kv.demo") / "text.txt").read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(
            f"{path} is not UTF-8 text (byte {error.start})", param_hint="'--text'"
        ) from error
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", param_hint="'--text'") from error
    if not text.strip():
        raise click.BadParameter(f"{path} holds no text", param_hint="'--text'")
    return text


def prompt_tokens(tokenizer: Tokenizer, text: str, count: int) -> torch.Tensor:
    """The first ``count`` tokens of ``text``, ``[1, count]``.

    Raises click.BadParameter if the text is too short.
    """
    import torch

    tokens = tokenizer.encode(text)
    if len(tokens) < count:
        raise click.BadParameter(
            f"the text has only {len(tokens)} tokens, not {count}; lower it to {len(tokens)}, or "
            "name a longer text with --text",
            param_hint="'--prompt-tokens'",
        )
    return torch.tensor([tokens[:count]])


def kv_nbytes(chosen: DemoModel, tokens: int) -> int:
    """Bytes of K and V that ``tokens`` of one row take at most."""
    config = chosen.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    token_nbytes = int(kv_heads * head_dim * chosen.model.dtype.itemsize)
    return 2 * int(config.num_hidden_layers) * token_nbytes * tokens
