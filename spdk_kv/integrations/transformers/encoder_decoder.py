"""A cache for encoder-decoders: their decoder's self-attention on the drive."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

from spdk_kv.integrations.transformers.cache import OffloadedKVCache
from spdk_kv.store import KVStore


class OffloadedEncoderDecoderCache(EncoderDecoderCache):  # type: ignore[misc]
    """The KV cache of T5, BART, Whisper and the like.

    The decoder's self-attention, which grows with every token, is an :class:`OffloadedKVCache`;
    the cross-attention, computed once from the encoder's output, stays in memory. The same as
    ``EncoderDecoderCache(OffloadedKVCache(store, config), DynamicCache())``, but it can be cropped,
    which assisted decoding does, and its rows can be chosen. A context manager.

    Args:
        store: Where the tokens go.
        config: The model's configuration.
        options: Those of :class:`OffloadedKVCache` but ``name=``: without the encoder's output a
            decoder's K/V is of no use.

    Raises:
        ShapeMismatch: The model cannot be served (see :func:`layer_templates`).
    """

    self_attention_cache: OffloadedKVCache

    def __init__(self, store: KVStore, config: Any, **options: Any) -> None:
        if options.get("name") is not None:
            raise ValueError("the cache of an encoder-decoder cannot last: make it without name=")
        super().__init__(OffloadedKVCache(store, config, **options), DynamicCache())

    def check_dynamic_cache(self, method: str) -> None:
        """Nothing: both caches can do all that DynamicCache can."""

    def stats(self) -> dict[str, Any]:
        """See :meth:`OffloadedKVCache.stats`."""
        return self.self_attention_cache.stats()

    def close(self) -> None:
        """Frees the memory and deletes the tokens. May be called twice."""
        self.reset()
        self.self_attention_cache.close()

    def __enter__(self) -> OffloadedEncoderDecoderCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
