"""transformers: a KV cache for `generate` that is kept on the drive.

`cache.py` is what transformers sees, `encoder_decoder.py` wraps it for T5 and its like; `layers.py`
and `states.py` say what each layer keeps, and where; `refusal.py` which models cannot be served;
`stream.py` moves the layers.
"""

from __future__ import annotations

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.integrations.transformers.encoder_decoder import OffloadedEncoderDecoderCache

__all__ = ["CACHE_ARGUMENT", "OffloadedEncoderDecoderCache", "OffloadedKVCache"]
