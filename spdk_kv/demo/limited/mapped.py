"""What people try first when a KV cache outgrows memory: tensors in memory-mapped files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class MappedLayer(DynamicLayer):  # type: ignore[misc]
    """K and V of one layer in two files of ``folder``, token after token.

    The kernel's page cache is the only memory that they take.
    """

    def __init__(self, folder: Path, number: int, max_tokens: int) -> None:
        super().__init__()
        self._folder = folder
        self._number = number
        self._max_tokens = max_tokens
        self._files: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens; returns views of all, ``[batch, kv_heads, tokens, head_dim]``."""
        past = self.get_seq_length()
        if not self._files:
            self.lazy_initialization(key_states, value_states)
            self._files = tuple(
                self._map(name, new) for name, new in (("k", key_states), ("v", value_states))
            )
        until = past + key_states.shape[2]
        for mapped, new in zip(self._files, (key_states, value_states), strict=True):
            mapped[past:until] = new.permute(2, 0, 1, 3)
        self.keys, self.values = (mapped[:until].permute(1, 2, 0, 3) for mapped in self._files)
        return self.keys, self.values

    def _map(self, name: str, new: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_dim = new.shape
        shape = (self._max_tokens, batch, heads, head_dim)
        path = self._folder / f"{self._number}.{name}"
        size = torch.Size(shape).numel()
        return torch.from_file(str(path), shared=True, size=size, dtype=new.dtype).view(shape)


def mapped_cache(config: Any, folder: Path, max_tokens: int) -> DynamicCache | None:
    """A DynamicCache whose tensors are files in ``folder``.

    None for a model with layers of another kind, such as sliding windows.
    """
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [MappedLayer(folder, number, max_tokens) for number in range(len(cache.layers))]
    return cache
