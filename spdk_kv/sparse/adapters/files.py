"""Adapters of a model's layers in a safetensors file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_FORMAT = "spdk_kv adapters 1"
_NAME = re.compile(r"layers\.(\d+)")


def save_adapters(
    path: str | os.PathLike[str], adapters: Mapping[int, Floats], facts: Mapping[str, str]
) -> None:
    """Writes ``adapters`` (see `load_adapters`) to ``path``, in place of what is there.

    Args:
        path: the file.
        adapters: at least one.
        facts: what they were made of, for those who look into the file.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written; what was there before is left alone.
    """
    tensors = {
        f"layers.{number}": np.ascontiguousarray(matrix, np.float32)
        for number, matrix in sorted(adapters.items())
    }
    content = _safetensors().numpy.save(tensors, {**facts, "format": _FORMAT})
    target = Path(path)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def load_adapters(path: str | os.PathLike[str]) -> dict[int, Floats]:
    """The adapters that ``spdk-kv fit`` wrote to ``path``.

    Returns:
        By number of the layer in the model: float32 [kv_heads * head_dim, rank], orthonormal
        columns, those that hold most of the keys first.

    Raises:
        ValueError: it is no such file, or damaged; names it.
        OSError: it cannot be read.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as wrong:
        raise ValueError(f"{path} is no whole safetensors file: {wrong}") from wrong
    if facts.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no adapters: `spdk-kv fit` makes such a file")
    found = {}
    for name, matrix in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or matrix.ndim != 2 or matrix.dtype != np.float32:
            raise ValueError(f"{path}: {name} is no adapter of a layer")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{path}: {name} is not finite")
        found[int(match[1])] = matrix
    return found


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as missing:
        raise ImportError(
            "adapters are in a safetensors file, and safetensors is not installed: "
            "pip install 'spdk_kv[transformers]'"
        ) from missing
    module: ModuleType = safetensors
    return module
