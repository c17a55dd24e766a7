"""Room for new extents: allocation, growth of the data file, and eviction where a store is full."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import CapacityError
from spdk_kv.index import IndexFull
from spdk_kv.store.backing import Backing
from spdk_kv.store.committer import Committer
from spdk_kv.store.evicting import Evictor
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.quarantine import Quarantine
from spdk_kv.store.records import Records
from spdk_kv.store.reserved import Reserved, Turn
from spdk_kv.store.settings import Eviction
from spdk_kv.units import align_down, align_up

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
        self.evictor = Evictor(records, eviction, backing.engine)
        self.make_idle: Callable[[], bool] = lambda: False
        """Records sequences that nobody uses, so that they can be evicted; says whether there were
        any. Set by who knows them."""
        self._growth_lock = backing.lock

    def allocate(
        self,
        sizes: Sequence[int],
        deadline: Deadline = NEVER,
        *,
        joined: bool = False,
        may_stage: bool = True,
    ) -> list[int]:
        """Extents for ``sizes`` bytes each, all or none. ``joined``: a single one for all of them,
        wherever one free run holds them.

        Where there is no room: commits, so that retired extents come free, then evicts blobs and
        sequences if that is allowed (both block on the drive); ``may_stage``: also records
        sequences that could go then, which who holds a lock of one must not wait for.
        CapacityError, and nothing is evicted, where there would be no room even without all that
        nobody uses.
        """
        self._committer.data.check()  # or it would be kept for nothing
        self._quarantine.settle()
        asked = sizes[0] if len(sizes) == 1 else sum(sizes)
        self.evictor.asked(asked)
        self._backing.taken_nbytes += asked
        turn = Turn()
        try:
            offsets = self._allocate(sizes, joined, may_stage, turn, deadline)
        finally:
            if self._reserved.is_wanted:
                self._reserved.end(turn)
        try:
            self._committer.settle(deadline)
        except BaseException:
            self.abandon(offsets)
            raise
        return offsets

    def _allocate(
        self, sizes: Sequence[int], joined: bool, may_stage: bool, turn: Turn, deadline: Deadline
    ) -> list[int]:
        """As :meth:`allocate`; what commits let go of may not be over on the drive yet."""
        records = self._records
        within = Within()
        while True:
            with records.lock:
                freed_count = records.extents.freed_count
                try:
                    with self._only(within):
                        offsets = records.extents.allocate(sizes, within.end, joined)
                except CapacityError as full:
                    # Without its frames, which would keep what the callers hold in memory.
                    refusal = full.with_traceback(None)
                    offsets = []
            if not offsets:
                self._make_room(sizes, within, freed_count, refusal, turn, may_stage, deadline)
                continue
            backed = sizes if len(offsets) == len(sizes) else [sum(sizes)]
            narrower = self._back(offsets, backed, within, deadline)
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
                    if self._eviction == "none" or most <= 0:
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
        may_stage: bool,
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
            lacking: CapacityError | None = None
            if not is_reserved and not records.extents.has_retired:
                with self._only(within):
                    lacking = self.evictor.evict(sizes, within.end, within.holes, refusal)
        if lacking is not None:
            # What nobody holds any more may only have to be recorded before it can go.
            if turn.has_made_idle or not may_stage or not self.make_idle():
                raise lacking
            turn.has_made_idle = True
        elif is_reserved:  # it is free, and comes back
            self._reserved.wait(turn, deadline)
        else:
            self.commit(deadline)
