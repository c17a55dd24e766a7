"""How a store is opened, in one value; the meaning of each field is at :func:`spdk_kv.open`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from spdk_kv.engines import EngineOptions
from spdk_kv.residency import make_policy

Eviction = Literal["lru", "none"]


@dataclass(frozen=True)
class StoreSettings:
    """The arguments of :func:`spdk_kv.open`, sizes parsed. ValueError for an unknown residency."""

    capacity: int | str | None
    engine: str | None
    eviction: Eviction
    verify: bool
    create: bool | None
    index_dir: str | os.PathLike[str] | None
    options: EngineOptions
    staging_nbytes: int
    residency: str
    page_cache_nbytes: int | None
    page_cache_dir: str | None
    mmap: bool
    discard: bool
    flush_interval_s: float | None

    def __post_init__(self) -> None:
        make_policy(self.residency)  # before anything is begun at the location
