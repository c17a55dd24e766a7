"""The selectors that are compared: presets, and what is changed in one of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spdk_kv.sparse import Settings, preset

# Name -> preset, and what differs from it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "codes": ("codes", {}),
    "codes, G=8": ("codes", {"group_tokens": 8}),
    "codes, G=16": ("codes", {"group_tokens": 16}),
    "codes, recent 16": ("codes", {"recent": 16}),
    "codes, recent 64": ("codes", {"recent": 64}),
    "codes, no sinks": ("codes", {"sinks": 0}),
    "codes, mean": ("codes", {"aggregation": "mean"}),
    "codes, this_norm": ("codes", {"predictor": "this_norm"}),
    "previous": ("previous", {}),
    "lowrank": ("lowrank", {}),
    "exact": ("exact", {}),
    "kvswap": ("kvswap", {}),
    "kvswap, next_norm": ("kvswap", {"predictor": "next_norm"}),
}


# At which shares of the tokens. The others differ in one thing from "codes" or "kvswap": SHARE says
# what that does. KVSwap's loss comes down to that of "codes" at far larger shares, if at all.
SHARE = 0.075
_SHARES = (0.0375, SHARE, 0.15)
_SHARES_OF = {
    "codes": _SHARES,
    "kvswap": (SHARE, 0.15, 0.3, 0.5),
}


def planned(
    selectors: Sequence[str] | None, shares: Sequence[float] | None
) -> list[tuple[str, float]]:
    """Which variants are run at which shares; None: those that the full experiment has."""
    return [
        (variant, share)
        for variant in selectors or VARIANTS
        for share in shares or _SHARES_OF.get(variant, (SHARE,))
    ]


def settings_of(variant: str, tokens: int) -> Settings:
    """The settings of ``variant`` for about ``tokens`` tokens, rounded down to whole groups."""
    name, changes = VARIANTS[variant]
    group = int(changes.get("group_tokens", Settings.group_tokens))
    return preset(name, tokens=max(tokens // group, 1) * group, **changes)
