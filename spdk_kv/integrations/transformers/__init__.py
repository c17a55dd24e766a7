"""transformers: a KV cache for `generate` that is kept on the drive.

`cache.py` is what transformers sees, `stream.py` moves the layers.
"""

from __future__ import annotations

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache

__all__ = ["CACHE_ARGUMENT", "OffloadedKVCache"]
