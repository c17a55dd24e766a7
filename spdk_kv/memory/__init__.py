"""How much memory there is for the page cache: by the machine, its cgroups, and what is cached."""

from __future__ import annotations

from spdk_kv.memory.budget import (
    Budget,
    MemoryReader,
    MemorySnapshot,
    cached_nbytes,
    page_cache_budget,
    read_memory,
)

__all__ = [
    "Budget",
    "MemoryReader",
    "MemorySnapshot",
    "cached_nbytes",
    "page_cache_budget",
    "read_memory",
]
