"""What the orchestrator knows of a sequence: its units, the path of each, and when it was read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from spdk_kv.residency import Unit

Extents = tuple[tuple[int, int], ...]
"""(offset, nbytes) of each extent."""


EVERYTHING = 1 << 62
"""More bytes than any extent has."""


@dataclass(eq=False)
class Fill:
    """Bytes ``[start, end)`` of each of a unit's ``count`` extents on their way into a copy.

    ``life``: the unit's when it began. ``cut``: what lies from there on was truncated since.
    ``over`` is set when nothing is written any more.
    """

    count: int
    start: int
    end: int
    life: int
    cut: int = EVERYTHING
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def nbytes(self) -> int:
        return self.count * (self.end - self.start)


@dataclass(eq=False)
class TrackedUnit:
    """One layer's K or V of one sequence.

    ``cached``: reads go through the page cache, as far as every extent is ``filled``: to the end
    where that is the page cache of the same bytes, and as far as it was copied where it is another
    medium's. ``life`` then tells how often that was forgotten; ``fill`` is what is being copied.
    ``nbytes``: what is on the device now. ``warmed_nbytes``: what reads brought into the cache
    since the unit was promoted; what is missed beyond what is served from there had been there, and
    was evicted. ``looks``: how often it was looked up what the kernel has of it.
    """

    group: UnitGroup
    layer: int
    value: int
    extents: Extents
    weight: float = 1.0
    nbytes: int = 0
    cached: bool = False
    warmed_nbytes: int = 0
    looks: int = 0
    filled: int = EVERYTHING
    life: int = 0
    fill: Fill | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """(sequence's number, layer, 0 for K and 1 for V): orders the units as a scan does."""
        return (self.group.number, self.layer, self.value)

    @property
    def capacity_nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.extents)

    @property
    def served_nbytes(self) -> int:
        """Of ``nbytes`` those that reads through the page cache deliver."""
        return min(self.nbytes, self.filled * len(self.extents))

    def resize(self, nbytes: int) -> None:
        """The device has the first ``nbytes`` of every extent now."""
        self.nbytes = nbytes * len(self.extents)
        if nbytes < self.filled < EVERYTHING:
            self.filled = nbytes
        if self.fill is not None:
            self.fill.cut = min(self.fill.cut, nbytes)

    @property
    def label(self) -> str:
        return f"{self.group.name}, layer {self.layer}, {'V' if self.value else 'K'}"

    def numbers(self) -> Unit:
        """What a policy is told of it."""
        return Unit(
            key=self.key,
            nbytes=self.nbytes,
            capacity_nbytes=self.capacity_nbytes,
            weight=self.weight,
            idle_steps=self.group.idle_steps,
            sequence=self.group.number,
        )

    def warm(self, cold_nbytes: int, looks: int) -> int:
        """Takes note of a read that found so much not in the cache; returns what of it should
        have been there. ``looks``: as it was when the read began."""
        if looks != self.looks:
            return 0  # the look has seen what the read brought in, or would bring
        filled = min(cold_nbytes, max(0, self.served_nbytes - self.warmed_nbytes))
        self.warmed_nbytes += filled
        return cold_nbytes - filled


@dataclass(eq=False)
class UnitGroup:
    """The units of one sequence, and the state of its scan: layers are read in turns."""

    number: int
    name: str
    units: list[TrackedUnit] = field(default_factory=list)
    last_layer: int | None = None
    begun_ahead: bool = False
    turned: bool = False
    idle_steps: int = 0

    def add(self, extents: Sequence[Extents]) -> None:
        """``extents``: of K and V of each layer, in turn."""
        self.units = [
            TrackedUnit(self, number // 2, number % 2, unit) for number, unit in enumerate(extents)
        ]

    def begins_turn(self, layer: int) -> bool:
        """Whether a read of ``layer`` begins another turn through the layers."""
        first = self.last_layer is None
        begins = not self.begun_ahead if first else layer <= (self.last_layer or 0)
        self.last_layer = layer
        return begins

    def begins_ahead(self) -> bool:
        """Whether reading ahead begins the first turn: nothing was read before."""
        begins = self.last_layer is None and not self.begun_ahead
        self.begun_ahead |= begins
        return begins

    def summary(self) -> dict[str, str | int]:
        """Units and bytes of K and of V in all, and of those on the page-cache path."""
        told: dict[str, str | int] = {"name": self.name}
        for value, part in enumerate("kv"):
            units = [unit for unit in self.units if unit.value == value]
            cached = [unit for unit in units if unit.cached]
            told[f"{part}_units"] = len(units)
            told[f"{part}_cached_units"] = len(cached)
            told[f"{part}_nbytes"] = sum(unit.nbytes for unit in units)
            told[f"{part}_cached_nbytes"] = sum(unit.nbytes for unit in cached)
        return told
