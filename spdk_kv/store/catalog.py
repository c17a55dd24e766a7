"""What a store holds and where: records, room for new extents, and the commit, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import Deadline
from spdk_kv.engines import Engine
from spdk_kv.index import Index, SequenceRecord
from spdk_kv.placement import StagingPool
from spdk_kv.store.backing import Backing
from spdk_kv.store.committer import Committer
from spdk_kv.store.compacting import Compactor
from spdk_kv.store.movable import MovableBlobs
from spdk_kv.store.places import Places
from spdk_kv.store.quarantine import Quarantine
from spdk_kv.store.records import Records
from spdk_kv.store.reserved import Reserved
from spdk_kv.store.room import Room
from spdk_kv.store.settings import Eviction
from spdk_kv.store.trimming import Trimmer


class Catalog:
    """The books of one open store. Thread-safe.

    ``records`` is what is stored, ``room`` hands out extents, ``committer`` makes changes last,
    ``quarantine`` keeps what the drive may still touch, ``trimmer`` gives back what is free.
    ``discard``: of :class:`EngineOptions`. The methods here need more than one of
    them, or are what a sequence stands on.
    """

    def __init__(
        self,
        records: Records,
        engine: Engine,
        index: Index | None,
        eviction: Eviction,
        discard: bool | None,
        places: Places,
    ) -> None:
        self.records = records
        if eviction == "slru":
            records.residents.resist_scans()
        self.quarantine = Quarantine(records.lock, records.unpin)
        self.committer = Committer(records, self.quarantine, engine, index, places)
        self.reserved = Reserved(records)
        self.backing = Backing(engine, records.extents.allocator)
        self.room = Room(
            records, self.quarantine, self.committer, self.backing, self.reserved, eviction
        )
        # By default files give back what is free, since others use their filesystem.
        automatic = engine.file_nbytes is not None if discard is None else discard
        self.trimmer = Trimmer(records, self.committer, self.backing, self.reserved, automatic)
        self.committer.on_freed = self.trimmer.freed
        self._waits_for_trim = discard is True

    def allocate_joined(
        self, sizes: Sequence[int], deadline: Deadline, may_stage: bool = True
    ) -> list[int]:
        """As :meth:`Room.allocate`."""
        return self.room.allocate(sizes, deadline, joined=True, may_stage=may_stage)

    def holders(self, offset: int) -> int:
        """As :meth:`ExtentTable.holders`."""
        with self.records.lock:
            return self.records.extents.holders(offset)

    def share(self, offsets: Sequence[int]) -> None:
        """As :meth:`ExtentTable.share`."""
        with self.records.lock:
            self.records.extents.share(offsets)

    def abandon(self, offsets: Sequence[int]) -> None:
        """As :meth:`Room.abandon`."""
        self.room.abandon(offsets)

    def publish_sequence(self, name: str, record: SequenceRecord) -> None:
        """As :meth:`Records.publish_sequence`."""
        self.records.publish_sequence(name, record)

    def drop_sequence(self, name: str, life: object) -> bool:
        """As :meth:`Records.drop_sequence`."""
        return self.records.drop_sequence(name, life)

    def retire(self, offsets: Sequence[int], writes: Sequence[Transfer] = ()) -> None:
        """Gives up the extents of a sequence that has no record (any more), as soon as the drive
        has let go of ``writes``."""
        self.quarantine.release(writes, lambda: self.records.retire(offsets))

    def count_corruption(self) -> None:
        """As :meth:`Records.count_corruption`."""
        self.records.count_corruption()

    def commit(self, timeout_s: float | None = None) -> None:
        """As :meth:`Room.commit`."""
        self.room.commit(Deadline(timeout_s))

    def trim_for_flush(self, timeout_s: float | None = None) -> None:
        """As :meth:`Trimmer.trim_for_flush`, where discard=True asks for that."""
        if self._waits_for_trim:
            self.trimmer.trim_for_flush(Deadline(timeout_s))

    def compact(self, staging: StagingPool, is_stopping: Callable[[], bool]) -> int:
        """As :meth:`KVStore.compact`; blocks. ``is_stopping``: the store is being closed."""
        engine = self.backing.engine
        before = engine.stored_nbytes
        # Sequences that nobody uses could be moved as well: by a Movable of their own, here.
        movables = [MovableBlobs(self.records)]
        Compactor(self.records, engine, self.backing, self.reserved, movables, self.commit).run(
            staging, is_stopping
        )
        given = self.trimmer.trim()
        after = engine.stored_nbytes
        return given if before is None or after is None else max(0, before - after)

    def settle(self, timeout_s: float | None = None) -> None:
        """As :meth:`Committer.settle`."""
        self.committer.settle(Deadline(timeout_s))

    def close(self) -> None:
        """The last commit: what is published from now on is refused."""
        self.records.close()
        self.commit()
