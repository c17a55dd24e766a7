"""The pool against a plain least-recently-used table, whatever is done to it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from spdk_kv.sparse import Pool

GROUPS = 200


def numbers(*groups: int) -> np.ndarray:
    return np.array(groups, np.int64)


def test_a_group_that_is_wanted_again_is_a_hit() -> None:
    pool = Pool(1, 4)
    slots, missing = pool.take(0, numbers(3, 7, 9))
    assert missing.tolist() == [0, 1, 2]
    again, missing = pool.take(0, numbers(7, 8))
    assert again[0] == slots[1]
    assert missing.tolist() == [1]
    assert (pool.hits, pool.misses) == (1, 4)


def test_what_was_wanted_least_recently_makes_room() -> None:
    pool = Pool(1, 4)
    pool.take(0, numbers(1, 2))
    pool.take(0, numbers(3, 4))
    pool.take(0, numbers(1, 5))
    assert pool.resident(0).tolist() == [1, 3, 4, 5]


def test_with_as_many_slots_as_are_wanted_the_last_set_is_kept() -> None:
    pool = Pool(1, 3)
    pool.take(0, numbers(1, 2, 3))
    pool.take(0, numbers(2, 5, 6))
    assert pool.resident(0).tolist() == [2, 5, 6]


def test_rows_are_apart() -> None:
    pool = Pool(2, 2)
    pool.take(0, numbers(1, 2))
    assert pool.take(1, numbers(1, 2))[1].tolist() == [0, 1]


def test_what_could_not_be_read_is_missing_again() -> None:
    pool = Pool(1, 4)
    pool.take(0, numbers(1, 2, 300))
    pool.forget(0, numbers(2, 300, 4000))
    assert pool.take(0, numbers(1, 2, 300))[1].tolist() == [1, 2]


def test_reordering_says_what_to_copy() -> None:
    pool = Pool(2, 2)
    first, _ = pool.take(0, numbers(1, 2))
    pool.take(1, numbers(5, 6))
    assert pool.reorder([0, 0, 1]) == [(1, 0), (2, 1)]
    assert pool.rows == 3
    assert pool.take(1, numbers(1, 2))[0].tolist() == first.tolist()
    assert pool.resident(2).tolist() == [5, 6]


@pytest.mark.parametrize("groups", [numbers(1, 2, 3), numbers(2, 1), numbers(1, 1), numbers(-1, 2)])
def test_what_is_wanted_is_ascending_and_fits(groups: np.ndarray) -> None:
    pool = Pool(1, 2)
    with pytest.raises(ValueError, match="groups"):
        pool.take(0, groups)
    assert pool.resident(0).tolist() == []
    assert (pool.hits, pool.misses) == (0, 0)


@pytest.mark.parametrize("rows", [[], [2], [-1]])
def test_reordering_takes_rows_that_there_are(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows"):
        Pool(2, 2).reorder(rows)


@pytest.mark.parametrize(("rows", "slots"), [(0, 1), (1, 0)])
def test_a_pool_has_rows_and_slots(rows: int, slots: int) -> None:
    with pytest.raises(ValueError, match="pool"):
        Pool(rows, slots)


class AgainstModel(RuleBasedStateMachine):
    """Per row an OrderedDict, the one wanted least recently first. ``contents`` is the buffer of
    the caller: what would be attended to is always what was asked for."""

    @initialize(rows=st.integers(1, 3), slots=st.integers(1, 12))
    def begin(self, rows: int, slots: int) -> None:
        self.slots = slots
        self.pool = Pool(rows, slots)
        self.model: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(rows)]
        self.contents = np.full((rows, slots), -1)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, self.pool.rows - 1))
        wanted = data.draw(st.sets(st.integers(0, GROUPS), max_size=self.slots))
        groups = numbers(*sorted(wanted))
        held = self.model[row]
        expected = [index for index, group in enumerate(groups.tolist()) if group not in held]
        slots, missing = self.pool.take(row, groups)
        assert missing.tolist() == expected
        self.contents[row, slots[missing]] = groups[missing]
        assert self.contents[row, slots].tolist() == groups.tolist()
        for group in groups.tolist():
            held[group] = None
            held.move_to_end(group)
        while len(held) > self.slots:
            held.popitem(last=False)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, self.pool.rows - 1))
        groups = data.draw(st.sets(st.integers(0, 2 * GROUPS), max_size=20))
        self.pool.forget(row, numbers(*sorted(groups)))
        for group in groups:
            self.model[row].pop(group, None)

    @rule(groups=st.integers(0, GROUPS))
    def truncate(self, groups: int) -> None:
        self.pool.truncate(groups)
        for held in self.model:
            for group in [group for group in held if group >= groups]:
                del held[group]

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.model = [OrderedDict() for _ in self.model]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        row = st.integers(0, self.pool.rows - 1)
        rows = data.draw(st.lists(row, min_size=1, max_size=4))
        copies = self.pool.reorder(rows)
        before = self.contents
        self.contents = np.full((len(rows), self.slots), -1)
        same = {to: to for to in range(len(rows))}
        for to, source in {**same, **dict(copies)}.items():
            self.contents[to] = before[source]
        self.model = [self.model[row].copy() for row in rows]

    @invariant()
    def holds_the_same(self) -> None:
        for row, held in enumerate(getattr(self, "model", ())):
            assert self.pool.resident(row).tolist() == sorted(held)


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
