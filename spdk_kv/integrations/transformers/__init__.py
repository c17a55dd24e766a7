"""transformers: a KV cache for `generate` that is kept on the drive.

`cache.py` is what transformers sees, `encoder_decoder.py` wraps it for T5 and its like; `layers.py`
and `states.py` say what each layer keeps, and where; `refusal.py` which models cannot be served;
`stream.py` moves the layers. Of which model and text they are: `identity.py`, `weights.py`
(fingerprint), `watch.py`, `history.py` (token ids), `note.py` (as stored). `prompts.py` shares what
is stored, found by `prefixes.py`.
"""

from __future__ import annotations

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.integrations.transformers.encoder_decoder import OffloadedEncoderDecoderCache
from spdk_kv.integrations.transformers.prefixes import StoredPrompt
from spdk_kv.integrations.transformers.prompts import PromptCache
from spdk_kv.integrations.transformers.sparse import SparseKVCache

__all__ = [
    "CACHE_ARGUMENT",
    "OffloadedEncoderDecoderCache",
    "OffloadedKVCache",
    "PromptCache",
    "SparseKVCache",
    "StoredPrompt",
]
