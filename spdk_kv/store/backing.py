"""Which parts of the store have blocks of the drive behind them, and which gave them back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from spdk_kv.deadline import Deadline
from spdk_kv.engines import Engine
from spdk_kv.placement import DATA_START, Allocator, Ranges
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.units import align_up

# A hole is filled by this much at once, as far as it reaches, so that puts seldom wait for it.
_STEP_NBYTES = 64 << 20


class Backing:
    """The data file's reach and its holes, and what of a drive was trimmed. Thread-safe.

    An extent in a hole (:meth:`fill`) or beyond the file must be backed before it is written: a
    write must not fail because the filesystem filled up meanwhile. A drive of its own has no holes;
    of it, as of a file, is known what was given back and not handed out since.

    A part is punched only while nobody can be given it, and is a hole only after that; what is
    filled was a hole before. So the two never meet.
    """

    def __init__(self, engine: Engine, allocator: Allocator) -> None:
        self.engine = engine
        self.lock = threading.Lock()
        """Held while the file grows, is filled or cut off: one at a time, since a growth that fails
        takes back what it added."""
        self.reach = 0
        """The file was seen to reach to here."""
        self.taken_nbytes = 0
        """What extents were asked for so far; a measure, counted without a lock."""
        self._guard = threading.Lock()
        self._holes = Ranges()
        self._given = Ranges()
        # True as long as either has anything: read without the guard by each put.
        self._has_any = False
        gaps = [(start, start + nbytes) for start, nbytes in allocator.gaps.items()]
        size = engine.file_nbytes
        if size is None:
            # Of a drive only what comes free from now on is owed to it; trim() goes over all.
            self._given = Ranges(gaps)
        elif (engine.stored_nbytes or 0) < size:
            # Nothing shows cheaply which of them have blocks.
            self._holes = Ranges((start, min(end, size)) for start, end in gaps)
        self._note()

    def _note(self) -> None:
        self._has_any = bool(self._holes) or bool(self._given)

    # -- what is handed out ---------------------------------------------------------------------

    def lacks(self, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether extents just handed out lie in holes."""
        if not self._has_any:
            return False
        with self._guard:
            lacks = False
            for offset, end in _runs(offsets, sizes):
                self._given.remove(offset, end)
                lacks = lacks or bool(self._holes.within(offset, end))
            self._note()
            return lacks

    def fill(
        self, offsets: Sequence[int], sizes: Sequence[int], index_nbytes: int, deadline: Deadline
    ) -> None:
        """Backs the holes in extents. Blocks on the filesystem. CapacityError where it is full;
        DeviceTimeout where another growth takes past ``deadline``."""
        with deadline.hold(self.lock, "the growth of the data file"):
            for offset, end in _runs(offsets, sizes):
                with self._guard:
                    holes = self._holes.within(offset, end)
                for start, stop in holes:
                    self._fill(start, stop, index_nbytes)

    def _fill(self, start: int, end: int, index_nbytes: int) -> None:
        with self._guard:
            further = min(self._holes.end_of(start), max(end, start + _STEP_NBYTES))
        # Generously only where it takes little of what is left: others use the filesystem, too.
        reachable = self.engine.growable_to(index_nbytes)
        room = 0 if reachable is None else reachable - (self.engine.file_nbytes or 0)
        if 2 * (further - start) > room:
            further = end
        self.engine.back(start, further - start, index_nbytes)
        with self._guard:
            self._holes.remove(start, further)
            self._given.remove(start, further)
            self._note()

    def holes(self) -> list[tuple[int, int]]:
        """The parts of the file that have no blocks, or may have none."""
        with self._guard:
            return list(self._holes)

    # -- what is given back ---------------------------------------------------------------------

    def owed(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of the free run ``[start, end)`` that were not given back."""
        size = self.engine.file_nbytes
        with self._guard:
            return self._given.lacking(start, end if size is None else min(end, size))

    def owed_nbytes(self, allocator: Allocator) -> int:
        """About how much is free and was not given back. Under the records' lock."""
        size = self.engine.file_nbytes
        beyond = 0 if size is None else max(0, allocator.end - max(size, DATA_START))
        return allocator.free_nbytes - beyond - self._given.nbytes

    def gave(self, start: int, end: int, punched: bool) -> None:
        """``[start, end)``, which nobody can be given just now, was given back. ``punched`` is
        False where the drive takes nothing back: it is not tried again."""
        with self._guard:
            self._given.add(start, end)
            if punched and self.engine.file_nbytes is not None:
                self._holes.add(start, end)
            self._note()

    def forget_given(self) -> None:
        """Everything free is owed again: a drive may not have been told, by whoever had it."""
        with self._guard:
            self._given.clear()
            self._note()

    def cut(self, end: int) -> None:
        """Cuts the file off at ``end``; nobody has or can be given anything behind it just now.
        Blocks on the filesystem."""
        with self.lock:
            self.engine.shrink(end)
            self.reach = min(self.reach, end)
            with self._guard:
                for ranges in (self._holes, self._given):
                    ranges.remove(end, 1 << 63)
                self._note()


def _runs(offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of extents in whole blocks, those joined that follow each other."""
    start = end = -1
    for offset, nbytes in zip(offsets, sizes, strict=True):
        if offset != end:
            if end >= 0:
                yield start, end
            start = offset
        end = offset + align_up(nbytes, BLOCK_NBYTES)
    if end >= 0:
        yield start, end
