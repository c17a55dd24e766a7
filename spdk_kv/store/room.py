"""Room for new extents: allocation, growth of the data file, and eviction where a store is full."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import CapacityError
from spdk_kv.index import IndexFull
from spdk_kv.store.backing import Backing
from spdk_kv.store.committer import Committer
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.quarantine import Quarantine
from spdk_kv.store.records import Records
from spdk_kv.store.reserved import Reserved, Turn
from spdk_kv.store.settings import Eviction
from spdk_kv.store.windows import Windows
from spdk_kv.units import align_down, align_up, format_nbytes

# Every eviction costs a commit, so more is evicted at once than the request needs, for requests to
# come: at most this share of what the store holds
_SHARE_AHEAD = 32
# and half of what was evicted before, so that a store that was just opened loses little to a few
# requests. Nothing for one that is so much larger than usual: its like will not come soon.
_SHARE_OF_EVICTED = 2
_UNUSUAL = 4
# How fast "usual" follows the requests: each counts for this share.
_USUAL_SHARE = 16
# For records that the index has no room for, at most this many times their size is evicted from it.
_MOST_FOR_INDEX = 4

log = logging.getLogger(__name__)


class Within(NamedTuple):
    """Where extents may lie: below ``end`` (None: anywhere), and in ``holes`` or not."""

    end: int | None = None
    holes: bool = True


class Room:
    """Hands out extents, and makes room for them. Thread-safe."""

    def __init__(
        self,
        records: Records,
        quarantine: Quarantine,
        committer: Committer,
        backing: Backing,
        reserved: Reserved,
        eviction: Eviction,
    ) -> None:
        self._records = records
        self._quarantine = quarantine
        self._committer = committer
        self._backing = backing
        self._reserved = reserved
        self._engine = backing.engine
        self._eviction = eviction
        self._growth_lock = backing.lock
        self._usual_nbytes = 0.0
        self._evicted_nbytes = 0

    def allocate(self, sizes: Sequence[int], deadline: Deadline = NEVER) -> list[int]:
        """Extents for ``sizes`` bytes each, all or none.

        Where there is no room: commits, so that retired extents come free, then evicts blobs if
        that is allowed (both block on the drive). CapacityError, and nothing is evicted, where
        there would be no room even without any blob.
        """
        self._committer.data.check()  # or it would be kept for nothing
        self._quarantine.settle()
        asked = sizes[0] if len(sizes) == 1 else sum(sizes)
        self._usual_nbytes += (asked - self._usual_nbytes) / _USUAL_SHARE
        self._backing.taken_nbytes += asked
        turn = Turn()
        try:
            offsets = self._allocate(sizes, turn, deadline)
        finally:
            if self._reserved.is_wanted:
                self._reserved.end(turn)
        try:
            self._committer.settle(deadline)
        except BaseException:
            self.abandon(offsets)
            raise
        return offsets

    def _allocate(self, sizes: Sequence[int], turn: Turn, deadline: Deadline) -> list[int]:
        """As :meth:`allocate`; what commits let go of may not be over on the drive yet."""
        records = self._records
        within = Within()
        while True:
            with records.lock:
                freed_count = records.extents.freed_count
                try:
                    with self._only(within):
                        offsets = records.extents.allocate(sizes, within.end)
                except CapacityError as full:
                    refusal = full
                    offsets = []
            if not offsets:
                self._make_room(sizes, within, freed_count, refusal, turn, deadline)
                continue
            narrower = self._back(offsets, sizes, within, deadline)
            if narrower is None:
                return offsets
            within = narrower

    def abandon(self, offsets: Sequence[int]) -> None:
        """Takes extents back that no record ever named."""
        with self._records.lock:
            self._records.extents.abandon(offsets)

    def commit(self, deadline: Deadline = NEVER) -> None:
        """As :meth:`Committer.commit`; where the index has no room for the records, evicts the
        blobs used longest ago for it, if that is allowed."""
        most: int | None = None
        while True:
            try:
                self._committer.commit(deadline)
            except IndexFull:
                with self._records.lock:
                    if most is None:
                        most = _MOST_FOR_INDEX * max(self._records.pending_index_nbytes, 1 << 20)
                    if self._eviction != "lru" or most <= 0:
                        raise
                    evicted = self._records.evict_for_index(1 << 20)
                most -= evicted
                if not evicted:
                    raise
                log.warning("the index is full: evicted the oldest blobs to make room in it")
            else:
                return

    def _only(self, within: Within) -> AbstractContextManager[None]:
        """A context in which extents are handed out within these bounds. Under the records' lock,
        as far as holes are concerned; ``end`` is for the callers."""
        if within.holes:
            return nullcontext()
        return self._records.extents.allocator.without(self._backing.holes())

    def _back(
        self, offsets: Sequence[int], sizes: Sequence[int], within: Within, deadline: Deadline
    ) -> Within | None:
        """Makes the data file reach the extents and have blocks for them. Where it cannot, gives
        them up and returns where it can."""
        if len(sizes) == 1:  # most often, and put() is to be fast
            end = offsets[0] + align_up(sizes[0], BLOCK_NBYTES)
        else:
            end = max(o + align_up(n, BLOCK_NBYTES) for o, n in zip(offsets, sizes, strict=True))
        index_nbytes = 0
        is_growing = end > self._backing.reach
        try:
            if is_growing:
                # One at a time: a growth that fails takes back what it added to the file.
                with deadline.hold(self._growth_lock, "the growth of the data file"):
                    index_nbytes = self._expected_index_growth(end)
                    self._engine.ensure(end, self._records.extents.allocator.end, index_nbytes)
                    self._backing.reach = max(self._backing.reach, end)
                is_growing = False
            if self._backing.lacks(offsets, sizes):
                index_nbytes = self._expected_index_growth(end)
                self._backing.fill(offsets, sizes, index_nbytes, deadline)
        except CapacityError:
            self.abandon(offsets)
            if not is_growing:
                return within._replace(holes=False)
            reached = self._engine.growable_to(index_nbytes) or 0
            return within._replace(end=align_down(min(reached, end - 1), BLOCK_NBYTES))
        except BaseException:
            self.abandon(offsets)
            raise
        return None

    def _expected_index_growth(self, end: int) -> int:
        """Bytes that the index will take up beyond what it has, if the data file up to ``end`` is
        used as it is used now."""
        index, records = self._committer.index, self._records
        if index is None or not records.blob_nbytes:
            return 0
        expected = records.index_nbytes * (end / records.blob_nbytes)
        return max(0, int(expected) - index.nbytes)

    def _make_room(
        self,
        sizes: Sequence[int],
        within: Within,
        freed_count: int,
        refusal: CapacityError,
        turn: Turn,
        deadline: Deadline,
    ) -> None:
        """Frees something ``within`` bounds, or raises CapacityError and says what is lacking.

        ``freed_count``: the extent table's when there was no room; ``refusal``: what it said.
        """
        records = self._records
        # A commit under way may be about to free something.
        with deadline.hold(self._committer.lock, "a commit"), records.lock:
            if records.extents.freed_count != freed_count:
                return
            is_reserved = bool(self._reserved) and not records.extents.has_retired
            if not is_reserved and not records.extents.has_retired:
                if self._eviction != "lru":
                    raise self._lacking(refusal, within, "")
                with self._only(within):
                    self._evict(sizes, within, refusal)
        if is_reserved:  # it is free, and comes back
            self._reserved.wait(turn, deadline)
        else:
            self.commit(deadline)

    def _evict(self, sizes: Sequence[int], within: Within, refusal: CapacityError) -> None:
        records = self._records
        allocator = records.extents.allocator
        limit = allocator.end if within.end is None else within.end
        blocks = [align_up(nbytes, BLOCK_NBYTES) for nbytes in sizes]
        free = allocator.free_nbytes - (allocator.end - limit)
        if not within.holes:
            free = sum(end - start for start, end in allocator.gaps_below(limit, BLOCK_NBYTES))
        possible = free + records.blob_nbytes
        windows = Windows(records, limit)
        if sum(blocks) > possible:
            raise self._lacking(refusal, within, format_nbytes(max(0, possible)))
        victims = windows.choose(blocks, self._ahead_nbytes(sum(blocks)))
        if victims is None:
            largest = format_nbytes(windows.largest())
            raise self._lacking(refusal, within, f"{largest} in one piece")
        self._evicted_nbytes += records.evict(victims)

    def _ahead_nbytes(self, nbytes: int) -> int:
        """How much is evicted beyond a request for ``nbytes``."""
        if nbytes > _UNUSUAL * self._usual_nbytes:
            return 0
        share = self._records.extents.allocator.used_nbytes // _SHARE_AHEAD
        return min(share, self._evicted_nbytes // _SHARE_OF_EVICTED)

    def _lacking(self, refusal: CapacityError, within: Within, most: str) -> CapacityError:
        """``refusal``, and what there would be without blobs: ``most``; "" if none is evicted."""
        records = self._records
        text = str(refusal)
        if within.end is not None:
            text += (
                f"; {self._engine.where} can grow to {format_nbytes(within.end)} and no further, "
                "because its filesystem is full"
            )
        elif not within.holes:
            text += (
                f"; some of it {self._engine.where} gave back to its filesystem, which is full now"
            )
        kept = records.extents.allocator.used_nbytes - records.blob_nbytes
        if most:
            text += f"; nothing was evicted, since without any blob there would be {most}"
        if not most and records.blob_nbytes:
            text += (
                f"; {format_nbytes(records.blob_nbytes)} belong to blobs, which eviction='none' "
            )
            text += "keeps until they are deleted: store.delete(key)"
        if kept:
            text += (
                f"; {format_nbytes(kept)} belong to sequences, which stay until they are deleted, "
                "or to reads and writes under way. Delete old ones: store.sequences() lists them, "
                "store.sequence(name).delete() frees one"
            )
        return CapacityError(text)
