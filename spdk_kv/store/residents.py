"""The order of use of what is stored, and which blob lies at an offset: what eviction asks."""

from __future__ import annotations

from collections.abc import Iterator

from spdk_kv._native.table import BlobTable
from spdk_kv.index import BlobRecord

# On traces of prompts and of Zipf's law, with floods of what comes once and without
# (bench/eviction_hits.py), 4 to 16 do about equally well; larger ones lose where what was wanted
# again and again no longer is.
ONCE_WEIGHT = 8


class Residents:
    """The blobs that have bytes, by offset. Not thread-safe: the records' lock guards it.

    The order is that of ``blobs``, which notes each use of a blob.
    """

    def __init__(self, blobs: BlobTable[BlobRecord]) -> None:
        self._blobs = blobs

    def resist_scans(self) -> None:
        """From now on a blob that was put and not used since counts as several times as old."""
        self._blobs.once_weight = ONCE_WEIGHT

    @property
    def now(self) -> int:
        """Counts the uses of blobs and sequences."""
        return self._blobs.now

    def tick(self) -> int:
        """A sequence is used. Returns :attr:`now`."""
        return self._blobs.tick()

    def key_at(self, offset: int) -> str | None:
        """The key of the blob at ``offset``; None where none begins."""
        return self._blobs.key_at(offset)

    def used_at(self, offset: int) -> int | None:
        """:attr:`now` as of the blob's last use, or earlier (:meth:`resist_scans`); None where none
        begins."""
        return self._blobs.used_at(offset)

    def offsets(self) -> list[int]:
        """Where blobs begin, the one used longest ago first."""
        return self._blobs.offsets()

    def oldest(self) -> Iterator[int]:
        """Where blobs begin, in the order of :meth:`used_at`, for who needs only the first ones,
        and changes nothing meanwhile."""
        return self._blobs.oldest()
