"""How much memory the page cache could hold, and how much of a file it holds now."""

from __future__ import annotations

from spdk_kv.memory.available import (
    AvailableMemory,
    MemoryReader,
    MemorySnapshot,
    available_for_page_cache,
    cached_nbytes,
    read_memory,
)

__all__ = [
    "AvailableMemory",
    "MemoryReader",
    "MemorySnapshot",
    "available_for_page_cache",
    "cached_nbytes",
    "read_memory",
]
