"""Which blob lies at an offset, and how long ago it was used: what the price of evicting it is."""

from __future__ import annotations

from collections.abc import Mapping

from spdk_kv.index import BlobRecord


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
        for key, record in blobs.items():
            self.add(key, record)

    def add(self, key: str, record: BlobRecord) -> None:
        """A blob was put."""
        if record.nbytes:
            self.keys[record.offset] = key
            self.now += 1
            self.used_at[record.offset] = self.now

    def touch(self, record: BlobRecord) -> None:
        """A blob was used."""
        if record.nbytes:
            self.now += 1
            self.used_at[record.offset] = self.now

    def move(self, former: BlobRecord, record: BlobRecord) -> None:
        """A blob lies elsewhere now."""
        self.keys[record.offset] = self.keys.pop(former.offset)
        self.used_at[record.offset] = self.used_at.pop(former.offset)

    def remove(self, record: BlobRecord) -> None:
        """A blob was replaced or forgotten."""
        if record.nbytes:
            self.keys.pop(record.offset, None)
            self.used_at.pop(record.offset, None)
