"""SGLang: a storage tier (L3) of its hierarchical cache. Tested with SGLang 0.5.23.

`backend.py` is what SGLang calls; `options.py` what a user may set, and which rank has which store;
`stores.py` opens them. `identity.py` says whose pages they are, `pools.py` how a page lies in the
host's memory, `hits.py` how much of a prompt is there. SGLang itself is imported when the class is
first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdk_kv.integrations.sglang.backend import Backend as HiCacheSpdkKv

__all__ = ["HiCacheSpdkKv"]


def __getattr__(name: str) -> Any:
    if name != "HiCacheSpdkKv":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    from spdk_kv.integrations.sglang.backend import Backend

    # Ours first: the host's class has defaults for methods that it can do without.
    made = type(
        name, (Backend, HiCacheStorage), {"__module__": __name__, "__doc__": Backend.__doc__}
    )
    globals()[name] = made
    return made
