"""What a policy decides about, what it is given, and what it returns: numbers and names only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Unit:
    """One layer's K or V of one sequence.

    Attributes:
        key: opaque to the policy.
        nbytes: its bytes on the drive now; grows as tokens are appended.
        weight: its importance, given by the caller; heavier units are kept first.
        idle_steps: decisions since its sequence last started a scan.
        capacity_nbytes: its final size, 0 where unknown.
        sequence: units of equal ``sequence`` are scanned together.

    Raises:
        ValueError: for negative sizes or steps, and a weight that is not finite.
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
        """Bytes to plan with: an empty unit is about to be filled."""
        return self.nbytes or self.capacity_nbytes


@dataclass(frozen=True)
class Observation:
    """What was seen since the last decision.

    Attributes:
        available_nbytes: the available memory: what the page cache could hold for us in all,
            including what it holds already.
        hit_nbytes: bytes that the page-cache path read and found in the cache.
        missed_nbytes: bytes that it read and did not find there, though they had been. A unit's
            first read after its promotion does not count.
        pressure: PSI memory, some avg10, in percent; 0 where unknown.
        resident_nbytes: bytes of the units now kept that the kernel really has in the page cache
            (`memory.cached_nbytes`), None where unknown. Measured only after misses, to show how
            much the kernel keeps. The misses alone do not show it: a cyclic scan over a cache that
            is one page too small misses everything.

    Raises:
        ValueError: for negative byte counts, and a pressure that is no percentage.
    """

    available_nbytes: int
    hit_nbytes: int = 0
    missed_nbytes: int = 0
    pressure: float = 0.0
    resident_nbytes: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.available_nbytes, self.hit_nbytes, self.missed_nbytes)
        if min(*sizes, self.resident_nbytes or 0) < 0:
            raise ValueError(f"an observation's byte counts are not negative: {self}")
        if not 0 <= self.pressure <= 100:
            raise ValueError(f"pressure is a percentage: {self}")


@dataclass(frozen=True)
class Decision:
    """Which units are on the page-cache path.

    Attributes:
        cached: their keys; all other units are read directly.
        budget_nbytes: bytes that the units in ``cached`` may have in all. "X" in DUAL-BLADE.
        reason: one sentence for people.
    """

    cached: frozenset[Hashable]
    budget_nbytes: int
    reason: str


class Policy(Protocol):
    """Decides between the steps which units the page cache holds. One instance per store.

    Its state is plain numbers: the same calls give the same answers. It does no I/O and reads no
    clock, so it never blocks. One thread at a time.
    """

    name: str

    def decide(
        self, units: Sequence[Unit], cached: frozenset[Hashable], seen: Observation
    ) -> Decision:
        """Chooses the units for the page-cache path.

        Args:
            units: all there are, in the order of a scan.
            cached: keys of those on the page-cache path now.
            seen: what was seen since the last decision.

        Raises:
            ValueError: two units share a key.
        """
        ...

    def why(self, unit: Unit) -> str:
        """Why ``unit`` is on its path since the last decision, for people."""
        ...


def check_keys(units: Iterable[Unit]) -> None:
    """Raises ValueError when two of ``units`` share a key."""
    counts = Counter(unit.key for unit in units)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"each unit has a key of its own: {twice[0]!r} comes twice")
