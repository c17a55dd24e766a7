"""LMCache 0.5.6: a store as its second level (L2), below the memory of the server.

`client.py` is what its adapter `native_plugin` drives, and needs nothing of LMCache; `adapter.py`
is the same for its adapter `plugin`, and tells LMCache what is stored; `options.py` says what may
be set.
"""

from __future__ import annotations

from spdk_kv.integrations.lmcache.client import Client

__all__ = ["Client"]
