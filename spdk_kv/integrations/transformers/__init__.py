"""transformers: a KV cache for `generate` that is kept on the drive.

`cache.py` is what transformers sees, `stream.py` moves the layers. Of which model and text they
are: `identity.py`, `weights.py` (fingerprint), `watch.py`, `history.py` (token ids), `note.py` (as
stored). `prompts.py` shares what is stored, found by `prefixes.py`.
"""

from __future__ import annotations

from spdk_kv.integrations.transformers.cache import CACHE_ARGUMENT, OffloadedKVCache
from spdk_kv.integrations.transformers.prefixes import StoredPrompt
from spdk_kv.integrations.transformers.prompts import PromptCache

__all__ = ["CACHE_ARGUMENT", "OffloadedKVCache", "PromptCache", "StoredPrompt"]
