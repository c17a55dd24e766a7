"""Where bytes lie: extents on the drive, layers within them, staging memory beside them.

`allocator.py` hands out extents, `layout.py` places a sequence in its own, `superblock.py` keeps a
drive and its index together, `count.py` shows an old copy of an index, `lock.py` keeps other
processes out, `ranges.py` is a set of bytes, `staging.py` has memory for DMA.
"""

from __future__ import annotations

from spdk_kv.placement.allocator import Allocator, damaged_extents
from spdk_kv.placement.count import COUNT_NBYTES, COUNT_OFFSET, pack_count, parse_count
from spdk_kv.placement.layout import CHUNK_NBYTES, SequenceLayout
from spdk_kv.placement.lock import CommandsLock, StoreLock, owner_of
from spdk_kv.placement.ranges import Ranges
from spdk_kv.placement.staging import StagingPool
from spdk_kv.placement.superblock import (
    COPY_OFFSETS,
    DATA_START,
    SUPERBLOCK_NBYTES,
    Superblock,
    choose,
    fit_drive_id,
    pack,
)

__all__ = [
    "CHUNK_NBYTES",
    "COPY_OFFSETS",
    "COUNT_NBYTES",
    "COUNT_OFFSET",
    "DATA_START",
    "SUPERBLOCK_NBYTES",
    "Allocator",
    "CommandsLock",
    "Ranges",
    "SequenceLayout",
    "StagingPool",
    "StoreLock",
    "Superblock",
    "choose",
    "damaged_extents",
    "fit_drive_id",
    "owner_of",
    "pack",
    "pack_count",
    "parse_count",
]
