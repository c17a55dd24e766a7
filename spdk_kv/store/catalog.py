"""What a store holds and where: records, extents, eviction and the commit that makes them last.

The order that keeps the truth: data is written, then flushed to the medium, then the records
that name it are committed; only then are extents reused that those records gave up.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from spdk_kv._native.transfer import Transfer
from spdk_kv.errors import CapacityError, ClosedError, DeviceError, KeyNotFound
from spdk_kv.index import BlobRecord, SequenceRecord
from spdk_kv.store.extents import ExtentTable
from spdk_kv.store.parts import BLOCK_NBYTES, Opened
from spdk_kv.store.settings import Eviction
from spdk_kv.units import align_up

log = logging.getLogger(__name__)


# A full store evicts at least this share of what it holds at once: every eviction costs a commit.
_EVICTED_SHARE = 32


class Catalog:
    """The records of one open store. Thread-safe.

    ``lock`` guards everything here and is never held over I/O to the device; commits are
    serialised by a lock of their own.

    A signal handler may raise (Ctrl-C) between any two steps of a change. So a change notes first
    what the index has to learn of it, and one that is interrupted is finished all the same; what
    may get lost is a piece of free space, until the store is opened again.
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
        self.blobs: OrderedDict[str, BlobRecord] = opened.blobs
        self.sequences = opened.sequences
        self._changed_blobs: dict[str, BlobRecord | None] = {}
        self._changed_sequences: dict[str, SequenceRecord | None] = {}
        # Space that forgetting all blobs would give.
        self._blob_nbytes = sum(_footprint(record) for record in self.blobs.values())
        self._touched = False
        self._closed = False
        self._commit_lock = threading.Lock()
        self._growth_lock = threading.Lock()
        # What the device may still touch although its caller has given up (a deadline).
        self._quarantine: list[tuple[list[Transfer], Callable[[], None]]] = []
        # Read by mappings that are gone by now; see unpin_later.
        self._unpinned: deque[BlobRecord] = deque()

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
                first = ", ".join(shown(key) for key in missing[:5])
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                raise KeyNotFound(f"no blob {first}{more}")
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

    def unpin_later(self, record: BlobRecord) -> None:
        """As :meth:`unpin`, from a finalizer: that may run amid any step of the thread that holds
        the lock, so it changes nothing itself."""
        self._unpinned.append(record)

    def publish(self, records: Mapping[str, BlobRecord]) -> None:
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

    def _publish(self, records: Mapping[str, BlobRecord]) -> None:
        for key, record in records.items():
            if key in self._changed_blobs:
                # Its place among the changes is that of an earlier one, and so not its recency.
                self._touched = True
            self._changed_blobs[key] = record
            former = self.blobs.get(key)
            if former is record:
                continue
            self.blobs[key] = record
            self.blobs.move_to_end(key)
            self._blob_nbytes += _footprint(record)
            if former is not None:
                self._retire(former)

    def drop(self, key: str, only: BlobRecord | None = None) -> bool:
        """Forgets a blob (``only``: if it is still that one). Returns whether it was there."""
        with self.lock:
            record = self.blobs.get(key)
            if record is None or (only is not None and record is not only):
                return False
            self._changed_blobs[key] = None
            del self.blobs[key]
            self._retire(record)
            return True

    def drop_damaged(self, key: str, record: BlobRecord) -> None:
        """Forgets a blob whose bytes cannot be had, if it is still that one, and counts it."""
        with self.lock:
            self.counters["corruptions"] += self.drop(key, only=record)

    def _retire(self, record: BlobRecord) -> None:
        self._blob_nbytes -= _footprint(record)
        if record.nbytes:
            self.extents.retire([record.offset])

    # -- sequences ------------------------------------------------------------------------------

    def publish_sequence(self, name: str, record: SequenceRecord) -> None:
        """Records a sequence's new state, to go into the next commit."""
        with self.lock:
            self.sequences[name] = record
            self._changed_sequences[name] = record

    def drop_sequence(
        self, name: str, offsets: Sequence[int], writes: Sequence[Transfer] = ()
    ) -> None:
        """Forgets a sequence (recorded or not). Its extents are retired, as soon as the device has
        let go of ``writes``."""
        with self.lock:
            if name in self.sequences:
                self._changed_sequences[name] = None
                del self.sequences[name]

        def retire() -> None:
            with self.lock:
                self.extents.retire(offsets)

        self.release(writes, retire)

    def count_corruption(self) -> None:
        """Called for damage found in a sequence; that of blobs is counted here."""
        with self.lock:
            self.counters["corruptions"] += 1

    # -- space ----------------------------------------------------------------------------------

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """Extents for ``sizes`` bytes each, all or none.

        Where there is no room: commits, so that retired extents come free, then evicts blobs if
        that is allowed (both block on the device). CapacityError.
        """
        self._end_pins()
        wanted = 0
        while True:
            refusal = None
            with self.lock:
                freed_count = self.extents.freed_count
                try:
                    offsets = self.extents.allocate(sizes)
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

    def _back(self, offsets: Sequence[int], sizes: Sequence[int]) -> CapacityError | None:
        """Makes the device reach the extents; gives them up where it cannot."""
        end = max(o + align_up(n, BLOCK_NBYTES) for o, n in zip(offsets, sizes, strict=True))
        try:
            # One at a time: a growth that fails takes back what it added to the file.
            with self._growth_lock:
                self.engine.ensure(end)
        except CapacityError as full:
            self.abandon(offsets)
            return full
        except BaseException:
            self.abandon(offsets)
            raise
        return None

    def abandon(self, offsets: Sequence[int]) -> None:
        """Takes extents back that no record ever named."""
        with self.lock:
            self.extents.abandon(offsets)

    def _make_room(self, sizes: Sequence[int], wanted: int, freed_count: int) -> int | None:
        """Frees something, by eviction at least ``wanted`` bytes. Returns what is wanted if that
        was not enough; None if nothing can be freed.

        ``freed_count``: the table's when there was no room.
        """
        # A commit under way may be about to free something.
        with self._commit_lock, self.lock:
            if self.extents.freed_count != freed_count:
                return wanted
            allocator = self.extents.allocator
            if not self.extents.has_retired and self.eviction == "lru":
                if sum(sizes) > allocator.free_nbytes + self._blob_nbytes:
                    # Nothing would be won by losing everything.
                    return None
                self._evict(max(wanted, sum(sizes), allocator.used_nbytes // _EVICTED_SHARE))
            if not self.extents.has_retired:
                return None
        self.commit()
        # Fragmented: what was evicted was enough by size but not by shape. Ever more.
        return max(2 * wanted, sum(sizes))

    def _evict(self, nbytes: int) -> None:
        """Drops the least recently used blobs until their extents come to ``nbytes``.

        Those without bytes, and those that are just being read, would give no space.
        """
        victims = []
        for key, record in self.blobs.items():
            if nbytes <= 0:
                break
            if record.nbytes and not self.extents.pinned(record.offset):
                victims.append(key)
                nbytes -= _footprint(record)
        for key in victims:
            self.counters["evictions"] += self.drop(key)

    def release(self, transfers: Sequence[Transfer], action: Callable[[], None]) -> None:
        """Runs ``action`` (an unpin, say) now, or once the device has let go of ``transfers``."""
        in_flight = [transfer for transfer in transfers if transfer.in_flight]
        if in_flight:
            with self.lock:
                self._quarantine.append((in_flight, action))
        else:
            action()

    def _end_pins(self) -> None:
        """Takes note of what the device, or a mapping, has let go of in the meantime."""
        if not self._quarantine and not self._unpinned:
            return
        over: list[tuple[list[Transfer], Callable[[], None]]] = []
        held: list[tuple[list[Transfer], Callable[[], None]]] = []
        with self.lock:
            while self._unpinned:
                self.unpin([self._unpinned.popleft()])
            for pair in self._quarantine:
                # Looked at once: it may come to its end between two looks.
                in_flight = [transfer for transfer in pair[0] if transfer.in_flight]
                (held if in_flight else over).append(pair)
            self._quarantine = held
        for _, action in over:
            action()

    # -- commit ---------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a commit would change anything."""
        return bool(self._changed_blobs or self._changed_sequences or self.extents.has_retired)

    def commit(self, timeout_s: float | None = None) -> None:
        """Data to the medium, then the records; blocks on both. What failed is tried again by the
        next commit."""
        self._end_pins()
        with self._commit_lock:
            blobs: dict[str, BlobRecord | None] = {}
            sequences: dict[str, SequenceRecord | None] = {}
            retired: list[int] = []
            try:
                with self.lock:
                    blobs, self._changed_blobs = self._changed_blobs, {}
                    sequences, self._changed_sequences = self._changed_sequences, {}
                    retired = self.extents.take_retired()
                if self.index is not None and (blobs or sequences):
                    records = (*blobs.values(), *sequences.values())
                    if records.count(None) < len(records):
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

    def close(self) -> None:
        """The last commit: what is published from now on is refused."""
        with self.lock:
            self._closed = True
        self.commit()

    def save_order(self) -> None:
        """Records which blobs were used last, for eviction after a reopening."""
        if self.index is not None and self._touched:
            self.index.touch_order(self.blobs)


def _footprint(record: BlobRecord) -> int:
    """Bytes of the blob's extent."""
    return align_up(record.nbytes, BLOCK_NBYTES)


def shown(key: str) -> str:
    """``key`` for a message: its beginning, where it is long."""
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:77]}..."
