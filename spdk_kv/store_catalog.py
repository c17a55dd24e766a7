"""What a store holds and where: records, extents, eviction and the commit that makes them last.

The order that keeps the truth: data is written, then flushed to the medium, then the records
that name it are committed; only then are extents reused that those records gave up.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from spdk_kv._native.transfer import Transfer
from spdk_kv.errors import CapacityError, CorruptionError, DeviceError, KeyNotFound
from spdk_kv.index import BlobRecord, SequenceRecord
from spdk_kv.store_extents import ExtentTable
from spdk_kv.store_open import BLOCK_NBYTES, Opened
from spdk_kv.units import align_up

log = logging.getLogger(__name__)

Eviction = Literal["lru", "none"]

# A full store evicts at least this share of its capacity at once: every eviction costs a commit.
_EVICTED_SHARE = 32


class Catalog:
    """The records of one open store. Thread-safe.

    ``lock`` guards everything here and is never held over I/O to the device; commits are
    serialised by a lock of their own.
    """

    def __init__(self, opened: Opened, eviction: Eviction, discard: bool) -> None:
        if eviction not in ("lru", "none"):
            raise ValueError(f"eviction is 'lru' or 'none', not {eviction!r}")
        self.eviction = eviction
        self._discard = discard
        self.engine = opened.engine
        self.index = opened.index
        self.lock = threading.RLock()
        self.extents = ExtentTable(opened.allocator)
        self.counters = {"hits": 0, "misses": 0, "evictions": 0, "corruptions": 0}
        # Least recently used first.
        self.blobs: OrderedDict[str, BlobRecord] = OrderedDict()
        self.sequences: dict[str, SequenceRecord] = {}
        self._changed_blobs: dict[str, BlobRecord | None] = {}
        self._changed_sequences: dict[str, SequenceRecord | None] = {}
        self._blob_nbytes = 0
        self._touched = False
        self._commit_lock = threading.Lock()
        # What the device may still touch although its caller has given up (a deadline).
        self._quarantine: list[tuple[Transfer, Callable[[], None]]] = []
        self._load()

    def _load(self) -> None:
        if self.index is None:
            return
        self.blobs.update(self.index.load_blobs())
        self._blob_nbytes = sum(record.nbytes for record in self.blobs.values())
        self.sequences.update(self.index.load_sequences())
        live = [(blob.offset, blob.nbytes) for blob in self.blobs.values() if blob.nbytes]
        for sequence in self.sequences.values():
            live += [(unit.offset, sequence.extent_nbytes) for unit in sequence.units]
        try:
            self.extents.allocator.reserve_all(live)
        except CorruptionError as damage:
            raise CorruptionError(f"the index {self.index.path} is damaged: {damage}") from damage

    # -- blobs ----------------------------------------------------------------------------------

    def find(self, keys: Iterable[str]) -> list[BlobRecord]:
        """The records of ``keys``, now the most recently used, their extents pinned.

        KeyNotFound (and nothing pinned) unless all are there.
        """
        keys = list(keys)
        with self.lock:
            missing = [key for key in keys if key not in self.blobs]
            if missing:
                self.counters["misses"] += len(missing)
                shown = ", ".join(_shown(key) for key in missing[:5])
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise KeyNotFound(f"no blob {shown}{more}")
            self.counters["hits"] += len(keys)
            self._touched = True
            found = []
            for key in keys:
                self.blobs.move_to_end(key)
                found.append(self.blobs[key])
            self.extents.pin([record.offset for record in found if record.nbytes])
            return found

    def unpin(self, records: Iterable[BlobRecord]) -> None:
        with self.lock:
            self.extents.unpin([record.offset for record in records if record.nbytes])

    def publish(self, records: Mapping[str, BlobRecord]) -> None:
        """Makes written blobs visible; the extents of those they replace are retired."""
        with self.lock:
            for key, record in records.items():
                self._retire_blob(key)
                self.blobs[key] = record
                self._blob_nbytes += record.nbytes
                self._changed_blobs[key] = record

    def drop(self, key: str, only: BlobRecord | None = None) -> bool:
        """Forgets a blob (``only``: if it is still that one). Returns whether it was there."""
        with self.lock:
            if only is not None and self.blobs.get(key) is not only:
                return False
            if not self._retire_blob(key):
                return False
            self._changed_blobs[key] = None
            return True

    def _retire_blob(self, key: str) -> bool:
        record = self.blobs.pop(key, None)
        if record is None:
            return False
        self._blob_nbytes -= record.nbytes
        if record.nbytes:
            self.extents.retire([record.offset])
        return True

    # -- sequences ------------------------------------------------------------------------------

    def publish_sequence(self, name: str, record: SequenceRecord) -> None:
        """Records a sequence's new state, to go into the next commit."""
        with self.lock:
            self.sequences[name] = record
            self._changed_sequences[name] = record

    def drop_sequence(self, name: str, offsets: Sequence[int]) -> None:
        """Forgets a sequence (recorded or not) and retires its extents."""
        with self.lock:
            if self.sequences.pop(name, None) is not None:
                self._changed_sequences[name] = None
            self.extents.retire(offsets)

    # -- space ----------------------------------------------------------------------------------

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """Extents for ``sizes`` bytes each, all or none.

        Where there is no room: commits, so that retired extents come free, then evicts blobs if
        that is allowed (both block on the device). CapacityError.
        """
        self._end_quarantine()
        wanted = 0
        while True:
            refusal = None
            with self.lock:
                try:
                    offsets = self.extents.allocate(sizes)
                except CapacityError as full:
                    refusal = full
            if refusal is None:
                refusal = self._back(offsets, sizes)
                if refusal is None:
                    return offsets
            if not self._make_room(sizes, wanted):
                raise refusal
            # Fragmented: what was evicted was enough by size but not by shape. Ever more.
            wanted = max(2 * wanted, sum(sizes))

    def _back(self, offsets: Sequence[int], sizes: Sequence[int]) -> CapacityError | None:
        """Makes the device reach the extents; gives them up where it cannot."""
        try:
            self.engine.ensure(
                max(o + align_up(n, BLOCK_NBYTES) for o, n in zip(offsets, sizes, strict=True))
            )
        except CapacityError as full:
            with self.lock:
                self.extents.abandon(offsets)
            return full
        except BaseException:
            with self.lock:
                self.extents.abandon(offsets)
            raise
        return None

    def _make_room(self, sizes: Sequence[int], wanted: int) -> bool:
        """Frees something, if anything can be freed. Returns whether it is worth another try."""
        with self.lock:
            allocator = self.extents.allocator
            if not self.extents.has_retired and self.eviction == "lru":
                if sum(sizes) > allocator.free_nbytes + self._blob_nbytes:
                    # Nothing would be won by losing everything.
                    return False
                self._evict(max(wanted, sum(sizes), allocator.capacity_nbytes // _EVICTED_SHARE))
            if not self.extents.has_retired:
                return False
        self.commit()
        return True

    def _evict(self, nbytes: int) -> None:
        """Drops the least recently used blobs until their extents come to ``nbytes``."""
        while self.blobs and nbytes > 0:
            key, record = next(iter(self.blobs.items()))
            self.drop(key)
            self.counters["evictions"] += 1
            nbytes -= record.nbytes

    def release(self, transfer: Transfer | None, action: Callable[[], None]) -> None:
        """Runs ``action`` (an unpin, say) now, or once the device has let go of ``transfer``."""
        if transfer is not None and transfer.in_flight:
            with self.lock:
                self._quarantine.append((transfer, action))
            return
        action()

    def _end_quarantine(self) -> None:
        if not self._quarantine:
            return
        with self.lock:
            over = [action for transfer, action in self._quarantine if not transfer.in_flight]
            self._quarantine = [pair for pair in self._quarantine if pair[0].in_flight]
        for action in over:
            action()

    # -- commit ---------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a commit would change anything."""
        return bool(self._changed_blobs or self._changed_sequences or self.extents.has_retired)

    def commit(self, timeout_s: float | None = None) -> None:
        """Data to the medium, then the records; blocks on both. What failed is tried again by the
        next commit."""
        with self._commit_lock:
            with self.lock:
                blobs, self._changed_blobs = self._changed_blobs, {}
                sequences, self._changed_sequences = self._changed_sequences, {}
                retired = self.extents.take_retired()
            try:
                if self.index is not None and (blobs or sequences):
                    if any(record is not None for record in (*blobs.values(), *sequences.values())):
                        self.engine.flush(timeout_s)
                    self.index.commit(blobs, sequences)
            except BaseException:
                with self.lock:
                    self._changed_blobs = blobs | self._changed_blobs
                    self._changed_sequences = sequences | self._changed_sequences
                    self.extents.retire(retired)
                raise
            if self._discard:
                self._discard_unpinned(retired)
            with self.lock:
                self.extents.committed(retired)

    def _discard_unpinned(self, offsets: Sequence[int]) -> None:
        # Before they are free: a new owner's bytes must not be discarded. No record names them
        # any more, so nobody can pin what is unpinned now.
        with self.lock:
            ranges = [
                (offset, self.extents.allocator.extent_nbytes(offset))
                for offset in offsets
                if not self.extents.pinned(offset)
            ]
        for offset, nbytes in ranges:
            try:
                self.engine.discard(offset, nbytes)
            except DeviceError as refused:
                log.warning("the device takes no discards, so there will be none: %s", refused)
                self._discard = False
                return

    def save_order(self) -> None:
        """Records which blobs were used last, for eviction after a reopening."""
        if self.index is not None and self._touched:
            self.index.touch_order(self.blobs)


def _shown(key: str) -> str:
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:77]}..."
