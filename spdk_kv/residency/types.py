"""What residency decides about, what it is told, and what it answers: numbers and names only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Unit:
    """One layer's K or V of one sequence.

    ``key``: opaque to the policy. ``nbytes``: its bytes on the device now; grows as tokens are
    appended. ``weight``: its importance, given by the caller; more is kept first. ``idle_steps``:
    decisions since its sequence was last read. ``capacity_nbytes``: its final size, 0 where
    unknown. ``sequence``: what it is scanned together with; units of equal ``sequence`` are
    spread over their scan. Raises ValueError for what cannot be.
    """

    key: Hashable
    nbytes: int
    weight: float = 1.0
    idle_steps: int = 0
    capacity_nbytes: int = 0
    sequence: Hashable = None

    def __post_init__(self) -> None:
        if min(self.nbytes, self.idle_steps, self.capacity_nbytes) < 0:
            raise ValueError(f"a unit's sizes and idle steps are not negative: {self}")
        if not math.isfinite(self.weight):
            raise ValueError(f"a unit's weight is a finite number: {self}")

    @property
    def planned_nbytes(self) -> int:
        """Bytes to count with: an empty unit is about to be filled."""
        return self.nbytes or self.capacity_nbytes


@dataclass(frozen=True)
class Observation:
    """What was seen since the last decision; all byte counts, raises ValueError below 0.

    ``budget_nbytes``: what the page cache may hold for us in all, what it holds already included.
    ``hit_nbytes``: read by the page-cache path and found in the cache. ``missed_nbytes``: read by
    that path of units that should have been in the cache, and were not (a unit's first read after
    its promotion does not count). ``pressure``: PSI memory, some avg10, in percent; 0 where
    unknown. ``resident_nbytes``: of the units now kept, bytes that the kernel really has in the
    page cache (`memory.cached_nbytes`); None where that is unknown. It is looked at only after
    misses, and then tells how much the kernel gives, which the misses alone do not: a cyclic scan
    over a cache that is one page too small misses everything.
    """

    budget_nbytes: int
    hit_nbytes: int = 0
    missed_nbytes: int = 0
    pressure: float = 0.0
    resident_nbytes: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.budget_nbytes, self.hit_nbytes, self.missed_nbytes, self.resident_nbytes or 0)
        if min(sizes) < 0:
            raise ValueError(f"an observation's byte counts are not negative: {self}")
        if not 0 <= self.pressure <= 100:
            raise ValueError(f"pressure is a percentage: {self}")


@dataclass(frozen=True)
class Decision:
    """``cached``: the keys of the units on the page-cache path; all others are on the direct one.

    ``limit_nbytes``: X, the bytes that the units in ``cached`` may have in all. ``reason``: one
    sentence for people.
    """

    cached: frozenset[Hashable]
    limit_nbytes: int
    reason: str


class Policy(Protocol):
    """Decides between the steps which units the page cache is to hold.

    Keeps its state as plain numbers, one instance per store: the same calls give the same
    answers. No I/O and no clock, so it never blocks; one thread at a time.
    """

    name: str

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        """``units``: all there are, in the order of a scan; ``cached``: keys of those on the
        page-cache path now. Raises ValueError when two units share a key."""
        ...

    def why(self, unit: Unit) -> str:
        """Of the last decision: why ``unit`` is on the path that it is on."""
        ...


def check_keys(units: Iterable[Unit]) -> None:
    """Raises ValueError when two of ``units`` share a key."""
    counts = Counter(unit.key for unit in units)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"each unit has a key of its own: {twice[0]!r} comes twice")
