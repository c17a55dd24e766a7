"""A set of bytes, as ranges that do not touch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """Ranges ``[start, end)`` of offsets; what touches is joined. Not thread-safe; nothing blocks.

    An operation takes two look-ups by bisection, and moves the ranges behind the place in memory.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.nbytes = 0
        """How many bytes are in the set."""
        for start, end in ranges:
            self.add(start, end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Adds ``[start, end)``, whatever part of it is there already."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)  # also one that ends where this begins
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._replace(first, last, [start], [end])

    def remove(self, start: int, end: int) -> None:
        """Takes ``[start, end)`` out, as far as it is there."""
        first, last = self._touched(start, end)
        if first >= last:
            return
        starts, ends = [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            ends.append(start)
        if self._ends[last - 1] > end:
            starts.append(end)
            ends.append(self._ends[last - 1])
        self._replace(first, last, starts, ends)

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of ``[start, end)`` that are in the set, in order."""
        first, last = self._touched(start, end)
        return [(max(start, self._starts[i]), min(end, self._ends[i])) for i in range(first, last)]

    def lacking(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of ``[start, end)`` that are not in the set, in order."""
        found = []
        for left, right in self.within(start, end):
            if start < left:
                found.append((start, left))
            start = right
        if start < end:
            found.append((start, end))
        return found

    def end_of(self, offset: int) -> int:
        """Where the range that holds ``offset`` ends; ``offset`` where none does."""
        at = bisect_right(self._starts, offset) - 1
        return max(offset, self._ends[at]) if at >= 0 else offset

    def clear(self) -> None:
        """Takes everything out."""
        self._replace(0, len(self._starts), [], [])

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        """Positions of the ranges that share bytes with ``[start, end)``."""
        if start >= end:
            return 0, 0
        return bisect_right(self._ends, start), bisect_left(self._starts, end)

    def _replace(self, first: int, last: int, starts: list[int], ends: list[int]) -> None:
        self.nbytes += sum(ends) - sum(starts)
        self.nbytes -= sum(self._ends[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = starts
        self._ends[first:last] = ends
