"""What is kept of the keys in memory, so that a query can be scored without reading them.

One object per layer, all of one Protocol (base.py): 2-bit `Codes`, a `LowRank` projection, or the
`Exact` keys. A selection by them may be wrong, which costs quality; they never stand for the keys
in the attention.
"""

from __future__ import annotations

from spdk_kv.sparse.keys.base import Keys
from spdk_kv.sparse.keys.codes import Codes
from spdk_kv.sparse.keys.exact import Exact
from spdk_kv.sparse.keys.lowrank import LowRank
from spdk_kv.sparse.keys.making import keys_from_state, make_keys

__all__ = ["Codes", "Exact", "Keys", "LowRank", "keys_from_state", "make_keys"]
