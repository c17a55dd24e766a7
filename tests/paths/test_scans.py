"""Sequences that nobody uses cost decisions nothing, and keep what they have if there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paths.helpers import (
    UNIT_NBYTES,
    UNITS,
    filled,
    open_dual,
    paths,
    scans,
    set_available,
    units,
)
from spdk_kv.paths.scans import Scans
from spdk_kv.placement import Stretch
from store.helpers import folder_fixture

folder = folder_fixture
MIB = 1 << 20
EXTENTS = [[((Stretch(0, 100, (at,)),), 1) for at in (0, 100)]] * 2


def step(found: Scans, group: Any, times: int = 1) -> None:
    for _ in range(times):
        found.wake(group)
        found.is_decision_due(group)
        found.mark_scanned(group)


def cached(group: Any, nbytes: int = 10) -> Any:
    for unit in group.units:
        unit.nbytes, unit.cached = nbytes, True
    return group


def test_who_does_not_scan_falls_asleep_and_wakes_when_used():
    found = Scans()
    busy, idle, bare = (found.add(name, EXTENTS, True) for name in ("busy", "idle", "bare"))
    cached(idle)
    step(found, busy, 16)
    assert found.sleeper() is None
    assert len(list(found.units())) == 12
    step(found, busy)
    assert found.is_asleep(idle)
    assert found.is_asleep(bare)
    assert not found.is_asleep(busy)
    assert list(found.units()) == busy.units
    assert found.groups == (busy, idle, bare)
    first = found.sleeper()
    assert first is not None
    assert first.nbytes == 40
    found.wake(idle)
    assert found.sleeper() is None
    assert list(found.units()) == [*busy.units, *idle.units]
    step(found, busy)
    again = found.sleeper()
    assert again is not None
    assert again.key != first.key, "it would seem to have grown"
    assert found.remove(idle)
    assert not found.remove(idle)
    assert found.sleeper() is None


def test_those_asleep_for_longest_make_room_first():
    found = Scans()
    busy, second, first = (found.add(name, EXTENTS, True) for name in ("busy", "b", "a"))
    cached(first)
    cached(second)
    step(found, busy, 5)
    step(found, second)
    step(found, busy, 40)
    assert found.is_asleep(second)
    for unit in found.displaced(50):
        unit.cached = False
    left = found.sleeper()
    assert left is not None
    assert left.nbytes == 50
    assert [unit.cached for unit in second.units] == [True] * 4
    assert sum(unit.cached for unit in first.units) == 1
    found.wake(first)
    left = found.sleeper()
    assert left is not None
    assert left.nbytes == 40


def test_a_policy_that_binds_for_good_is_shown_all():
    found = Scans(sleeps=False)
    busy, idle = found.add("busy", EXTENTS, True), cached(found.add("idle", EXTENTS, True))
    step(found, busy, 50)
    assert not found.is_asleep(idle)
    assert len(list(found.units())) == 8


def test_a_decision_is_about_sequences_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dual(folder, 3 * UNITS * UNIT_NBYTES, capacity="64 MiB") as store:
        idle, idle_reference = filled(store, "idle")
        scans(idle, idle_reference, 2)
        assert paths(store) == ["C"] * UNITS
        busy, reference = filled(store, "busy")
        shown: list[int] = []
        decide = store.paths._policy.decide

        def counted(given: Any, *rest: Any) -> Any:
            shown.append(len(given))
            return decide(given, *rest)

        monkeypatch.setattr(store.paths._policy, "decide", counted)
        scans(busy, reference, 20)
        assert shown[0] == 2 * UNITS
        assert shown[-1] == UNITS + 1
        assert paths(store) == ["C"] * (2 * UNITS), "there is room for both"
        why = [entry["why"] for entry in store.why()][:UNITS]
        assert all("not in use" in each for each in why)
        # Less memory: the one asleep gives up as many units as have to go, and no more.
        set_available(store, (UNITS + UNITS // 2) * UNIT_NBYTES + MIB)
        scans(busy, reference, 2)
        assert paths(store)[UNITS:] == ["C"] * UNITS
        assert 0 < paths(store)[:UNITS].count("C") < UNITS
        kept = sum(unit.nbytes for unit in units(store) if unit.cached)
        assert kept <= store.stats()["residency"]["budget_nbytes"]
        scans(idle, idle_reference, 2)  # its bytes are right from either path
        scans(busy, reference)
