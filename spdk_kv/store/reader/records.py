"""What a reader knows of a store: the records as of a flush of its writer, and whether there is
news."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from spdk_kv.errors import ClosedError, KeyNotFound, ReadOnlyStore
from spdk_kv.index import BlobRecord, IndexReader, IndexSnapshot, SequenceRecord
from spdk_kv.placement import Allocator, Superblock
from spdk_kv.store.extents import BLOCK_NBYTES, ExtentTable
from spdk_kv.store.reader.parts import Readable
from spdk_kv.store.recorded import load_recorded
from spdk_kv.store.records import Records, blob_table, shown

# Each takes about 300 bytes.
_MOST_KNOWN = 100_000


class ReadRecords(Records):
    """The records in a snapshot of the index, which :meth:`refresh` replaces. Thread-safe.

    They are not loaded one by one: a look-up asks the snapshot. Extents are not pinned, since the
    writer would not know; checksums show what it wrote over. ``read_superblock`` reads the drive's.
    """

    def __init__(self, parts: Readable, read_superblock: Callable[[], Superblock | None]) -> None:
        nothing = Allocator(BLOCK_NBYTES, BLOCK_NBYTES)
        super().__init__(blob_table(), {}, ExtentTable(nothing, lasting=False))
        self._index: IndexReader = parts.index
        self._snapshot: IndexSnapshot = parts.snapshot
        self._superblock = parts.superblock
        # What was found in the snapshot, for who reads the same again.
        self._known: dict[str, BlobRecord] = {}
        self._read_superblock = read_superblock
        # The books of a snapshot, made when somebody asks for them.
        self._books: tuple[IndexSnapshot, Allocator] | None = None

    # -- looking up -----------------------------------------------------------------------------

    def peek(self, keys: Iterable[str]) -> list[BlobRecord | None]:
        """The records of ``keys`` in the present snapshot."""
        with self.lock:
            return [self._known.get(key) or self._look_up(key) for key in keys]

    def _look_up(self, key: str) -> BlobRecord | None:
        record = self._snapshot.blob(key)
        if record is not None and len(self._known) < _MOST_KNOWN:
            self._known[key] = record
        return record

    def find(self, keys: Iterable[str]) -> list[BlobRecord]:
        """The records of ``keys``. Where one is missing, looks for news first, which blocks on the
        disk of the index; KeyNotFound unless all are there then."""
        keys = list(keys)
        found = self.peek(keys)
        if None in found and self.refresh_if_news():
            found = self.peek(keys)
        missing = [key for key, record in zip(keys, found, strict=True) if record is None]
        with self.lock:
            self.counters["misses" if missing else "hits"] += len(missing or keys)
        if missing:
            first = ", ".join(shown(key) for key in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise KeyNotFound(f"no blob {first}{more}")
        return [record for record in found if record is not None]

    def contains(self, key: str) -> bool:
        """Whether there is such a blob; looks for news as :meth:`find`."""
        return self.sizes([key]) != [None]

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """As :meth:`Records.sizes`; looks for news as :meth:`find`."""
        found = self.peek(keys)
        if None in found and self.refresh_if_news():
            found = self.peek(keys)
        return [None if record is None else record.nbytes for record in found]

    def touch(self, keys: Iterable[str]) -> None:
        """Nothing: the order of use is the writer's."""

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix``, least recently used first."""
        with self.lock:
            return self._snapshot.blob_keys(prefix)

    def __len__(self) -> int:
        with self.lock:
            return self._snapshot.count_blobs()

    def sequence(self, name: str) -> SequenceRecord | None:
        """The sequence's record in the present snapshot."""
        with self.lock:
            return self._snapshot.sequence(name)

    def sequence_names(self) -> list[str]:
        """The names of all sequences, sorted."""
        with self.lock:
            return self._snapshot.sequence_names()

    def unpin(self, records: Iterable[BlobRecord]) -> None:
        """There are no pins."""

    # -- news -----------------------------------------------------------------------------------

    def refresh_if_news(self) -> bool:
        """As :meth:`refresh`, where the writer has committed since. A look for news is cheap."""
        return self._index.has_news(self._snapshot.commits) and self.refresh()

    def refresh(self) -> bool:
        """Takes the newest state of the index; whether it is a newer one. Blocks on its disk.

        Several threads may do so at once: none waits for another one's disk.
        """
        fresh = self._index.take()
        with self.lock:
            if is_newer := fresh.commits > self._snapshot.commits:
                # First: an interrupt in between leaves nothing known of another snapshot.
                self._known.clear()
                fresh, self._snapshot = self._snapshot, fresh
        fresh.close()
        return is_newer

    def close(self) -> None:
        """Gives memory and descriptors back. May be called twice."""
        super().close()
        with self.lock:
            self._books = None
            self._known.clear()
            self._snapshot.close()
        self._index.close()

    # -- what a reader does not do --------------------------------------------------------------

    def publish(self, records: dict[str, BlobRecord]) -> None:
        """ReadOnlyStore."""
        raise ReadOnlyStore("a store that is open read_only publishes nothing")

    def publish_sequence(self, name: str, record: SequenceRecord) -> None:
        """ReadOnlyStore."""
        raise ReadOnlyStore("a store that is open read_only records nothing")

    def drop(self, key: str, only: BlobRecord | None = None, *, evicted: bool = False) -> bool:
        """Nothing is dropped: what cannot be read here is its writer's to forget."""
        return False

    def drop_sequence(self, name: str, life: object) -> bool:
        """As :meth:`drop`."""
        return False

    # -- books ----------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """As :meth:`Records.stats`. Reads all records of a snapshot, once."""
        allocator = self._allocator()
        with self.lock:
            return {
                "blobs": len(self),
                "capacity_nbytes": allocator.capacity_nbytes,
                "used_nbytes": allocator.used_nbytes,
                "free_nbytes": allocator.free_nbytes,
                "largest_free_nbytes": allocator.largest_free_nbytes,
                **self.counters,
            }

    def _allocator(self) -> Allocator:
        """One that has the extents of all records in use."""
        while True:
            books, snapshot, superblock = self._books, self._snapshot, self._superblock
            if books is not None and books[0] is snapshot:
                return books[1]
            if superblock.generation != snapshot.generation:
                # Opened anew by its writer, perhaps with another capacity.
                superblock = self._superblock = self._read_superblock() or superblock
            capacity = superblock.capacity_nbytes
            try:
                allocator = load_recorded(snapshot, capacity).allocator(superblock, capacity)
            except ClosedError:
                if snapshot is self._snapshot:
                    raise
                continue  # another thread has refreshed
            self._books = (snapshot, allocator)
            return allocator
