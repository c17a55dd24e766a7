"""Which blob lies at an offset, and how long ago it was used: what the price of evicting it is."""

from __future__ import annotations

from collections.abc import Mapping

from spdk_kv.index import BlobRecord


def index_nbytes(key: str) -> int:
    """About what the record of a blob takes up in the index: its table has the key once, and its
    index of keys once more, in pages that are two thirds full."""
    return 128 + 5 * len(key) // 2


class Residents:
    """The blobs that have bytes, by offset. Not thread-safe: the records' lock guards it.

    ``blobs``: those of a store just opened, least recently used first.
    """

    def __init__(self, blobs: Mapping[str, BlobRecord]) -> None:
        self.now = 0
        """Counts the uses of blobs."""
        self.keys: dict[int, str] = {}
        """Offset -> key."""
        self.used_at: dict[int, int] = {}
        """Offset -> ``now`` of the last use."""
        self.index_nbytes = 0
        """See :func:`index_nbytes`."""
        for key, record in blobs.items():
            self.add(key, record)

    def add(self, key: str, record: BlobRecord) -> None:
        """A blob was put."""
        if record.nbytes:
            if record.offset not in self.keys:
                self.index_nbytes += index_nbytes(key)
            self.keys[record.offset] = key
            self.touch(record)

    def touch(self, record: BlobRecord) -> None:
        """A blob was used."""
        if record.nbytes:
            self.now += 1
            self.used_at[record.offset] = self.now

    def remove(self, record: BlobRecord) -> None:
        """A blob was replaced or forgotten."""
        if record.nbytes:
            key = self.keys.pop(record.offset, None)
            self.index_nbytes -= 0 if key is None else index_nbytes(key)
            self.used_at.pop(record.offset, None)
