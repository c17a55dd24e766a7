"""Room for new extents: allocation, growth of the data file, and eviction where a store is full."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from spdk_kv.engines import Engine
from spdk_kv.errors import CapacityError
from spdk_kv.store.committer import Committer
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.quarantine import Quarantine
from spdk_kv.store.records import Records
from spdk_kv.store.settings import Eviction
from spdk_kv.units import align_up

# A full store evicts at least this share of what it holds at once: every eviction costs a commit.
_EVICTED_SHARE = 32


class Room:
    """Hands out extents, and makes room for them. Thread-safe."""

    def __init__(
        self,
        records: Records,
        quarantine: Quarantine,
        committer: Committer,
        engine: Engine,
        eviction: Eviction,
    ) -> None:
        self._records = records
        self._quarantine = quarantine
        self._committer = committer
        self._engine = engine
        self._eviction = eviction
        self._growth_lock = threading.Lock()

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """Extents for ``sizes`` bytes each, all or none.

        Where there is no room: commits, so that retired extents come free, then evicts blobs if
        that is allowed (both block on the drive). CapacityError.
        """
        records = self._records
        self._quarantine.settle()
        wanted = 0
        while True:
            refusal = None
            with records.lock:
                freed_count = records.extents.freed_count
                try:
                    offsets = records.extents.allocate(sizes)
                except CapacityError as full:
                    refusal = full
            if refusal is None:
                refusal = self._back(offsets, sizes)
                if refusal is None:
                    return offsets
            more = self._make_room(sizes, wanted, freed_count)
            if more is None:
                raise refusal
            wanted = more

    def abandon(self, offsets: Sequence[int]) -> None:
        """Takes extents back that no record ever named."""
        with self._records.lock:
            self._records.extents.abandon(offsets)

    def _back(self, offsets: Sequence[int], sizes: Sequence[int]) -> CapacityError | None:
        """Makes the data file reach the extents; gives them up where it cannot."""
        end = max(o + align_up(n, BLOCK_NBYTES) for o, n in zip(offsets, sizes, strict=True))
        try:
            # One at a time: a growth that fails takes back what it added to the file.
            with self._growth_lock:
                self._engine.ensure(end, self._records.extents.allocator.end)
        except CapacityError as full:
            self.abandon(offsets)
            return full
        except BaseException:
            self.abandon(offsets)
            raise
        return None

    def _make_room(self, sizes: Sequence[int], wanted: int, freed_count: int) -> int | None:
        """Frees something, by eviction at least ``wanted`` bytes. Returns how much to evict next
        time if that was not enough; None if nothing can be freed.

        ``freed_count``: the extent table's when there was no room.
        """
        records = self._records
        # A commit under way may be about to free something.
        with self._committer.lock, records.lock:
            if records.extents.freed_count != freed_count:
                return wanted
            allocator = records.extents.allocator
            if not records.extents.has_retired and self._eviction == "lru":
                if sum(sizes) > allocator.free_nbytes + records.blob_nbytes:
                    # Nothing would be won by losing everything.
                    return None
                records.evict(max(wanted, sum(sizes), allocator.used_nbytes // _EVICTED_SHARE))
            if not records.extents.has_retired:
                return None
        self._committer.commit()
        # What was evicted was enough by size but not by shape: free space is fragmented.
        return max(2 * wanted, sum(sizes))
