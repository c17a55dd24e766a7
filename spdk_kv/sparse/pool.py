"""Which groups of one layer are resident, and in which slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

_NOWHERE = -1
_EMPTY = -1


class Pool:
    """A table per batch row: group -> slot, where the groups wanted least recently make room.

    Holds numbers only. The caller has a buffer of as many slots, reads into it what `take` says is
    missing, and tells with `forget` what could not be read. One thread at a time.

    Attributes:
        rows: batch rows.
        slots: slots of each of them.
        hits, misses: groups that were wanted and resident, or not, since the beginning.
    """

    def __init__(self, rows: int, slots_per_row: int) -> None:
        """
        Args:
            rows: batch rows, at least 1.
            slots_per_row: groups that are resident at most, per row; at least 1.

        Raises:
            ValueError: there is no row, or no slot.
        """
        if rows < 1 or slots_per_row < 1:
            raise ValueError(f"a pool has rows and slots: {rows} rows of {slots_per_row} slots")
        self.hits = self.misses = 0
        self._clock = 0
        self._groups = np.full((rows, slots_per_row), _EMPTY, np.int64)
        self._wanted_at = np.full((rows, slots_per_row), -1, np.int64)
        self._slot_of = np.full((rows, 64), _NOWHERE, np.int64)

    @property
    def rows(self) -> int:
        return self._groups.shape[0]

    @property
    def slots(self) -> int:
        return self._groups.shape[1]

    def take(self, row: int, groups: Array) -> tuple[Array, Array]:
        """Gives each of ``groups`` a slot. Those wanted least recently are evicted for it, none of
        ``groups``; among groups that were wanted at once the lower number counts as earlier.

        Args:
            row: batch row.
            groups: int64 [n], numbers of groups, ascending, each once; at most as many as slots.

        Returns:
            int64 [n], the slot of each, and int64 [m], which of ``groups`` (indices) are missing:
            the caller reads them into their slots.

        Raises:
            ValueError: more groups than slots, or not ascending from 0.
        """
        groups = np.asarray(groups, np.int64)
        if len(groups) > self.slots:
            raise ValueError(f"{len(groups)} groups do not fit into {self.slots} slots")
        if not len(groups):
            return groups, groups
        if groups[0] < 0 or (np.diff(groups) <= 0).any():
            raise ValueError("groups are numbers from 0, ascending, each once")
        self._make_room(int(groups[-1]) + 1)
        slot_of = self._slot_of[row]
        slots = slot_of[groups]
        missing = np.flatnonzero(slots == _NOWHERE)
        now = self._clock + np.arange(len(groups), dtype=np.int64)
        self._clock += len(groups)
        resident = slots[slots != _NOWHERE]
        self._wanted_at[row, resident] = now[slots != _NOWHERE]
        if len(missing):
            slots[missing] = self._evict(row, resident, len(missing))
            self._groups[row, slots[missing]] = groups[missing]
            self._wanted_at[row, slots[missing]] = now[missing]
            slot_of[groups[missing]] = slots[missing]
        self.hits += len(resident)
        self.misses += len(missing)
        return slots, missing

    def resident(self, row: int) -> Array:
        """The groups that have a slot: int64 [n], ascending."""
        groups = self._groups[row]
        return np.sort(groups[groups != _EMPTY])

    def forget(self, row: int, groups: Array) -> None:
        """Empties the slots of those of ``groups`` that have one."""
        known = np.asarray(groups, np.int64)
        known = known[(known >= 0) & (known < self._slot_of.shape[1])]
        slots = self._slot_of[row, known]
        self._slot_of[row, known] = _NOWHERE
        slots = slots[slots != _NOWHERE]
        self._groups[row, slots] = _EMPTY
        self._wanted_at[row, slots] = -1

    def truncate(self, groups: int) -> None:
        """Forgets all groups from number ``groups`` on, in every row."""
        gone = self._groups >= groups
        self._groups[gone] = _EMPTY
        self._wanted_at[gone] = -1
        self._slot_of[:, groups:] = _NOWHERE

    def reorder(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Row i becomes what row ``rows[i]`` was; there may be more or fewer rows afterwards.

        Returns:
            (to, from) of every row whose slots change. Their contents are to be copied as if all at
            once, since a row may be both.
        """
        order = np.asarray(rows, np.int64)
        if not len(order) or order.min() < 0 or order.max() >= self.rows:
            raise ValueError(f"rows are numbers below {self.rows}: {list(rows)}")
        self._groups = self._groups[order]
        self._wanted_at = self._wanted_at[order]
        self._slot_of = self._slot_of[order]
        return [(to, int(source)) for to, source in enumerate(order) if to != source]

    def clear(self) -> None:
        """Forgets everything but the counts."""
        self.truncate(0)

    def _evict(self, row: int, kept: Array, count: int) -> Array:
        """The ``count`` slots that are given up, those wanted longest ago first."""
        age = self._wanted_at[row].copy()
        age[kept] = np.iinfo(np.int64).max
        slots = np.argsort(age, kind="stable")[:count]
        evicted = self._groups[row, slots]
        self._slot_of[row, evicted[evicted != _EMPTY]] = _NOWHERE
        return slots

    def _make_room(self, groups: int) -> None:
        had = self._slot_of.shape[1]
        if groups > had:
            more = np.full((self.rows, max(groups, 2 * had) - had), _NOWHERE, np.int64)
            self._slot_of = np.concatenate([self._slot_of, more], axis=1)
