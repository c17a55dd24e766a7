"""What is counted of one unit and of its sequence: numbers only, no drive."""

from __future__ import annotations

import pytest

from spdk_kv.paths.units import WHOLE_EXTENT, Fill, TrackedUnit, UnitGroup
from spdk_kv.placement import Stretch
from spdk_kv.sequence.reading import by_path

EXTENTS = [[((Stretch(0, 100, (at,)),), 1) for at in (0, 100)]] * 2


@pytest.fixture
def group() -> UnitGroup:
    made = UnitGroup(1, "s")
    made.add(EXTENTS, copyable=True)
    return made


@pytest.fixture
def unit(group: UnitGroup) -> TrackedUnit:
    found = group.units[1]
    found.resize(100)
    found.cached = True
    return found


def test_what_was_never_in_the_cache_was_not_evicted(unit: TrackedUnit) -> None:
    assert unit.record_cold_read(30, unit.warm_epoch) == 0
    assert unit.warmed_nbytes == 30
    assert unit.record_cold_read(80, unit.warm_epoch) == 10, "70 of them came for the first time"
    assert unit.record_cold_read(5, unit.warm_epoch) == 5


def test_a_read_that_began_before_a_count_is_in_the_count(unit: TrackedUnit) -> None:
    before = unit.warm_epoch
    unit.reset_warmed(100)
    assert unit.record_cold_read(10, before) == 0
    assert unit.record_cold_read(10, unit.warm_epoch) == 10


def test_of_copies_only_what_is_filled_is_served(unit: TrackedUnit) -> None:
    assert unit.filled == WHOLE_EXTENT
    assert unit.served_nbytes == 100
    unit.filled = 60
    assert unit.served_nbytes == 60
    unit.fill = Fill(1, 60, 90, unit.copy_epoch)
    unit.resize(70)
    assert (unit.nbytes, unit.served_nbytes, unit.fill.valid_end) == (70, 60, 70)
    unit.resize(50)
    unit.resize(100)
    assert (unit.served_nbytes, unit.fill.valid_end) == (50, 50), "what was cut off is void"


def test_a_layer_that_does_not_come_behind_the_last_starts_a_scan(group: UnitGroup) -> None:
    layers = [0, 1, 1, 0, 1, 3, 2]
    assert [group.enter_layer(layer) for layer in layers] == [
        *(True, False, True, True),
        *(False, False, True),
    ]


def test_reading_ahead_starts_the_first_scan_and_no_other(group: UnitGroup) -> None:
    assert [group.enter_ahead(), group.enter_ahead()] == [True, False]
    assert [group.enter_layer(layer) for layer in (0, 1, 0)] == [False, False, True]
    assert not group.enter_ahead()


def test_a_summary_tells_k_from_v(group: UnitGroup) -> None:
    for place, unit in enumerate(group.units):
        unit.nbytes, unit.cached = 10 << place, place == 2
    assert group.summary() == {
        "name": "s",
        "k_units": 2,
        "k_cached_units": 1,
        "k_nbytes": 50,
        "k_cached_nbytes": 40,
        "v_units": 2,
        "v_cached_units": 0,
        "v_nbytes": 100,
        "v_cached_nbytes": 0,
    }


def test_k_and_v_are_read_by_the_path_of_each(group: UnitGroup) -> None:
    units = group.units[:2]
    assert by_path(units, range(2)) == [(None, range(2))]
    units[0].cached = True
    assert by_path(units, range(2)) == [(units[0], range(1)), (None, range(1, 2))]
    assert by_path(units, range(1, 2)) == [(None, range(1, 2))]
    units[1].cached = True
    assert by_path(units, range(2)) == [(units[0], range(1)), (units[1], range(1, 2))]
