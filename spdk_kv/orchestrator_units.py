"""What the orchestrator knows of a sequence: its units, the path of each, and when it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Extents = tuple[tuple[int, int], ...]
"""(offset, nbytes) of each extent."""


@dataclass(eq=False)
class TrackedUnit:
    """One layer's K or V of one sequence.

    ``cached``: reads go through the page cache. ``nbytes``: what is on the device now, kept up to
    date by the layer. ``warmed_nbytes``: what reads brought into the cache since the unit was
    promoted; what is missed beyond the unit's size had been there, and was evicted. ``looks``: how
    often it was looked up what the kernel has of it.
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

    @property
    def key(self) -> tuple[int, int, int]:
        """(sequence's number, layer, 0 for K and 1 for V): orders the units as a scan does."""
        return (self.group.number, self.layer, self.value)

    @property
    def capacity_nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.extents)

    @property
    def label(self) -> str:
        return f"{self.group.name}, layer {self.layer}, {'V' if self.value else 'K'}"

    def warm(self, cold_nbytes: int, looks: int) -> int:
        """Takes note of a read that found so much not in the cache; returns what of it should
        have been there. ``looks``: as it was when the read began."""
        if looks != self.looks:
            return 0  # the look has seen what the read brought in, or would bring
        filled = min(cold_nbytes, max(0, self.nbytes - self.warmed_nbytes))
        self.warmed_nbytes += filled
        return cold_nbytes - filled


@dataclass(eq=False)
class UnitGroup:
    """The units of one sequence, and the state of its scan: layers are read in turns."""

    number: int
    name: str
    units: list[TrackedUnit] = field(default_factory=list)
    last_layer: int | None = None
    turned: bool = False
    idle_steps: int = 0

    def add(self, extents: Sequence[Extents]) -> None:
        """``extents``: of K and V of each layer, in turn."""
        self.units = [
            TrackedUnit(self, number // 2, number % 2, unit) for number, unit in enumerate(extents)
        ]

    def begins_turn(self, layer: int) -> bool:
        """Whether a read of ``layer`` begins another turn through the layers."""
        begins = self.last_layer is None or layer <= self.last_layer
        self.last_layer = layer
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
