"""What a user may set in SGLang's extra configuration, and which store each rank has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from spdk_kv.store import EngineOptions, PageCacheOptions

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
_OPENING = (
    *("capacity", "create", "engine", "page_cache", "eviction"),
    *("verify", "index_dir", "flush_interval_s", "write_budget"),
)
_OURS = ("location", *_OPENING, "read_only", "identity")


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


@dataclass(frozen=True)
class Options:
    """What was set.

    ``location``: with ``{tp_rank}`` and the like still in it. ``read_only``: nothing is written,
    beside another engine that writes. ``identity``: text that tells apart what SGLang's own names
    don't, such as a fine-tuned model's revision. ``opening``: further keywords of
    :func:`spdk_kv.open`.
    """

    location: str
    read_only: bool = False
    identity: str = ""
    opening: dict[str, Any] = field(default_factory=dict)


def read_options(extra: Mapping[str, Any] | None) -> Options:
    """The options in SGLang's extra configuration. ValueError names what is wrong with them."""
    given = {key: value for key, value in (extra or {}).items() if key not in _HOST}
    unknown = sorted(given.keys() - set(_OURS))
    if unknown:
        raise ValueError(
            f"unknown in hicache-storage-backend-extra-config: {', '.join(unknown)}; spdk_kv takes "
            f"{', '.join(_OURS)}"
        )
    location = given.pop("location", None)
    if not isinstance(location, str) or not location:
        raise ValueError(
            'hicache-storage-backend-extra-config needs a "location", such as '
            '"file:///var/cache/sglang-kv"'
        )
    read_only, identity = given.pop("read_only", False), given.pop("identity", "")
    if not isinstance(read_only, bool):
        raise ValueError(f"read_only is true or false, not {read_only!r}")
    if not isinstance(identity, str):
        raise ValueError(f"identity is text, not {identity!r}")
    if isinstance(given.get("engine"), Mapping):
        given["engine"] = _made(EngineOptions, "engine", given["engine"])
    if isinstance(given.get("page_cache"), Mapping):
        given["page_cache"] = _made(PageCacheOptions, "page_cache", given["page_cache"])
    return Options(location, read_only, identity, given)


def _made(kind: type[Any], name: str, fields: Mapping[str, Any]) -> Any:
    try:
        return kind(**fields)
    except TypeError as wrong:
        raise ValueError(f"{name}: {wrong}") from None


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
