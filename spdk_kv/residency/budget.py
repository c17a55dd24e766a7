"""The budget: follows the available memory, and learns where the kernel evicts.

The edge is sharp: a cyclic scan over a cache that is one page too small misses everything. The
available memory only promises where it is, so the budget keeps a margin under the promise. Once
reads miss what should have been there, the place is remembered as a fraction of the available
memory.
"""

from __future__ import annotations

from collections import deque

from spdk_kv.residency.edge import WORTH, Edge, margin
from spdk_kv.residency.evidence import Evidence
from spdk_kv.residency.misses import Misses
from spdk_kv.units import format_nbytes

# All but the last were chosen with the simulated LRU cache of tests/residency/model.py.
_RISE = 0.06  # available memory that grew by more than this share raises the budget at once
_CONFIRMATIONS = 32  # decisions after which the least memory available in any of them is believed
_CLEAN_BEFORE_RAISE = 4
# Percent (PSI, some avg10): above it others wait for memory, and the budget is not raised.
_MAX_PRESSURE = 10.0


class Budget:
    """The budget, and what was learnt. Call :meth:`update` once per decision.

    ``nbytes``: the budget; never more than the memory available at the last decision.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._available: int | None = None  # for which the budget was set
        self._recent: deque[int] = deque(maxlen=_CONFIRMATIONS)
        self._clean = 0  # clean decisions since the budget last moved
        self._edge = Edge()
        self._misses = Misses()

    def update(self, seen: Evidence) -> str:
        """Judges the last step, then follows the available memory. Returns what became of the
        budget and why, for people."""
        available = seen.available
        self._edge.next_decision()
        self._recent.append(available)
        if self._available is None:
            return self._start(available)
        if self.nbytes > self._edge.tolerance(available):
            return self._fall(seen)
        if seen.shows_eviction and not self._misses.are_refill(seen):
            return self._wait(seen) if self._misses.may_be_passing(seen) else self._cut(seen)
        if not seen.shows_eviction and (not seen.is_silent or not seen.kept):
            self._misses.clear()
            self._clean += 1
            self._edge.record_clean(seen, self.nbytes)
        return self._raise(seen)

    def _start(self, available: int) -> str:
        self._available = available
        self.nbytes = self._edge.ceiling(available)
        return f"set for the first time {self._with(available)}"

    def _fall(self, seen: Evidence) -> str:
        before = self.nbytes
        self.nbytes = min(before, self._edge.ceiling(seen.available))
        self._settle(seen, seen.available)
        return f"down from {format_nbytes(before)} {self._with(seen.available)}"

    def _wait(self, seen: Evidence) -> str:
        self._clean = 0
        return (
            f"unchanged: {format_nbytes(seen.missed)} that should have stayed in the page cache "
            "were missing, and the next reads will show whether they come back"
        )

    def _cut(self, seen: Evidence) -> str:
        before = self.nbytes
        self.nbytes, keeps = self._edge.cut(seen, before)
        self._settle(seen, min(seen.available, self._available or 0))
        return (
            f"down from {format_nbytes(before)}: {format_nbytes(seen.missed)} that should have "
            f"stayed in the page cache were missing, so the kernel keeps only about "
            f"{format_nbytes(keeps)} for us"
        )

    def _settle(self, seen: Evidence, available: int) -> None:
        """After a fall the next scan refills what is left of the kept units, where the kernel had
        dropped them."""
        self._set_for(available)
        self._misses.expect_refill(self.nbytes, seen.kept)

    def _raise(self, seen: Evidence) -> str:
        available, base = seen.available, self._available or 0
        if seen.pressure > _MAX_PRESSURE:
            return f"unchanged: memory pressure is {seen.pressure:.0f} %"
        before = self.nbytes
        if available > base * (1 + _RISE):
            old = self._edge.ceiling(base)
            self.nbytes = self._edge.ceiling(available)
            if old:  # keeps the distance that cuts have made
                self.nbytes = min(self.nbytes, before * self.nbytes // old)
            self._set_for(available)
            return f"up from {format_nbytes(before)} {self._with(available)}"
        if available < base * (1 - _RISE):
            self._set_for(available)
        lowest = min(self._recent, default=0)
        if len(self._recent) == _CONFIRMATIONS and lowest > (self._available or 0):
            self._available = lowest
        goal = self._edge.ceiling(min(self._available or 0, available))
        gap = goal - before
        if gap <= WORTH * available:
            return f"unchanged {self._with(available)}"
        if seen.shows_eviction or self._clean < _CLEAN_BEFORE_RAISE:
            return f"unchanged: it may grow to {format_nbytes(goal)} if the kernel keeps it"
        self.nbytes = goal if gap <= available // 16 else before + gap // 2
        self._clean = 0
        return f"up from {format_nbytes(before)}: nothing that should have stayed was missing"

    def _set_for(self, available: int) -> None:
        self._available = available
        self._recent.clear()
        self._clean = 0

    def _with(self, available: int) -> str:
        learnt = ""
        if self._edge.ceiling(available) < available - margin(available):
            learnt = f", of which the kernel was seen to keep {self._edge.fraction:.0%}"
        return f"with {format_nbytes(available)} of memory available{learnt}"
