"""Folders of transformers models, as commands take them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from spdk_kv.terminal import CommandFailed

model_option = click.option(
    "--model",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of a transformers model.",
)
gguf_option = click.option("--gguf", metavar="FILE", help="GGUF file in that folder to load.")


def load_config(folder: Path, gguf: str | None) -> Any:
    """The configuration of the model in ``folder``; no weights. Raises CommandFailed."""
    _require(gguf)
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, folder, gguf)


def load_model(folder: Path, gguf: str | None) -> tuple[Any, Any]:
    """The model in ``folder``, on the CPU, and its tokenizer. Blocks. Raises CommandFailed."""
    _require(gguf)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, folder, gguf)
    return _from_pretrained(AutoModelForCausalLM, folder, gguf, dtype="auto").eval(), tokenizer


def _from_pretrained(kind: Any, folder: Path, gguf: str | None, **options: Any) -> Any:
    if gguf is None and not (folder / "config.json").is_file():
        raise CommandFailed(
            f"{folder} has no config.json: it is not a transformers model's folder; if there is a "
            "GGUF file in it, name that with --gguf"
        )
    if gguf is not None:
        if not (folder / gguf).is_file():
            raise CommandFailed(f"there is no {gguf} in {folder}")
        options["gguf_file"] = gguf
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    # transformers has no common error for a missing file, broken JSON and an unknown model.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise CommandFailed(
            f"{folder} does not hold what transformers can load: {type(error).__name__}: {lines[0]}"
        ) from error


def _require(gguf: str | None) -> None:
    try:
        import transformers
    except ImportError as error:
        raise CommandFailed(
            f"this needs transformers, which does not load ({error}): "
            "pip install 'spdk_kv[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if gguf is not None and find_spec("gguf") is None:
        raise CommandFailed("a GGUF file needs the package gguf: pip install gguf")
