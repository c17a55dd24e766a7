"""The store: tensors under keys, and sequences of KV cache, on one drive.

Begin with `opening.py` and `store.py`. `parts.py` finds or begins what lies on the drive,
`blobs.py` is one put or get, `catalog.py` knows what is stored where, and `background.py` flushes
and closes.
"""

from __future__ import annotations

from spdk_kv.store.companions import SELECTION, SLOTS, companion_key
from spdk_kv.store.opening import open
from spdk_kv.store.options import EngineOptions, PageCacheOptions
from spdk_kv.store.parts import index_folder
from spdk_kv.store.store import KVStore
from spdk_kv.store.superblocks import read_superblock
from spdk_kv.store.why import read_why

__all__ = [
    "SELECTION",
    "SLOTS",
    "EngineOptions",
    "KVStore",
    "PageCacheOptions",
    "companion_key",
    "index_folder",
    "open",
    "read_superblock",
    "read_why",
]
