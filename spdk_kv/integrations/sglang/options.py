"""What a user may set in SGLang's extra configuration, and which store each rank has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from spdk_kv.integrations.opening import Opening, read_opening

# What SGLang itself reads from the same table.
_HOST = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "tp_lcm_size",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
    }
)


class StorageConfig(Protocol):
    """The part of SGLang's HiCacheStorageConfig that is looked at."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    model_name: str | None
    extra_config: dict[str, Any] | None
    enable_storage_metrics: bool


def read_options(extra: Mapping[str, Any] | None) -> Opening:
    """The store that SGLang's extra configuration names; its location with ``{tp_rank}`` and the
    like still in it. ValueError names what is wrong."""
    given = {key: value for key, value in (extra or {}).items() if key not in _HOST}
    return read_opening(given, "hicache-storage-backend-extra-config")[0]


def place(location: str, config: StorageConfig, *, shared: bool) -> str:
    """The location of the store of the rank that ``config`` is for.

    One process owns a store, and each rank of SGLang is one. ``{tp_rank}``, ``{pp_rank}``,
    ``{cp_rank}`` and ``{dp_rank}`` in a location are filled in; without them a store in a folder
    gets a folder below it where there are several ranks.

    Args:
        location: As it was set.
        config: SGLang's.
        shared: The store of what all tensor-parallel ranks have alike, which one of them writes.

    Raises:
        ValueError: There are several ranks, and the location is that of one drive.
    """
    ranks = {
        "tp": (0 if shared else config.tp_rank, 1 if shared else config.tp_size),
        "pp": (config.pp_rank, config.pp_size),
        "cp": (config.attn_cp_rank, config.attn_cp_size),
    }
    several = {name: f"{rank}of{size}" for name, (rank, size) in ranks.items() if size > 1}
    # With data-parallel attention; of how many, SGLang doesn't say.
    dp_rank = getattr(config, "dp_rank", 0)
    if dp_rank:
        several["dp"] = str(dp_rank)
    filled = location.replace("{dp_rank}", str(dp_rank))
    for name, (rank, _) in ranks.items():
        filled = filled.replace(f"{{{name}_rank}}", str(rank))
    left = [name for name in several if f"{{{name}_rank}}" not in location]
    if not left:
        return filled
    if "://" in filled and not filled.startswith("file://"):
        asked = ", ".join(f"{{{name}_rank}}" for name in left)
        raise ValueError(
            f"{location} is one store, and each rank of SGLang needs its own: write {asked} where "
            "the locations differ, or use a folder (file:///...)"
        )
    return os.path.join(filled, "-".join(f"{name}{several[name]}" for name in left))
