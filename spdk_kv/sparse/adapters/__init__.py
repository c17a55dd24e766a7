"""Low-rank projections of keys that were fitted to many texts: made, stored, loaded.

`gram.py` gathers what a fit needs of the keys, and `files.py` has the file.
"""

from __future__ import annotations

from spdk_kv.sparse.adapters.files import load_adapters, save_adapters
from spdk_kv.sparse.adapters.gram import GramMatrix

__all__ = ["GramMatrix", "load_adapters", "save_adapters"]
