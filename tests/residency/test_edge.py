"""The edge by its rules: what a cut learns, when the next probe comes and how far it goes."""

from __future__ import annotations

from typing import Any

import pytest

from spdk_kv.residency.edge import Edge
from spdk_kv.residency.evidence import Evidence
from spdk_kv.units import MIB

AVAILABLE = 1000 * MIB


def evidence(kept: int, **changed: Any) -> Evidence:
    fields = {"available": AVAILABLE, "kept": kept, "hit": kept, "missed": 0, "resident": None}
    return Evidence(**(fields | {"pressure": 0.0} | changed))


def cut(edge: Edge, resident: int, kept: int = 800 * MIB) -> int:
    """The kernel kept ``resident`` of ``kept`` bytes; the budget from now on."""
    edge.next_decision()
    return edge.cut(evidence(kept, hit=0, missed=kept, resident=resident), kept)[0]


@pytest.fixture
def edge() -> Edge:
    """One that was seen at half of the memory."""
    made = Edge()
    assert cut(made, 500 * MIB) == made.ceiling(AVAILABLE) == 490 * MIB
    return made


def clean(edge: Edge, times: int, kept: int | None = None) -> None:
    for _ in range(times):
        budget = edge.ceiling(AVAILABLE)
        edge.next_decision()
        edge.record_clean(evidence(budget if kept is None else kept), budget)


@pytest.mark.parametrize(("between", "safety"), [(0, 0.04), (3, 0.04), (4, 0.02)])
def test_cuts_that_follow_each_other_leave_more_room(
    edge: Edge, between: int, safety: float
) -> None:
    for _ in range(between):
        edge.next_decision()
    assert cut(edge, 400 * MIB) == int(400 * MIB * (1 - safety))


def test_more_than_there_is_teaches_nothing() -> None:
    edge = Edge()
    seen = evidence(3 * AVAILABLE, hit=AVAILABLE, missed=2 * AVAILABLE)
    edge.next_decision()
    edge.cut(seen, 3 * AVAILABLE)
    assert edge.fraction == 1.0
    clean(edge, 100)
    assert edge.fraction == 1.0


def test_the_edge_is_probed_after_32_clean_decisions_at_it(edge: Edge) -> None:
    clean(edge, 31)
    assert edge.fraction == 0.5
    clean(edge, 1)
    assert edge.fraction == pytest.approx(0.52)


def test_far_below_the_edge_nothing_is_probed(edge: Edge) -> None:
    for _ in range(100):
        edge.record_clean(evidence(100 * MIB), 100 * MIB)
    assert edge.fraction == 0.5


def test_a_probe_that_let_nothing_in_is_followed_by_another_soon(edge: Edge) -> None:
    clean(edge, 32, kept=480 * MIB)
    clean(edge, 7, kept=480 * MIB)
    assert edge.fraction == pytest.approx(0.52)
    clean(edge, 1, kept=480 * MIB)
    assert edge.fraction == pytest.approx(0.54)


def test_probes_that_succeed_come_sooner_and_go_further(edge: Edge) -> None:
    found = []
    for _ in range(6):
        before, decisions = edge.fraction, 0
        while edge.fraction == before and decisions < 100:
            clean(edge, 1)
            decisions += 1
        found.append((decisions, round(edge.fraction - before, 3)))
    assert found == [(32, 0.02), (32, 0.04), (16, 0.08), (8, 0.16), (8, 0.16), (8, 0.04)]
    assert edge.fraction == 1.0


def test_where_a_probe_finds_the_same_edge_the_next_comes_later(edge: Edge) -> None:
    clean(edge, 32)
    cut(edge, 505 * MIB)
    assert edge.fraction == pytest.approx(0.505)
    clean(edge, 63)
    assert edge.fraction == pytest.approx(0.505)
    clean(edge, 1)
    assert edge.fraction > 0.505


def test_a_time_without_evictions_does_not_put_off_the_first_probe() -> None:
    edge = Edge()
    clean(edge, 100)
    cut(edge, 970 * MIB, kept=AVAILABLE)
    assert edge.fraction == pytest.approx(0.97)
    clean(edge, 31)
    assert edge.fraction == pytest.approx(0.97)
    clean(edge, 1)
    assert edge.fraction > 0.97
