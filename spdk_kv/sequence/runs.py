"""Runs of chunks that cover some pieces of extents, neighbours joined: arithmetic, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]

# More than any extent has: rows are told apart by multiples of it.
_APART = 1 << 48


@dataclass(frozen=True)
class Runs:
    """Bytes ``[starts[i], ends[i])`` of extents ``numbers[i]``, whole chunks, in ascending order;
    each from byte ``at[i]`` of one memory of ``nbytes`` on."""

    numbers: Ints
    starts: Ints
    ends: Ints
    at: Ints
    nbytes: int

    @classmethod
    def covering(cls, numbers: Ints, starts: Ints, nbytes: int, chunk: int) -> Runs:
        """The least that has ``nbytes`` from each of ``starts`` of extents ``numbers`` on. Those
        that touch are one run."""
        if not len(starts):
            return cls(numbers, starts, starts, starts, 0)
        place = np.sort(numbers * _APART + starts)  # so that ends ascend as well
        begin = place // chunk * chunk
        end = -(-(place + nbytes) // chunk) * chunk
        is_first = np.ones(len(begin), bool)
        is_first[1:] = begin[1:] > end[:-1]
        firsts = np.flatnonzero(is_first)
        begin, end = begin[firsts], end[np.append(firsts[1:], len(end)) - 1]
        lengths = end - begin
        until = np.cumsum(lengths)
        own = begin // _APART
        base = own * _APART
        return cls(own, begin - base, end - base, until - lengths, int(until[-1]))

    def places(self, numbers: Ints, starts: Ints) -> Ints:
        """Where in the memory byte ``starts[i]`` of extent ``numbers[i]`` is, which a run has."""
        keys = self.numbers * _APART + self.starts
        run = np.searchsorted(keys, numbers * _APART + starts, side="right") - 1
        return self.at[run] + starts - self.starts[run]

    def within(self, start: int, end: int) -> tuple[Ints, Ints, Ints, Ints]:
        """The parts of runs in bytes ``[start, end)`` of the extents: number, start, end, and where
        in the memory."""
        first, last = np.maximum(self.starts, start), np.minimum(self.ends, end)
        some = first < last
        first, last = first[some], last[some]
        return self.numbers[some], first, last, self.at[some] + first - self.starts[some]
