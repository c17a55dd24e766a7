"""Reading a part: which groups of tokens a decode step attends to, and which of them are in memory.

Pure functions of numbers: no drive, no clock. `settings.py` says what there is to choose. The
`Selector` of a layer (selection.py) holds what is kept of its keys (keys/) and chooses groups by a
query that was predicted (predictor.py); its `Pool` (pool.py) knows which groups are resident.
"""

from __future__ import annotations

from spdk_kv.sparse.adapters import load_adapters
from spdk_kv.sparse.keys import Codes, Exact, Keys, LowRank, make_keys
from spdk_kv.sparse.pool import Pool
from spdk_kv.sparse.predictor import norm_of, predict
from spdk_kv.sparse.selection import Selector
from spdk_kv.sparse.settings import Settings, preset, presets

__all__ = [
    "Codes",
    "Exact",
    "Keys",
    "LowRank",
    "Pool",
    "Selector",
    "Settings",
    "load_adapters",
    "make_keys",
    "norm_of",
    "predict",
    "preset",
    "presets",
]
