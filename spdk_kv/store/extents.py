"""Extents and their users: pinned while read, retired until the index has let go of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from spdk_kv.errors import CapacityError
from spdk_kv.placement import Allocator

BLOCK_NBYTES = 4096
"""Extents are whole blocks of this size, whatever the drive's own is."""


class ExtentTable:
    """An allocator whose extents come back only when nothing can read them any more.

    An extent that a record gives up is *retired*: it is free again once the change is committed
    (until then a crash would bring the old record back, which must still find its bytes), no other
    sequence has it as well, and no read has it pinned. Where nothing is ever committed (``lasting``
    is False) there is no old record to come back. Not thread-safe: the store calls it under its
    lock.
    """

    def __init__(
        self,
        allocator: Allocator,
        lasting: bool = True,
        holders: Mapping[int, int] | None = None,
    ) -> None:
        self.allocator = allocator
        # How many have an extent, where that is more than one.
        self._holders: dict[int, int] = {
            offset: count for offset, count in (holders or {}).items() if count > 1
        }
        self.lasting = lasting
        """Whether changes are committed."""
        self._pins: dict[int, int] = {}
        self._retired: list[int] = []
        # Their retirement is committed, but they were pinned at the time.
        self._free_when_unpinned: set[int] = set()
        self.freed_count = 0
        """How many came back so far, after a commit or the end of a read."""

    @property
    def has_retired(self) -> bool:
        """Whether a commit would let go of extents."""
        return bool(self._retired)

    def allocate(
        self, sizes: Sequence[int], end: int | None = None, joined: bool = False
    ) -> list[int]:
        """Offsets of new extents (below ``end``), all or none; CapacityError. ``joined``: one for
        all, as long as they are together, if there is room for that."""
        if joined and len(sizes) > 1:
            with suppress(CapacityError):
                return self.allocator.allocate_many([sum(sizes)], end)
        return self.allocator.allocate_many(sizes, end)

    def holders(self, offset: int) -> int:
        """How many have the extent, those included that have given it up by a change that is not
        committed."""
        return self._holders.get(offset, 1)

    def share(self, offsets: Iterable[int]) -> None:
        """Another one has the extents as well."""
        for offset in offsets:
            self._holders[offset] = self._holders.get(offset, 1) + 1

    def pin(self, offsets: Iterable[int]) -> None:
        """Keeps extents from being reused until the same number of unpins."""
        for offset in offsets:
            self._pins[offset] = self._pins.get(offset, 0) + 1

    def unpin(self, offsets: Iterable[int]) -> None:
        """Ends one pin of each; frees those that a commit has let go of meanwhile."""
        for offset in offsets:
            left = self._pins[offset] - 1
            if left:
                self._pins[offset] = left
                continue
            del self._pins[offset]
            if offset in self._free_when_unpinned:
                self._free_when_unpinned.remove(offset)
                self._free([offset])

    def is_pinned(self, offset: int) -> bool:
        """Whether a read of the extent is under way."""
        return offset in self._pins

    def abandon(self, offsets: Iterable[int]) -> None:
        """Frees extents that no record ever named."""
        self.allocator.free_many([offset for offset in offsets if self._is_last(offset)])

    def _is_last(self, offset: int) -> bool:
        """One who has the extent gives it up. Returns whether nobody else has it."""
        if not self._holders:  # most often
            return True
        count = self._holders.get(offset, 1) - 1
        if count > 1:
            self._holders[offset] = count
        else:
            self._holders.pop(offset, None)
        return count < 1

    def released(self, offsets: Iterable[int]) -> list[int]:
        """Which extents nobody has any more once ``offsets`` are given up."""
        counts = Counter(offsets)
        return [offset for offset, count in counts.items() if count >= self.holders(offset)]

    def retire(self, offsets: Iterable[int]) -> None:
        """Marks extents that their record has given up."""
        if self.lasting:
            self._retired.extend(offsets)
        else:
            self.committed(offsets)

    def take_retired(self) -> list[int]:
        """Those that the commit about to be made lets go of; give them to :meth:`committed`, or
        back to :meth:`retire` if it fails."""
        taken, self._retired = self._retired, []
        return taken

    def committed(self, offsets: Iterable[int]) -> None:
        """Frees extents whose retirement is on the medium, unless others have them as well."""
        free = []
        for offset in offsets:
            if not self._is_last(offset):
                continue
            if offset in self._pins:
                self._free_when_unpinned.add(offset)
            else:
                free.append(offset)
        self._free(free)

    def _free(self, offsets: list[int]) -> None:
        self.allocator.free_many(offsets)
        self.freed_count += len(offsets)
