"""What compaction may move: blobs. Anything else that lies in extents can be moved by a class of
its own that does the same."""

from __future__ import annotations

from typing import Protocol

from spdk_kv.index import BlobRecord
from spdk_kv.store.records import Records


class Move(Protocol):
    """One extent on its way: it is pinned, so that its bytes stay, and everybody else goes on
    using it, until :meth:`finish` or :meth:`cancel`, one of which must be called once."""

    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def crc(self) -> int:
        """CRC32C of the bytes."""

    def finish(self, offset: int) -> bool:
        """The bytes are at ``offset``, too: it is theirs from now on, and the old extent retired.
        False where they were replaced or deleted meanwhile."""

    def cancel(self) -> None:
        """It stays where it is."""


class Movable(Protocol):
    """A kind of thing that can be moved."""

    def offsets(self) -> list[int]:
        """Where those lie that could be moved now. Does not block."""

    def begin(self, offset: int) -> Move | None:
        """Begins to move what lies there; None where it is gone, or in use in a way that keeps it
        in its place. Does not block."""


class MovableBlobs:
    """The blobs of a store. A get may read one while it moves, a put or delete wins over it."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def offsets(self) -> list[int]:
        """As :meth:`Movable.offsets`."""
        with self._records.lock:
            return self._records.residents.offsets()

    def begin(self, offset: int) -> Move | None:
        """As :meth:`Movable.begin`."""
        with self._records.lock:
            key = self._records.residents.key_at(offset)
            if key is None:
                return None
            record = self._records.blobs[key]
            self._records.extents.pin([offset])
            return _MovedBlob(self._records, key, record)


class _MovedBlob:
    def __init__(self, records: Records, key: str, record: BlobRecord) -> None:
        self._records = records
        self._key = key
        self._record = record
        self.offset = record.offset
        self.nbytes = record.nbytes
        self.crc = record.crc

    def finish(self, offset: int) -> bool:
        with self._records.lock:
            self.cancel()
            moved = self._record._replace(offset=offset)
            return self._records.move(self._key, self._record, moved)

    def cancel(self) -> None:
        self._records.unpin([self._record])
