"""Where bytes lie: extents on the drive, layers within them, staging memory beside them.

`allocator.py` hands out extents, `layout.py` says how a sequence's tokens lie in its own and
`pieces.py` where on the drive those are, `superblock.py` keeps a drive and its index together,
`count.py` shows an old copy of an index, `lock.py` keeps other processes out, `ranges.py` is a set
of bytes, `staging.py` has memory for DMA.
"""

from __future__ import annotations

from spdk_kv.placement.allocator import Allocator, damaged_extents
from spdk_kv.placement.count import COUNT_NBYTES, COUNT_OFFSET, pack_count, parse_count
from spdk_kv.placement.layout import (
    CHUNK_NBYTES,
    LayerLayout,
    SequenceLayout,
    with_small_chunks,
)
from spdk_kv.placement.lock import CommandsLock, StoreLock, owner_of
from spdk_kv.placement.pieces import Ground, Piece, Stretch, grounds, locate
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
    "Ground",
    "LayerLayout",
    "Piece",
    "Ranges",
    "SequenceLayout",
    "StagingPool",
    "StoreLock",
    "Stretch",
    "Superblock",
    "choose",
    "damaged_extents",
    "fit_drive_id",
    "grounds",
    "locate",
    "owner_of",
    "pack",
    "pack_count",
    "parse_count",
    "with_small_chunks",
]
