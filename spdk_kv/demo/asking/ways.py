"""The ways to keep the KV cache that the demo compares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdk_kv.integrations.transformers import OffloadedKVCache, SparseKVCache
    from spdk_kv.store import KVStore

# A twelfth of the demo's prompt.
_SELECTED_TOKENS = 256


@dataclass(frozen=True)
class Way:
    """A way to keep the KV cache.

    Attributes:
        name: What to call it, in at most 15 characters.
        open: Makes an empty cache for the model.
        resident_nbytes: The most bytes that a used cache held in memory at once.
        exact: Whether it has to give the tokens of the first way. One that has not may refuse a
            model (ShapeMismatch), and is left out then.
    """

    name: str
    open: Callable[[KVStore, Any], AbstractContextManager[Any]]
    resident_nbytes: Callable[[Any], int]
    exact: bool = True


def _in_memory(store: KVStore, model: Any) -> AbstractContextManager[Any]:
    from transformers import DynamicCache

    return nullcontext(DynamicCache(config=model.config))


def _all_nbytes(cache: Any) -> int:
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _on_drive(store: KVStore, model: Any) -> AbstractContextManager[Any]:
    from spdk_kv.integrations.transformers import OffloadedKVCache

    return OffloadedKVCache(store, model)


def _layers_nbytes(cache: OffloadedKVCache) -> int:
    sequence = cache.sequence
    if sequence is None:
        return 0
    peak = int(cache.stats()["resident_layers_peak"])
    return sequence.nbytes // sequence.shape.layers * peak


def _a_part(store: KVStore, model: Any) -> AbstractContextManager[Any]:
    from spdk_kv.integrations.transformers import SparseKVCache

    return SparseKVCache(store, model, tokens=_SELECTED_TOKENS)


def _selection_nbytes(cache: SparseKVCache) -> int:
    stats = cache.stats()
    return int(stats["resident_nbytes"] + stats["metadata_nbytes"])


WAYS = (
    Way("in memory", _in_memory, _all_nbytes),
    Way("from the drive", _on_drive, _layers_nbytes),
    # Tokens that nothing was read of have no say, so that others may come.
    Way("a part of it", _a_part, _selection_nbytes, exact=False),
)
