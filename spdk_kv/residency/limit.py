"""X, the bytes that the page cache is to hold: follows the budget, learns where the kernel evicts.

The edge is sharp: a cyclic scan over a cache that is one page too small misses everything. The
budget only promises where it is, so X keeps a margin under the promise, and once reads miss what
should have been there, the place is remembered as a fraction of the budget.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from spdk_kv.residency.types import Observation
from spdk_kv.units import MIB, format_nbytes

# The margin under the budget before anything is learnt: 4 % + 32 MiB, at small budgets less.
_MARGIN_DIVISOR = 25
_MARGIN_NBYTES = 32 * MIB
_MARGIN_SMALL_DIVISOR = 16

_DIRTY_FRACTION = 0.01  # misses above this part of what was read mean that the kernel evicts
_FULL_FRACTION = 0.99  # resident above this part of what is kept means that nothing is missing
_TURN_FRACTION = 0.9  # read again above this part of what is kept makes a turn of the scan
_SAFETY = 0.02  # stay so far under an edge that was met; doubled by cuts that follow each other
_MAX_SAFETY = 0.32
_CUT_MEMORY = 4  # decisions after which a cut no longer counts as following another

_RISE = 0.06  # a budget higher by more than this raises X at once
_CONFIRMATIONS = 32  # decisions after which the lowest budget among them is believed
_CLEAN_BEFORE_RAISE = 4
_WORTH = 0.015  # a raise by less than this part of the budget is not worth moving units

# Clean decisions before the remembered edge is doubted, and the part of the budget by which it is
# then moved up. A doubt that proves right makes the next one come sooner and go further.
_PATIENCE = 32
_MIN_PATIENCE, _MAX_PATIENCE = 8, 512
_DOUBT = 0.02
_MAX_DOUBT = 0.16
_SAME_EDGE = 0.04  # edges nearer than this part of the budget are the same

_MAX_PRESSURE = 10.0  # percent; above it others wait for memory, and X is not raised


@dataclass(frozen=True)
class Evidence:
    """As Observation; ``kept``: bytes on the page-cache path in the last step. ``kept`` and
    ``missed`` are without what was only just written."""

    budget: int
    kept: int
    hit: int
    missed: int
    resident: int | None
    pressure: float

    @classmethod
    def of(cls, seen: Observation, kept: int, grown: int) -> Evidence:
        """``grown``: bytes of the kept units that no read could have brought in yet."""
        return cls(
            seen.budget_nbytes,
            max(0, kept - grown),
            seen.hit_nbytes,
            max(0, seen.missed_nbytes - grown),
            seen.resident_nbytes,
            seen.pressure,
        )

    @property
    def silent(self) -> bool:
        """Nothing was read that could have been missed."""
        return not self.kept or not self.hit + self.missed

    @property
    def dirty(self) -> bool:
        """More was missed than chance explains."""
        return not self.silent and self.missed > _DIRTY_FRACTION * (self.hit + self.missed)

    @property
    def hit_ratio(self) -> float:
        return self.hit / (self.hit + self.missed) if self.hit + self.missed else 0.0


class Limit:
    """X and what was learnt. `update` once per decision; X never exceeds the budget given."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._budget: int | None = None  # that X was set for
        self._recent: deque[int] = deque(maxlen=_CONFIRMATIONS)
        self._edge = 1.0  # fraction of the budget at which the kernel evicted; 1: never seen
        self._good = 0.0  # largest fraction that it was seen to keep since
        self._clean = 0  # clean decisions since X last moved
        self._quiet = 0  # clean decisions since the edge was last doubted
        self._patience = _PATIENCE
        self._doubt = _DOUBT
        self._probing = False  # the edge was doubted since it was met
        self._met = 1.0  # where it was met
        self._proven = 0.0  # what was good when it was last doubted
        self._cuts = 0  # cuts that followed each other
        self._since_cut = _CUT_MEMORY
        # After a fall the kept units are read anew where the kernel had dropped them: misses still
        # excused by that, bytes read since, and hits to expect of the step that does it.
        self._refill = 0
        self._reread = 0
        self._refill_ratio = 0.0
        self._suspect: int | None = None  # bytes resident when misses were seen and not yet judged

    def update(self, seen: Evidence) -> str:
        """Moves X; the reason, in words. Judges the last step before it follows the budget."""
        budget = seen.budget
        self._since_cut += 1
        self._recent.append(budget)
        if self._budget is None:
            return self._start(budget)
        if self.nbytes > self._tolerated(budget):
            return self._fall(seen)
        if seen.dirty and not self._refilling(seen):
            return self._doubtful(seen) or self._cut(seen)
        if not seen.dirty and (not seen.silent or not seen.kept):
            self._note_clean(seen)
        return self._raise(seen)

    def _start(self, budget: int) -> str:
        self._budget = budget
        self.nbytes = self._ceiling(budget)
        return f"starts {self._under(budget)}"

    def _fall(self, seen: Evidence) -> str:
        before = self.nbytes
        self.nbytes = min(before, self._ceiling(seen.budget))
        self._settle(seen, seen.budget)
        return f"falls from {format_nbytes(before)} with the budget, {self._under(seen.budget)}"

    def _doubtful(self, seen: Evidence) -> str:
        """What is said when the misses may come from a cache that was emptied once, rather than
        from one that is too small; else ''. The former fills again, the latter does not."""
        suspect, self._suspect = self._suspect, None
        if seen.resident is None:
            return ""
        if suspect is None:
            turn = seen.hit + seen.missed >= _TURN_FRACTION * seen.kept
            # Emptied within a turn, it was hit before that, and has filled again since.
            if turn and seen.hit_ratio * seen.kept + seen.resident < seen.kept:
                return ""
            self._suspect = seen.resident
        elif seen.resident >= suspect + seen.missed / 2:
            self._expect_refill(seen.kept, seen.kept)
        else:
            return ""
        self._clean = 0
        return (
            f"stays: {format_nbytes(seen.missed)} that were to stay were missing; the next reads "
            "tell whether they come back"
        )

    def _cut(self, seen: Evidence) -> str:
        before, budget = self.nbytes, seen.budget
        self._cuts = self._cuts + 1 if self._since_cut <= _CUT_MEMORY else 0
        if self._good * budget >= seen.kept * (1 - _SAFETY):
            self._good = 0.0  # what was good is not any more
        keeps, edge = self._estimate(seen)
        safety = min(_MAX_SAFETY, _SAFETY * 2**self._cuts)
        self.nbytes = min(before, int(keeps * (1 - safety)))
        if budget:
            self._edge = min(1.0, edge / budget)
            self._good = min(self._good, self.nbytes / budget)
        again = self._probing and abs(self._edge - self._met) < _SAME_EDGE
        self._patience = min(_MAX_PATIENCE, self._patience * 2) if again else _PATIENCE
        self._met = self._edge
        self._doubt = _DOUBT
        self._probing = False
        self._quiet = 0
        self._since_cut = 0
        self._settle(seen, min(budget, self._budget or 0))
        return (
            f"falls from {format_nbytes(before)}: {format_nbytes(seen.missed)} that were to stay "
            f"were missing, so the kernel keeps only about {format_nbytes(keeps)} for us"
        )

    def _settle(self, seen: Evidence, budget: int) -> None:
        """After X fell: what is left of the kept units is refilled in the next turn."""
        self._moved(budget)
        self._suspect = None
        self._expect_refill(self.nbytes, seen.kept)

    def _expect_refill(self, nbytes: int, kept: int) -> None:
        self._refill = nbytes
        self._reread = 0
        self._refill_ratio = 0.4 * min(1.0, nbytes / kept) if kept else 0.0

    def _refilling(self, seen: Evidence) -> bool:
        """Whether the misses are those of the one turn after a fall that reads anew what the
        kernel had dropped before."""
        excused, self._refill = self._refill, max(0, self._refill - seen.missed)
        self._reread += seen.hit + seen.missed
        if seen.missed > excused:
            return False
        if self._reread < _TURN_FRACTION * seen.kept:
            return True
        self._refill = 0
        if seen.resident is not None:
            return seen.resident >= _FULL_FRACTION * seen.kept
        return seen.hit_ratio >= self._refill_ratio

    def _estimate(self, seen: Evidence) -> tuple[float, float]:
        """Bytes that the kernel keeps for us, and the least amount known to be too much."""
        if seen.resident is not None:
            keeps = float(min(seen.resident, seen.kept))
            return keeps, keeps
        # A scan that thrashes hits next to nothing wherever the edge is, so hits are only a lower
        # bound: try what was good before, or half. Where that failed too, believe the hits.
        keeps = seen.hit_ratio * seen.kept
        if self._cuts == 0:
            good = self._good * seen.budget
            keeps = max(keeps, good if good else seen.kept / 2)
        return keeps, float(seen.kept)

    def _note_clean(self, seen: Evidence) -> None:
        self._refill, self._suspect = 0, None
        self._clean += 1
        if seen.budget:
            self._good = max(self._good, min(seen.kept, self.nbytes) / seen.budget)
        if self._edge == 1.0:
            return
        self._quiet += 1
        at_edge = self._ceiling(seen.budget) - self.nbytes <= _WORTH * seen.budget
        # A doubt that let no further unit in has told nothing.
        untried = self._probing and self._good <= self._proven
        if at_edge and self._quiet >= (_MIN_PATIENCE if untried else self._patience):
            # The last doubt was right if more is kept since than what was too much.
            if self._probing and self._good > self._met:
                self._patience = max(_MIN_PATIENCE, self._patience // 2)
                self._doubt = min(_MAX_DOUBT, self._doubt * 2)
            self._edge = min(1.0, self._edge + self._doubt)
            self._probing, self._proven = True, self._good
            self._quiet = 0

    def _raise(self, seen: Evidence) -> str:
        budget, base = seen.budget, self._budget or 0
        if seen.pressure > _MAX_PRESSURE:
            return f"stays: memory pressure is {seen.pressure:.0f} %"
        before = self.nbytes
        if budget > base * (1 + _RISE):
            old = self._ceiling(base)
            self.nbytes = self._ceiling(budget)
            if old:  # keeps the distance that cuts have made
                self.nbytes = min(self.nbytes, before * self.nbytes // old)
            self._moved(budget)
            return f"rises from {format_nbytes(before)}, {self._under(budget)}"
        if budget < base * (1 - _RISE):
            self._moved(budget)
        lowest = min(self._recent, default=0)
        if len(self._recent) == _CONFIRMATIONS and lowest > (self._budget or 0):
            self._budget = lowest
        goal = self._ceiling(min(self._budget or 0, budget))
        gap = goal - before
        if gap <= _WORTH * budget:
            return f"stays, {self._under(budget)}"
        if seen.dirty or self._clean < _CLEAN_BEFORE_RAISE:
            return f"stays below {format_nbytes(goal)} until the kernel is seen to keep it"
        self.nbytes = goal if gap <= budget // 16 else before + gap // 2
        self._clean = 0
        return f"rises from {format_nbytes(before)}: nothing that was to stay was missing"

    def _moved(self, budget: int) -> None:
        self._budget = budget
        self._recent.clear()
        self._clean = 0

    def _ceiling(self, budget: int) -> int:
        """The most that X may be under ``budget``."""
        known = int(budget * self._edge * (1 - _SAFETY)) if self._edge < 1.0 else budget
        return max(0, min(budget - margin(budget), known))

    def _tolerated(self, budget: int) -> int:
        """X falls only beyond this, half the margin above the ceiling, so that a budget that
        trembles does not pull X along."""
        known = int(budget * self._edge * (1 - _SAFETY / 2)) if self._edge < 1.0 else budget
        return max(0, min(budget - margin(budget) // 2, known))

    def _under(self, budget: int) -> str:
        learnt = ""
        if self._ceiling(budget) < budget - margin(budget):
            learnt = f" of which the kernel was seen to keep {self._edge:.0%}"
        return f"under a budget of {format_nbytes(budget)}{learnt}"


def margin(budget: int) -> int:
    """Bytes of ``budget`` that are left free as long as nothing else is learnt."""
    return budget // _MARGIN_DIVISOR + min(_MARGIN_NBYTES, budget // _MARGIN_SMALL_DIVISOR)
