"""vLLM: a secondary tier of its offloading connector, kept in a store.

`tier.py` is what vLLM's scheduler calls, `host.py` makes a class of vLLM's out of it; `options.py`
is what a configuration may say, `identity.py` what keeps the blocks of other models apart,
`waiting.py` how much may wait for the drive.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SpdkKvTier"]


def __getattr__(name: str) -> Any:
    # With the class comes vLLM; the rest of this folder can be used where vLLM is not installed.
    if name == "SpdkKvTier":
        from spdk_kv.integrations.vllm.host import SpdkKvTier

        return SpdkKvTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
