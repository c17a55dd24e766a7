"""Which stored sequences nobody uses, used longest ago first, and which of them to evict."""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from spdk_kv.index import SequenceRecord
from spdk_kv.store.extents import ExtentTable

# Of more that were chosen, none is tried to be kept after all.
_MOST_TRIED = 64
# The longest text of ages that is kept: hundreds of thousands of sequences. Of more, those used
# last would lose their place to those that nobody asked for since the store was opened.
_MOST_AGES_NBYTES = 64 << 20


class SequenceUses:
    """When each recorded sequence was used last, in uses of anything in the store. Not thread-safe:
    the records' lock guards it.

    ``is_in_use``: whether a sequence is in memory, and so may not be evicted; set by who knows.
    """

    def __init__(self, sequences: Mapping[str, SequenceRecord], extents: ExtentTable) -> None:
        self._sequences = sequences
        self._extents = extents
        self._used_at: OrderedDict[str, int] = OrderedDict()
        self.changed = False
        """Whether the index has other ages."""
        self.is_in_use: Callable[[str], bool] = lambda name: False

    def load(self, ages: str | None, now: int) -> None:
        """Takes up what :meth:`ages` returned when the store was closed; who is not in it was used
        ``now``."""
        known = json.loads(ages) if ages else {}
        used = [(now - known.get(name, 0), name) for name in self._sequences]
        used.sort(key=lambda pair: pair[0])
        self._used_at = OrderedDict((name, at) for at, name in used)

    def ages(self, now: int) -> str | None:
        """How many uses ago each one was used; None if that takes too much."""
        text = json.dumps({name: now - at for name, at in self._used_at.items()})
        return text if len(text) <= _MOST_AGES_NBYTES else None

    def touch(self, name: str, now: int) -> None:
        """A sequence is used, or recorded."""
        if name in self._sequences:
            self._used_at[name] = now
            self._used_at.move_to_end(name)
            self.changed = True

    def forget(self, name: str) -> None:
        """A record is gone."""
        self._used_at.pop(name, None)
        self.changed = True

    def unused(self) -> Iterator[tuple[int, str, SequenceRecord]]:
        """Those that may be evicted, used longest ago first, with the time of their last use."""
        for name, used_at in self._used_at.items():
            record = self._sequences[name]
            if not record.pinned and not self.is_in_use(name):
                yield used_at, name, record

    def choose(
        self, sizes: Sequence[int], limit: int, before: int | None, blobs: Collection[int] = ()
    ) -> list[str] | None:
        """The sequences, used longest ago, without which there are extents of ``sizes`` bytes
        (whole blocks) below ``limit``; None if there would not be those without all that were used
        ``before``, or where that is None without any that is unused.

        ``blobs``: offsets of blobs that are taken to be gone as well.
        """
        allocator, runs_of = self._extents.allocator, _runs_of
        free = dict(allocator.gaps_below(limit, 1))
        for offset in blobs:
            if not self._extents.is_pinned(offset):
                _add(free, offset, offset + allocator.extent_nbytes(offset), limit)
        wanted, total = sorted(sizes, reverse=True), sum(sizes)
        left: Counter[int] = Counter()
        chosen: list[str] = []
        for used_at, name, record in self.unused():
            if before is not None and used_at >= before:
                return None
            chosen.append(name)
            for run in runs_of(record):
                left[run] += 1
                if left[run] == self._extents.holders(run):
                    _add(free, run, run + allocator.extent_nbytes(run), limit)
            if sum(end - start for start, end in free.items()) >= total and _fits(free, wanted):
                return self._needed(chosen, wanted, limit, blobs)
        return None

    def _needed(
        self, chosen: list[str], wanted: list[int], limit: int, blobs: Collection[int]
    ) -> list[str]:
        """``chosen`` without those that are not needed, of which there are some where the space has
        to be in one piece."""
        if len(chosen) > _MOST_TRIED:
            return chosen
        kept = list(chosen)
        for name in chosen[:-1]:
            fewer = [each for each in kept if each != name]
            if self._is_enough(fewer, wanted, limit, blobs):
                kept = fewer
        return kept

    def _is_enough(
        self, names: list[str], wanted: list[int], limit: int, blobs: Collection[int]
    ) -> bool:
        allocator = self._extents.allocator
        free = dict(allocator.gaps_below(limit, 1))
        for offset in blobs:
            if not self._extents.is_pinned(offset):
                _add(free, offset, offset + allocator.extent_nbytes(offset), limit)
        left = Counter(run for name in names for run in _runs_of(self._sequences[name]))
        for run, count in left.items():
            if count == self._extents.holders(run):
                _add(free, run, run + allocator.extent_nbytes(run), limit)
        return _fits(free, wanted)

    def unused_nbytes(self) -> int:
        """Bytes that there would be without all that are unused."""
        left = Counter(run for _, _, record in self.unused() for run in _runs_of(record))
        return sum(
            self._extents.allocator.extent_nbytes(run)
            for run, count in left.items()
            if count == self._extents.holders(run)
        )


def _runs_of(record: SequenceRecord) -> list[int]:
    return [run for piece in record.pieces for run in piece.runs]


def _add(free: dict[int, int], start: int, end: int, limit: int) -> None:
    if start < limit:
        free[start] = min(end, limit)


def _fits(free: Mapping[int, int], wanted: Sequence[int]) -> bool:
    """Whether extents of ``wanted`` bytes, largest first, fit into ``free`` ranges (start: end),
    of which some are neighbours."""
    sizes: list[int] = []
    begin = reach = -1
    for start in sorted(free):
        if start != reach:
            if reach > begin:
                sizes.append(reach - begin)
            begin = start
        reach = free[start]
    sizes.append(reach - begin)
    sizes.sort()
    for nbytes in wanted:
        at = bisect_left(sizes, nbytes)
        if at == len(sizes):
            return False
        insort(sizes, sizes.pop(at) - nbytes)
    return True
