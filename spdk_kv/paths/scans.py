"""Which sequences there are, and which of them has started a scan since the last decision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spdk_kv.paths.units import Extents, TrackedUnit, UnitGroup


class Scans:
    """The unit groups of all sequences in use. One thread at a time."""

    def __init__(self) -> None:
        self._groups: dict[int, UnitGroup] = {}
        self._last_number = 0
        self._scanned: set[int] = set()  # numbers of groups that started a scan since the decision

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        return tuple(self._groups.values())

    def units(self) -> Iterator[TrackedUnit]:
        """All units, in the order of a scan."""
        return (unit for group in self._groups.values() for unit in group.units)

    def add(self, name: str, extents: Sequence[Extents]) -> UnitGroup:
        """A new group. ``extents``: those of K and V of each layer, alternating."""
        self._last_number += 1
        group = UnitGroup(self._last_number, name)
        group.add(extents)
        self._groups[group.number] = group
        return group

    def remove(self, group: UnitGroup) -> bool:
        """Whether ``group`` was still there."""
        self._scanned.discard(group.number)
        return self._groups.pop(group.number, None) is not None

    def is_decision_due(self, group: UnitGroup) -> bool:
        """Called when ``group`` starts a scan. Sequences that scan alternately share a decision:
        one is due when the first of them starts its next scan."""
        due = group.number in self._scanned or not self._scanned
        if due:
            self._scanned.clear()
            for other in self._groups.values():
                other.idle_steps += 1
        return due

    def mark_scanned(self, group: UnitGroup) -> None:
        """``group`` is in use: its scan has started, and the decision before it was made."""
        self._scanned.add(group.number)
        group.idle_steps = 0
