"""What a store holds: records of blobs and sequences, the order of use, and what is uncommitted."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import ClosedError, KeyNotFound
from spdk_kv.index import BlobRecord, SequenceRecord
from spdk_kv.store.companions import companion_keys
from spdk_kv.store.extents import BLOCK_NBYTES, ExtentTable
from spdk_kv.store.residents import Residents
from spdk_kv.store.sequence_uses import SequenceUses

# Keys whose lengths stand for all.
_SAMPLE = 256


@dataclass
class Changes:
    """What a commit writes: records by key (None: deleted), and the extents that it lets go of."""

    blobs: dict[str, BlobRecord | None] = field(default_factory=dict)
    sequences: dict[str, SequenceRecord | None] = field(default_factory=dict)
    retired: list[int] = field(default_factory=list)


class Records:
    """The records of one open store. Thread-safe.

    ``lock`` guards everything here, ``extents`` included, and is never held over I/O.

    A signal handler may raise (Ctrl-C) between any two steps of a change. Therefore a change first
    notes what the index has to learn of it, and one that is interrupted is still finished. Free
    space may get lost that way, until the store is opened again.
    """

    def __init__(
        self,
        blobs: BlobTable[BlobRecord],
        sequences: dict[str, SequenceRecord],
        extents: ExtentTable,
    ) -> None:
        self.lock = threading.RLock()
        self.blobs = blobs
        """Least recently used first."""
        self.sequences = sequences
        self.extents = extents
        self.residents = Residents(blobs)
        self.opened_changes = blobs.changes
        """Those of ``blobs`` when the store was opened."""
        self._opened_now = blobs.now
        self._has_moved = False
        self.counters = {"hits": 0, "misses": 0, "evictions": 0, "corruptions": 0}
        self.order_changed = False
        """Whether the index has another order of use."""
        self._changed_blobs: dict[str, BlobRecord | None] = {}
        self._changed_sequences: dict[str, SequenceRecord | None] = {}
        self.uses = SequenceUses(sequences, extents)
        self._closed = False

    # -- blobs ----------------------------------------------------------------------------------

    def find(self, keys: Iterable[str]) -> list[BlobRecord]:
        """The records of ``keys``, now the most recently used, their extents pinned.

        KeyNotFound (and nothing pinned) unless all are there.
        """
        keys = list(keys)
        with self.lock:
            found = self.blobs.use(keys)
            if found is None:
                missing = [key for key in keys if key not in self.blobs]
                self.counters["misses"] += len(missing)
                first = ", ".join(shown(key) for key in missing[:5])
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise KeyNotFound(f"no blob {first}{more}")
            self.counters["hits"] += len(keys)
            self.order_changed = True
            self.extents.pin([record.offset for record in found if record.nbytes])
            return found

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """The bytes of the blobs under ``keys``, None where there is none. No use of them."""
        with self.lock:
            found = [self.blobs.get(key) for key in keys]
        return [None if record is None else record.nbytes for record in found]

    def touch(self, keys: Iterable[str]) -> None:
        """Makes the blobs under ``keys``, as far as there are any, the most recently used."""
        with self.lock:
            self.order_changed |= self.blobs.touch(list(keys)) > 0

    def unpin(self, records: Iterable[BlobRecord]) -> None:
        """Ends what :meth:`find` pinned."""
        with self.lock:
            self.extents.unpin([record.offset for record in records if record.nbytes])

    def publish(self, records: dict[str, BlobRecord]) -> None:
        """Makes written blobs visible, all or (ClosedError: the last commit is over) none; the
        extents of those they replace are retired."""
        with self.lock:
            if self._closed:
                raise ClosedError("the store was closed before the blobs were written")
            try:
                self._publish(records)
            except BaseException:
                self._publish(records)
                raise

    def _publish(self, records: dict[str, BlobRecord]) -> None:
        if self.extents.lasting:
            if not self._changed_blobs.keys().isdisjoint(records):
                # They keep the places of earlier changes, which are not theirs in recency.
                self.order_changed = True
            self._changed_blobs.update(records)
        formers = self.blobs.put_many(records)
        if formers:
            self.extents.retire([former.offset for former in formers if former.nbytes])

    def _note(self, key: str, record: BlobRecord | None) -> None:
        """What the index has to learn of a blob; nothing where there is no index."""
        if self.extents.lasting:
            self._changed_blobs[key] = record

    def move(self, key: str, former: BlobRecord, record: BlobRecord) -> bool:
        """``record``, of the same bytes in another extent, takes the place of ``former``, also in
        the order of use. False, and nothing changes, where that is not the blob's any more."""
        with self.lock:
            if self._closed or self.blobs.get(key) != former:
                return False
            self.order_changed = self._has_moved = True
            self._note(key, record)
            self.blobs.replace(key, record)
            self.extents.retire([former.offset])
            return True

    def drop(self, key: str, only: BlobRecord | None = None, *, evicted: bool = False) -> bool:
        """Forgets a blob (``only``: if it is still that one; ``evicted``: so that others have
        room). Returns whether it was there.

        ClosedError: the last commit is over, so that it would be back after a reopening.
        """
        with self.lock:
            if self._closed and only is None:
                raise ClosedError("the store was closed before the blob was deleted")
            record = self.blobs.get(key)
            if record is None or (only is not None and record != only):
                return False
            self._note(key, None)
            self.blobs.pop(key, evicted)
            self._retire(record)
            return True

    def drop_damaged(self, key: str, record: BlobRecord) -> None:
        """Forgets a blob that cannot be read, if it is still that one, and counts it."""
        with self.lock:
            self.counters["corruptions"] += self.drop(key, only=record)

    def evict(self, offsets: Iterable[int]) -> int:
        """Drops the blobs at ``offsets``; returns how many bytes their extents come to."""
        with self.lock:
            before = self.blob_nbytes
            for offset in offsets:
                key = self.residents.key_at(offset)
                self.counters["evictions"] += key is not None and self.drop(key, evicted=True)
            return before - self.blob_nbytes

    @property
    def index_nbytes(self) -> int:
        """About what the records of all blobs take up in the index, judged by the newest ones."""
        with self.lock:
            sample = [index_nbytes(key) for key in islice(reversed(self.blobs), _SAMPLE)]
            return sum(sample) * len(self.blobs) // max(1, len(sample))

    @property
    def pending_index_nbytes(self) -> int:
        """About what the records of blobs that are not committed will take up in the index."""
        return sum(index_nbytes(key) for key, record in self._changed_blobs.items() if record)

    def evict_for_index(self, nbytes: int) -> int:
        """Drops the least recently used blobs until their records come to ``nbytes`` of the index;
        returns to how much they came."""
        with self.lock:
            victims: list[str] = []
            evicted = 0
            for key in self.blobs:
                if evicted >= nbytes:
                    break
                if not self.extents.is_pinned(self.blobs[key].offset):
                    victims.append(key)
                    evicted += index_nbytes(key)
            for key in victims:
                self.counters["evictions"] += self.drop(key, evicted=True)
            return evicted

    def recently_used(self, most: int) -> list[str]:
        """The keys of blobs, in the order of use, whose places the index may not have: the ``most``
        newest of them."""
        with self.lock:
            # A row that was written because its blob moved is among the newest ones.
            since = -1 if self._has_moved else self._opened_now
            return self.blobs.used_since(since, most)

    @property
    def blob_nbytes(self) -> int:
        """Space that forgetting all blobs would give."""
        return self.blobs.footprint_nbytes

    def _retire(self, record: BlobRecord) -> None:
        if record.nbytes:
            self.extents.retire([record.offset])

    # -- sequences ------------------------------------------------------------------------------

    def publish_sequence(self, name: str, record: SequenceRecord) -> None:
        """Records a sequence's new state, to go into the next commit. ClosedError: the last one is
        over."""
        with self.lock:
            if self._closed:
                raise ClosedError(f"the store was closed before sequence {name!r} was recorded")
            self._changed_sequences[name] = record
            self.sequences[name] = record
            self.touch_sequence(name)

    def drop_sequence(self, name: str, life: object) -> bool:
        """Forgets the record under ``name`` if it is of that life (:class:`SequenceRecord`).
        Returns whether it was there. The extents are the caller's to retire.

        ClosedError: the last commit is over, so that it would be back after a reopening.
        """
        with self.lock:
            record = self.sequences.get(name)
            if record is None or record.life is not life:
                return False
            if self._closed:
                raise ClosedError(f"the store was closed before sequence {name!r} was deleted")
            self._changed_sequences[name] = None
            del self.sequences[name]
            self.uses.forget(name)
            return True

    def drop_companions(self, name: str) -> None:
        """Forgets the blobs that went with a sequence which is gone."""
        with self.lock:
            for key in companion_keys(name):
                if key in self.blobs and not self._closed:
                    self.drop(key)

    def touch_sequence(self, name: str) -> None:
        """A sequence is used."""
        with self.lock:
            self.uses.touch(name, self.residents.tick())

    def evict_sequences(self, names: Iterable[str]) -> int:
        """Drops recorded sequences that nobody uses; returns how many bytes that gives."""
        with self.lock:
            gone = {
                name: [run for piece in self.sequences[name].pieces for run in piece.runs]
                for name in names
            }
            released = self.extents.released(run for runs in gone.values() for run in runs)
            nbytes = sum(map(self.extents.allocator.extent_nbytes, released))
            for name, runs in gone.items():
                # First what the index has to learn.
                self._changed_sequences[name] = None
                del self.sequences[name]
                self.uses.forget(name)
                self.extents.retire(runs)
                self.drop_companions(name)
                self.counters["evictions"] += 1
            return nbytes

    def retire(self, offsets: Iterable[int]) -> None:
        """Marks extents that a dropped sequence has given up."""
        with self.lock:
            self.extents.retire(offsets)

    def count_corruption(self) -> None:
        """Counts damage found in a sequence; :meth:`drop_damaged` counts that of blobs."""
        with self.lock:
            self.counters["corruptions"] += 1

    # -- changes --------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a commit would change anything."""
        return bool(self._changed_blobs or self._changed_sequences or self.extents.has_retired)

    def take_changes(self, into: Changes) -> None:
        """Moves what is uncommitted to ``into``, step by step: after an interrupt ``into`` has
        what was moved."""
        with self.lock:
            into.blobs, self._changed_blobs = self._changed_blobs, {}
            into.sequences, self._changed_sequences = self._changed_sequences, {}
            into.retired = self.extents.take_retired()

    def give_back(self, changes: Changes) -> None:
        """Takes back what could not be committed. What changed since wins."""
        with self.lock:
            self._changed_blobs = changes.blobs | self._changed_blobs
            self._changed_sequences = changes.sequences | self._changed_sequences
            self.extents.retire(changes.retired)

    def committed(
        self, sequences: Mapping[str, SequenceRecord | None], retired: Iterable[int]
    ) -> None:
        """The index has these ``sequences``: what is only needed to restore one leaves memory. The
        extents ``retired`` come free."""
        with self.lock:
            for name, record in sequences.items():
                if record is not None and self.sequences.get(name) is record:
                    self.sequences[name] = record.lean()
            self.extents.committed(retired)

    def close(self) -> None:
        """Refuses what is published from now on."""
        with self.lock:
            self._closed = True

    def stats(self) -> dict[str, int]:
        """Blobs, bytes, and what was counted."""
        with self.lock:
            allocator = self.extents.allocator
            return {
                "blobs": len(self.blobs),
                "capacity_nbytes": allocator.capacity_nbytes,
                "used_nbytes": allocator.used_nbytes,
                "free_nbytes": allocator.free_nbytes,
                "largest_free_nbytes": allocator.largest_free_nbytes,
                **self.counters,
            }


def blob_table(blobs: Iterable[tuple[str, BlobRecord]] = ()) -> BlobTable[BlobRecord]:
    """A table of ``blobs``, least recently used first."""
    table = BlobTable(BlobRecord, BLOCK_NBYTES)
    for key, record in blobs:
        table.put(key, record)
    return table


def index_nbytes(key: str) -> int:
    """About what the record of a blob takes up in the index: its table has the key once, and its
    index of keys once more, in pages that are two thirds full."""
    return 128 + 5 * len(key) // 2


def shown(key: str) -> str:
    """``key`` for a message: its beginning, where it is long."""
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:77]}..."
