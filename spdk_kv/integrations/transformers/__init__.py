"""transformers: a KV cache for `generate` that lies on the drive."""

from __future__ import annotations

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache

__all__ = ["CACHE_ARGUMENT", "OffloadedKVCache"]
