"""The units of a sequence: where each lies, its path, and what the page cache has of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from spdk_kv._native.holding import Hold
from spdk_kv.placement import Ground, locate
from spdk_kv.residency import Unit

Extents = tuple[tuple[int, int], ...]
"""(offset, nbytes) of what a unit has on the drive."""


WHOLE_EXTENT = 1 << 62
"""More bytes than any extent has: all of it, however long it is."""


@dataclass(eq=False)
class Fill:
    """Bytes ``[start, end)`` of each of a unit's ``count`` extents on their way into its copy.

    ``copy_epoch``: the unit's when the fill started. ``valid_end``: where the unit was truncated
    since; what lies behind is void. ``ended``: set once nothing is written any more. ``hold``
    counts its memory.
    """

    count: int
    start: int
    end: int
    copy_epoch: int
    valid_end: int = WHOLE_EXTENT
    ended: threading.Event = field(default_factory=threading.Event)
    hold: Hold | None = None

    @property
    def nbytes(self) -> int:
        return self.count * (self.end - self.start)


@dataclass(eq=False)
class TrackedUnit:
    """One layer's K or V of one sequence.

    ``ground``: where its ``count`` extents lie, which grow together. ``copyable``: whether there
    may be copies of it: not where it shares ground, of which the owner may have some.

    ``cached``: whether it is on the page-cache path. ``nbytes``: its bytes on the drive now.

    ``filled``: bytes of every extent that the page cache serves: all where it caches the drive's
    own bytes, those copied so far where it holds copies. ``fill``: the copying under way.
    ``copy_epoch``: changes whenever the copy was forgotten, so that a read which began before does
    not trust what it found.

    ``warmed_nbytes``: bytes that reads brought into the cache since the promotion. A read that
    finds any of them missing has met an eviction. ``warm_epoch``: changes whenever
    ``warmed_nbytes`` was set anew, so that reads which began before do not count twice.
    """

    group: UnitGroup
    layer: int
    value: int
    ground: Ground
    count: int
    copyable: bool = True
    weight: float = 1.0
    nbytes: int = 0
    cached: bool = False
    warmed_nbytes: int = 0
    warm_epoch: int = 0
    filled: int = WHOLE_EXTENT
    copy_epoch: int = 0
    fill: Fill | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """(sequence's number, layer, 0 for K and 1 for V): sorts units in the order of a scan."""
        return (self.group.number, self.layer, self.value)

    @property
    def extents(self) -> Extents:
        """All that it may use of the drive, in the order of its bytes."""
        return tuple(
            (offset, stretch.end - stretch.start)
            for stretch in self.ground
            for offset in stretch.offsets
        )

    def ranges(self, start: int, end: int) -> Extents:
        """Where bytes ``[start, end)`` of its extents lie: those of the first, then of the next."""
        return tuple(
            place
            for number in range(self.count)
            for place in locate(self.ground, number, start, end)
        )

    @property
    def capacity_nbytes(self) -> int:
        return self.count * (self.ground[-1].end if self.ground else 0)

    @property
    def served_nbytes(self) -> int:
        """Bytes of ``nbytes`` that the page cache serves if the unit is on its path."""
        return min(self.nbytes, self.filled * self.count)

    def resize(self, nbytes: int) -> None:
        """The drive has the first ``nbytes`` of every extent now."""
        self.nbytes = nbytes * self.count
        if nbytes < self.filled < WHOLE_EXTENT:
            self.filled = nbytes
        if self.fill is not None:
            self.fill.valid_end = min(self.fill.valid_end, nbytes)

    def for_policy(self) -> Unit:
        """The numbers that a policy decides by."""
        return Unit(
            key=self.key,
            nbytes=self.nbytes,
            capacity_nbytes=self.capacity_nbytes,
            weight=self.weight,
            idle_steps=self.group.idle_steps,
            sequence=self.group.number,
        )

    def reset_warmed(self, nbytes: int) -> None:
        """``nbytes`` of it are in the page cache now."""
        self.warmed_nbytes = nbytes
        self.warm_epoch += 1

    def record_cold_read(self, cold_nbytes: int, warm_epoch: int) -> int:
        """A read found ``cold_nbytes`` missing from the page cache.

        Args:
            cold_nbytes: what it had to fetch from the drive.
            warm_epoch: the unit's when the read began.

        Returns:
            Bytes of them that had been in the cache, and were evicted.
        """
        if warm_epoch != self.warm_epoch:
            return 0  # the reset already accounts for what the read brought in
        filled = min(cold_nbytes, max(0, self.served_nbytes - self.warmed_nbytes))
        self.warmed_nbytes += filled
        return cold_nbytes - filled


@dataclass(eq=False)
class UnitGroup:
    """The units of one sequence, and how far its present scan has come.

    ``units``: all of them, and ``layers`` those of each layer. ``idle_steps``: decisions since the
    sequence last started a scan. ``read_nbytes``, ``written_nbytes``: what was done since it is
    tracked; ``used`` sorts sequences by when that was.
    """

    number: int
    name: str
    units: list[TrackedUnit] = field(default_factory=list)
    layers: list[list[TrackedUnit]] = field(default_factory=list)
    idle_steps: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    used: int = 0
    _last_layer: int | None = None
    _started_ahead: bool = False

    def add(self, layers: Sequence[Sequence[tuple[Ground, int]]], copyable: bool) -> None:
        """``layers``: of each layer's units (K, then V) the ground, and how many extents they
        have."""
        self.layers = [
            [
                TrackedUnit(self, number, value, ground, count, copyable)
                for value, (ground, count) in enumerate(units)
            ]
            for number, units in enumerate(layers)
        ]
        self.units = [unit for units in self.layers for unit in units]

    def enter_layer(self, layer: int) -> bool:
        """A read of ``layer`` begins. Returns whether it starts another scan."""
        is_first = self._last_layer is None
        starts = not self._started_ahead if is_first else layer <= (self._last_layer or 0)
        self._last_layer = layer
        return starts

    def enter_ahead(self) -> bool:
        """Reading ahead begins. Returns whether that starts the first scan of all."""
        starts = self._last_layer is None and not self._started_ahead
        self._started_ahead |= starts
        return starts

    def summary(self) -> dict[str, str | int]:
        """Units and bytes of K and of V: all of them, and those on the page-cache path."""
        numbers: dict[str, str | int] = {"name": self.name}
        for value, part in enumerate("kv"):
            units = [unit for unit in self.units if unit.value == value]
            cached = [unit for unit in units if unit.cached]
            numbers[f"{part}_units"] = len(units)
            numbers[f"{part}_cached_units"] = len(cached)
            numbers[f"{part}_nbytes"] = sum(unit.nbytes for unit in units)
            numbers[f"{part}_cached_nbytes"] = sum(unit.nbytes for unit in cached)
        return numbers

    def traffic(self) -> dict[str, str | int]:
        """Its units and bytes, those of them on the page-cache path, and what was done so far."""
        cached = [unit for unit in self.units if unit.cached]
        return {
            "name": self.name,
            "units": len(self.units),
            "cached_units": len(cached),
            "nbytes": sum(unit.nbytes for unit in self.units),
            "cached_nbytes": sum(unit.nbytes for unit in cached),
            "read_nbytes": self.read_nbytes,
            "written_nbytes": self.written_nbytes,
        }
