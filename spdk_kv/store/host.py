"""What one put or get of blobs stands on: a store, seen from below."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from spdk_kv._native.holding import AtEnd
from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import Engine
from spdk_kv.index import BlobRecord
from spdk_kv.link import Links
from spdk_kv.placement import StagingPool


class BlobRecords(Protocol):
    """Where a put leaves its records and a get finds them; a store's :class:`Records`."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...
    def find(self, keys: Iterable[str]) -> list[BlobRecord]: ...
    def unpin(self, records: Iterable[BlobRecord]) -> None: ...
    def publish(self, records: dict[str, BlobRecord]) -> None: ...
    def drop_damaged(self, key: str, record: BlobRecord) -> None: ...


class Extents(Protocol):
    """Where a put gets its extents; a store's :class:`Room`."""

    def allocate(self, sizes: Sequence[int], deadline: Deadline = NEVER) -> list[int]: ...
    def abandon(self, offsets: Sequence[int]) -> None: ...


class Deferred(Protocol):
    """What has to wait until the drive or a mapping lets go; a store's :class:`Quarantine`."""

    def release(self, transfers: Sequence[Transfer], action: Callable[[], None]) -> None: ...
    def unpin_at_end(self, record: BlobRecord) -> AtEnd: ...


class Books(Protocol):
    """The part of a store's :class:`Catalog` that blobs use."""

    @property
    def records(self) -> BlobRecords: ...
    @property
    def room(self) -> Extents: ...
    @property
    def quarantine(self) -> Deferred: ...


class Host(Protocol):
    """What blobs stand on; a :class:`KVStore`."""

    engine: Engine
    staging: StagingPool
    links: Links
    verify: bool
    mappings: weakref.WeakSet[mmap.mmap]

    @property
    def catalog(self) -> Books: ...
    @property
    def location(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
