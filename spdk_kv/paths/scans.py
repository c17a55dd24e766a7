"""Which sequences there are, which of them are in use, and which started a scan since the last
decision."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from spdk_kv.paths.units import TrackedUnit, UnitGroup
from spdk_kv.placement import Ground
from spdk_kv.residency import Unit, spread

# Decisions without a scan after which a sequence falls asleep. Chosen: far more than those of
# sequences that take turns (see _AWAKE_STEPS of residency/order.py).
_ASLEEP_STEPS = 16


class Scans:
    """The unit groups of all sequences. One thread at a time.

    A sequence that nobody has used for a while is *asleep*: it keeps what the page cache has of it,
    and a policy sees all of those as one unit. So a decision takes as long as the sequences in use
    need, however many others there are. ``sleeps``: false for policies that have to know each unit.
    """

    def __init__(self, sleeps: bool = True) -> None:
        self._sleeps = sleeps
        self._awake: dict[int, UnitGroup] = {}
        self._asleep: dict[int, UnitGroup] = {}  # the one asleep for longest first
        self._asleep_nbytes: dict[int, int] = {}  # what the page cache has of each
        self._asleep_total = 0
        self._naps = 0  # how often one fell asleep
        self._last_number = 0
        self._scanned: set[int] = set()  # numbers of groups that started a scan since the decision

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """Those of all sequences, in the order in which they came."""
        both = self._awake | self._asleep
        return tuple(both[number] for number in sorted(both))

    @property
    def is_empty(self) -> bool:
        """Whether there is no sequence at all."""
        return not (self._awake or self._asleep)

    def units(self) -> Iterator[TrackedUnit]:
        """All units of sequences that are awake, in the order of a scan."""
        return (unit for number in sorted(self._awake) for unit in self._awake[number].units)

    def add(
        self, name: str, layers: Sequence[Sequence[tuple[Ground, int]]], copyable: bool
    ) -> UnitGroup:
        """A new group; see :meth:`UnitGroup.add`."""
        self._last_number += 1
        group = UnitGroup(self._last_number, name)
        group.add(layers, copyable)
        self._awake[group.number] = group
        return group

    def remove(self, group: UnitGroup) -> bool:
        """Whether ``group`` was still there."""
        self.wake(group)
        self._scanned.discard(group.number)
        return self._awake.pop(group.number, None) is not None

    def is_decision_due(self, group: UnitGroup) -> bool:
        """Called when ``group`` starts a scan. Sequences that scan alternately share a decision:
        one is due when the first of them starts its next scan."""
        due = group.number in self._scanned or not self._scanned
        if due:
            self._scanned.clear()
            for other in list(self._awake.values()):
                other.idle_steps += 1
                if self._sleeps and other.idle_steps > _ASLEEP_STEPS and other is not group:
                    self._lull(other)
        return due

    def mark_scanned(self, group: UnitGroup) -> None:
        """``group`` is in use: its scan has started, and the decision before it was made."""
        group.idle_steps = 0
        if group.number in self._awake:  # a read may have begun just before its delete
            self._scanned.add(group.number)

    # -- sleep ----------------------------------------------------------------------------------

    def wake(self, group: UnitGroup) -> None:
        """``group`` is in use: its units are decided about one by one again."""
        if group.number in self._asleep:
            self._asleep_total -= self._asleep_nbytes.pop(group.number)
            self._awake[group.number] = self._asleep.pop(group.number)

    def _lull(self, group: UnitGroup) -> None:
        nbytes = sum(unit.nbytes for unit in group.units if unit.cached)
        self._asleep[group.number] = self._awake.pop(group.number)
        self._asleep_nbytes[group.number] = nbytes
        self._asleep_total += nbytes
        self._naps += 1

    def is_asleep(self, group: UnitGroup) -> bool:
        """Whether nobody has used it for a while."""
        return group.number in self._asleep

    def sleeper(self) -> Unit | None:
        """What the page cache has of the sequences asleep, as one unit; None if it has nothing.

        It has another key whenever one fell asleep: nothing was written that makes it larger.
        """
        if not self._asleep_total:
            return None
        key: Hashable = ("asleep", self._naps)
        return Unit(key, self._asleep_total, idle_steps=2 * _ASLEEP_STEPS, sequence=key)

    def displaced(self, room: int) -> Iterator[TrackedUnit]:
        """Units of sequences asleep that have to leave the page cache, so that at most ``room``
        bytes of them stay there: those of the ones asleep for longest."""
        for number, group in list(self._asleep.items()):
            if self._asleep_total <= room:
                return
            # What stays of a sequence is spread evenly over its scan, as policies do it.
            for place in reversed(spread(len(group.units))):
                unit = group.units[place]
                if unit.cached and self._asleep_total > room:
                    self._asleep_total -= unit.nbytes
                    self._asleep_nbytes[number] -= unit.nbytes
                    yield unit
