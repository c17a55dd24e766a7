"""How a store is opened, in one value; the meaning of each field is at :func:`spdk_kv.open`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from spdk_kv.residency import WriteBudget
from spdk_kv.store.options import EngineOptions, PageCacheOptions

Eviction = Literal["slru", "lru", "none"]


@dataclass(frozen=True)
class StoreSettings:
    """The arguments of :func:`spdk_kv.open`. ValueError for an unknown eviction, or what is no
    write budget."""

    capacity: int | str | None
    create: bool | None
    engine: EngineOptions
    page_cache: PageCacheOptions
    eviction: Eviction
    verify: bool
    index_dir: str | os.PathLike[str] | None
    flush_interval_s: float | None
    write_budget: str | None = None

    def __post_init__(self) -> None:
        if self.eviction not in get_args(Eviction):
            raise ValueError(f"eviction is 'slru', 'lru' or 'none', not {self.eviction!r}")
        _ = self.allowed_writes

    @property
    def allowed_writes(self) -> WriteBudget | None:
        """``write_budget``, parsed."""
        return None if self.write_budget is None else WriteBudget.parse(self.write_budget)
