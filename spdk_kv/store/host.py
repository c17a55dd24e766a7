"""What one put or get of blobs stands on: a store, seen from below."""

from __future__ import annotations

import mmap
import weakref
from typing import Protocol

from spdk_kv.engines import Engine
from spdk_kv.link import Links
from spdk_kv.placement import StagingPool
from spdk_kv.store.catalog import Catalog


class Host(Protocol):
    """What blobs stand on; a :class:`KVStore`."""

    engine: Engine
    catalog: Catalog
    staging: StagingPool
    links: Links
    verify: bool
    mappings: weakref.WeakSet[mmap.mmap]

    @property
    def location(self) -> str: ...
