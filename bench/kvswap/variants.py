"""The selectors that are compared: presets, and what is changed in one of them at a time."""

from __future__ import annotations

from typing import Any

from spdk_kv.sparse import Settings, preset

# Name -> preset, and what differs from it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "codes": ("codes", {}),
    "codes, G=8": ("codes", {"group_tokens": 8}),
    "codes, G=16": ("codes", {"group_tokens": 16}),
    "codes, no recent": ("codes", {"recent": 0}),
    "codes, no sinks": ("codes", {"sinks": 0}),
    "codes, recent 64": ("codes", {"recent": 64}),
    "codes, mean": ("codes", {"aggregation": "mean"}),
    "codes, this_norm": ("codes", {"predictor": "this_norm"}),
    "previous": ("previous", {}),
    "lowrank": ("lowrank", {}),
    "exact": ("exact", {}),
    "kvswap": ("kvswap", {}),
    "kvswap, next_norm": ("kvswap", {"predictor": "next_norm"}),
}


def settings_of(variant: str, tokens: int) -> Settings:
    """The settings of ``variant`` for about ``tokens`` tokens, rounded down to whole groups."""
    name, changes = VARIANTS[variant]
    group = int(changes.get("group_tokens", Settings.group_tokens))
    return preset(name, tokens=max(tokens // group, 1) * group, **changes)
