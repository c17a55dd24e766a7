"""Residency policies, pure functions: the published contract, the order, what each does alone."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdk_kv.residency.order import prefix, priority, spread
from spdk_kv.residency.policies import (
    Adaptive,
    AllDirect,
    AllPageCache,
    Observation,
    PaperPolicy,
    Policy,
    Unit,
    make_policy,
)
from spdk_kv.testing import PolicyContract
from spdk_kv.testing.policies import unit_lists
from spdk_kv.units import GIB, MIB

NAMES = ("adaptive", "paper", "direct", "pagecache")
NONE: frozenset[object] = frozenset()

sizes = st.integers(0, 1 << 40) | st.integers(0, 100)


def layers(count: int, nbytes: int = 64 * MIB, sequence: int = 0) -> list[Unit]:
    return [
        Unit((sequence, layer, part), nbytes, sequence=sequence)
        for layer in range(count)
        for part in (0, 1)
    ]


class TestAdaptive(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("adaptive")


class TestPaper(PolicyContract):
    # Binds units for good by their final sizes, under the budget of the first decision.
    holds_budget = False
    holds_available = False

    def make_policy(self) -> Policy:
        return make_policy("paper")


class TestDirect(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("direct")


class TestPageCache(PolicyContract):
    holds_available = False  # takes every unit, however little memory there is

    def make_policy(self) -> Policy:
        return make_policy("pagecache")


@given(sizes, sizes)
def test_adaptive_exceeds_neither_the_available_memory_nor_its_maximum(
    available: int, most: int
) -> None:
    decision = make_policy("adaptive", most).decide(layers(4, 5), NONE, Observation(available))
    assert decision.budget_nbytes <= min(available, most)


def test_adaptive_says_what_it_does_and_why() -> None:
    policy = Adaptive()
    units = layers(16)
    decision = policy.decide(units, NONE, Observation(GIB))
    assert decision.reason == (
        "the budget is 951.0 MiB, set for the first time with 1.0 GiB of memory available; it "
        "holds 14 of 32 units, 896.0 MiB"
    )
    assert policy.why(units[0]) == (
        "page cache: number 1 of 32 by use, weight and place in the scan, of which 14 fit into the "
        "budget of 951.0 MiB"
    )
    assert policy.why(units[-1]).startswith("direct: number 32 of 32")
    assert policy.why(Unit("new", 1)) == "direct: it was not there at the last decision"
    lost = Observation(GIB, missed_nbytes=896 * MIB, resident_nbytes=500 * MIB)
    decision = policy.decide(units, decision.cached, lost)
    assert (
        "down from 951.0 MiB: 896.0 MiB that should have stayed in the page cache were missing, "
        "so the kernel keeps only about 500.0 MiB for us"
    ) in decision.reason
    assert decision.budget_nbytes == int(500 * MIB * 0.98)


def test_empty_units_count_with_the_size_that_they_will_have() -> None:
    coming = [replace(unit, nbytes=0, capacity_nbytes=64 * MIB) for unit in layers(16)]
    filled = layers(16)
    seen = Observation(GIB)
    assert Adaptive().decide(coming, NONE, seen).cached == (
        Adaptive().decide(filled, NONE, seen).cached
    )


# -- the order ------------------------------------------------------------------------------------


@given(st.integers(0, 300))
def test_every_prefix_is_spread_evenly(count: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    for taken in range(1, count + 1):
        places = sorted(order[:taken])
        gaps = [after - before for before, after in pairwise([*places, places[0] + count])]
        assert max(gaps) <= 2 * Fraction(count, taken)
        # Any part of the scan has its share, but for a few.
        for part in (count // 2, count // 3):
            share = Fraction(taken * part, count)
            assert abs(sum(place < part for place in places) - share) <= 3


def test_both_paths_have_work_in_every_layer_when_half_is_cached() -> None:
    for count in (4, 16, 28, 32, 36, 61, 80):
        half = priority(layers(count))[:count]
        assert {unit.key[1] for unit in half} == set(range(count))


def test_order_is_by_use_then_weight_then_place() -> None:
    units = layers(8)
    assert [unit.key for unit in priority(units)[:4]] == [
        (0, 0, 0),
        (0, 4, 0),
        (0, 2, 0),
        (0, 6, 0),
    ]
    heavy = [replace(unit, weight=2.0) if unit.key[1] == 5 else unit for unit in units]
    assert [unit.key[1] for unit in priority(heavy)[:2]] == [5, 5]
    idle = [replace(unit, idle_steps=9) for unit in heavy] + layers(8, sequence=1)
    assert [unit.key[0] for unit in priority(idle)] == [1] * 16 + [0] * 16
    napping = [replace(unit, idle_steps=3) for unit in layers(8)] + layers(8, sequence=1)
    assert [unit.key[0] for unit in priority(napping)[:4]] == [0, 1, 0, 1]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 3))
def test_a_sequence_that_comes_does_not_reshuffle_the_others(
    count: int, sequences: int, gone: int
) -> None:
    units = [unit for number in range(sequences) for unit in layers(count, sequence=number)]
    fewer = [unit for unit in units if unit.sequence != gone]
    left = [unit for unit in priority(units) if unit.sequence != gone]
    assert left == priority(fewer)


@given(unit_lists, sizes, sizes, st.data())
def test_a_larger_limit_keeps_what_a_smaller_one_keeps(
    units: list[Unit], one: int, other: int, data: st.DataObject
) -> None:
    small, large = sorted((one, other))
    # A unit that only the larger limit could hold alone may take the place of others.
    units = [unit for unit in units if not small < unit.planned_nbytes <= large]
    cached = frozenset(unit.key for unit in units if data.draw(st.booleans(), label=str(unit.key)))
    order = priority(units)
    few, many = prefix(order, cached, small), prefix(order, cached, large)
    assert many[: len(few)] == few
    assert sum(unit.nbytes for unit in many) <= large


def test_unit_joins_only_with_room_to_spare_and_stays_without() -> None:
    units = priority(layers(4, 1000))
    all_in = frozenset(unit.key for unit in units)
    assert len(prefix(units, NONE, 8000)) == 7
    assert len(prefix(units, NONE, 8040)) == 8
    assert len(prefix(units, all_in, 8000)) == 8
    assert len(prefix(units, all_in, 7999)) == 7
    (alone, *_) = units
    assert prefix([alone], all_in, alone.planned_nbytes) == [alone]
    assert prefix([alone], all_in, alone.planned_nbytes - 1) == []


# -- the simple ones ------------------------------------------------------------------------------


def test_all_direct_and_all_page_cache_look_at_nothing() -> None:
    units = layers(4)
    for available in (0, GIB):
        assert AllDirect().decide(units, NONE, Observation(available)).cached == NONE
        through = AllPageCache().decide(units, NONE, Observation(available))
        assert through.cached == {unit.key for unit in units}


def test_paper_binds_in_order_by_final_size_and_for_good() -> None:
    policy = PaperPolicy()
    assert policy.decide([], NONE, Observation(5 * GIB)).cached == NONE
    units = [replace(unit, nbytes=MIB, capacity_nbytes=100 * MIB) for unit in layers(4)]
    decision = policy.decide(units, NONE, Observation(350 * MIB))
    assert decision.cached == {(0, 0, 0), (0, 0, 1), (0, 1, 0)}
    assert decision.budget_nbytes == 350 * MIB
    for available in (0, 10 * GIB):  # the budget is fixed at the start
        again = policy.decide(units, decision.cached, Observation(available))
        assert again.cached == decision.cached
    assert policy.why(units[0]).startswith("page cache: when it appeared")
    assert policy.why(units[7]).startswith("direct: when it appeared")
    # What a deleted sequence leaves is for those that come, not for those that are bound.
    more = layers(1, 100 * MIB, sequence=1)
    after = policy.decide(units[1:] + more, NONE, Observation(0)).cached
    assert after == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}


def test_paper_takes_a_budget_that_is_given() -> None:
    policy = make_policy("paper", 128 * MIB)
    decision = policy.decide(layers(4), NONE, Observation(0))
    assert decision.cached == {(0, 0, 0), (0, 0, 1)}
    assert "given" in decision.reason


# -- bad input ------------------------------------------------------------------------------------


def test_policies_by_name() -> None:
    assert tuple(make_policy(name).name for name in NAMES) == NAMES
    with pytest.raises(ValueError, match="'best'; there are adaptive, paper, direct, pagecache"):
        make_policy("best")
    with pytest.raises(ValueError, match="not negative: -1"):
        make_policy("paper", -1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nbytes": -1},
        {"idle_steps": -1},
        {"capacity_nbytes": -5},
        {"weight": math.nan},
        {"weight": math.inf},
    ],
)
def test_impossible_units_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a unit's"):
        Unit(**({"key": 1, "nbytes": 1} | wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"available_nbytes": -1},
        {"hit_nbytes": -1},
        {"missed_nbytes": -1},
        {"resident_nbytes": -1},
        {"pressure": -0.1},
        {"pressure": 101},
        {"pressure": math.nan},
    ],
)
def test_impossible_observations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"not negative|percentage"):
        Observation(**({"available_nbytes": 1} | wrong))
