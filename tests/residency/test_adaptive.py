"""The adaptive policy against a page cache at its worst: see model.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from residency.model import Machine, longest
from spdk_kv.residency.edge import margin
from spdk_kv.residency.policies import Adaptive
from spdk_kv.units import MIB

# How a store may be able to watch: (cachestat tells, decisions within a scan after misses).
WATCHING = {"measured": (True, 1.0), "measured at once": (True, 0.05), "blind": (False, 1.0)}
watching = pytest.mark.parametrize("watch", WATCHING)


def machine(watch: str, edge: int, promise: int, **more: int) -> Machine:
    tells, alarm = WATCHING[watch]
    return Machine(Adaptive(), edge, promise, tells_resident=tells, alarm=alarm, **more)


def under(promise: int) -> int:
    """The budget in pages where only the available memory budgets it."""
    return promise - -(-margin(promise * MIB) // MIB)


@watching
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("percent", [100, 98, 96, 95, 92, 80, 61, 50, 33, 10])
def test_finds_an_edge_that_is_lower_than_promised(watch: str, percent: int, rows: int) -> None:
    seen = machine(watch, 2000 * percent // 100, 2000, rows=rows)
    seen.run(60)
    best = min(seen.edge, under(2000))
    assert longest(scan.thrashed for scan in seen.scans) <= 2
    # Without cachestat it takes some attempts, each paid for once.
    assert sum(scan.thrashed for scan in seen.scans) <= (4 if WATCHING[watch][0] else 8)
    budgets = [scan.decision.budget_nbytes // MIB for scan in seen.scans]
    assert budgets[3] <= seen.edge
    if watch != "blind":
        assert min(budgets[3:]) >= 0.95 * best - 2
        # A unit has 64 pages and more, so the budget is not filled entirely.
        assert sum(scan.hit for scan in seen.scans[5:]) >= 55 * (0.94 * best - 1.2 * seen.pages)
    elif percent >= 33:
        assert max(budgets[40:]) >= 0.6 * best


@watching
def test_probes_of_a_steady_edge_become_rare(watch: str) -> None:
    steady = machine(watch, 150, 200, layers=16, pages=10)
    steady.run(3000)
    assert longest(scan.thrashed for scan in steady.scans) <= 2
    assert sum(scan.thrashed for scan in steady.scans) <= 30
    assert sum(scan.thrashed for scan in steady.scans[1500:]) <= 4
    assert sum(scan.hit for scan in steady.scans) >= 0.8 * 3000 * 150


@watching
@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75, 1.5, 2, 4])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_follows_available_memory_that_jumps(watch: str, factor: float, share: float) -> None:
    jumping = machine(watch, int(1000 * share), 1000)
    jumping.run(30)
    before = jumping.budget

    def jump(place: int) -> None:
        if place == 40:  # in mid-scan
            jumping.promise = int(1000 * factor)
            jumping.edge = int(1000 * factor * share)

    jumping.scan(jump)
    jumping.run(1)
    if factor > 1 or share == 1:
        # The distance that was learnt is kept, as a share of the available memory.
        expected = min(under(jumping.promise), before * under(jumping.promise) / under(1000))
        assert 0.95 * expected - 2 <= jumping.budget
    jumping.run(20)
    assert longest(scan.thrashed for scan in jumping.scans[30:]) <= 2
    assert len(jumping.cached) * jumping.pages <= jumping.edge * 1.05
    if watch != "blind":
        assert jumping.budget >= 0.9 * min(jumping.edge, under(jumping.promise))


@watching
@pytest.mark.parametrize("seed", range(6))
def test_others_come_and_go_unseen_in_the_available_memory(watch: str, seed: int) -> None:
    chance = random.Random(seed)
    shared = machine(watch, 600, 600, layers=16, pages=24)
    for _ in range(12):
        edge, place = chance.randrange(150, 600), chance.randrange(32)

        def change(now: int, edge: int = edge, place: int = place) -> None:
            if now == place:
                shared.edge = edge

        shared.scan(change)
        shared.run(chance.randrange(20, 120))
    assert longest(scan.thrashed for scan in shared.scans) <= 2
    assert sum(scan.thrashed for scan in shared.scans) <= len(shared.scans) / 8
    shared.edge = 600
    shared.run(500)
    assert shared.budget >= 0.9 * under(600)


@pytest.mark.parametrize("watch", ["measured", "measured at once"])
def test_edge_that_sinks_and_rises_with_every_step(watch: str) -> None:
    sinking = machine(watch, 1000, 1000)
    sinking.run(10)
    for step in (-20, 20):
        for _ in range(30):
            sinking.edge += step
            sinking.scan()
    assert longest(scan.thrashed for scan in sinking.scans) <= 2
    assert sum(scan.hit for scan in sinking.scans[10:40]) > 0.4 * sum(range(400, 1000, 20))
    sinking.run(200)
    assert sinking.budget >= 0.9 * under(1000)


TREMBLES: dict[str, Callable[[int, random.Random], float]] = {
    "random": lambda step, chance: chance.uniform(-0.02, 0.02),
    "alternating": lambda step, chance: 0.02 * (-1) ** step,
    "extremes": lambda step, chance: chance.choice((-0.02, 0.02)),
    "saw": lambda step, chance: (step % 9 - 4) / 200,
}


@pytest.mark.parametrize("tremble", TREMBLES)
@pytest.mark.parametrize("available", [128, 1000, 4000])
def test_does_not_flap_under_available_memory_that_trembles(tremble: str, available: int) -> None:
    for seed in range(3):
        chance = random.Random(seed)
        policy = Adaptive()
        trembling = Machine(policy, available, available, layers=32, pages=max(1, available // 40))
        decisions = []
        for step in range(400):
            trembling.promise = round(available * (1 + TREMBLES[tremble](step, chance)))
            decisions.append(trembling.decide())
        moves = [moved for _, moved in decisions[1:] if moved]
        assert len(moves) <= 1, "one fall from a first look that was too high"
        budgets = [decision.budget_nbytes for decision, _ in decisions]
        assert sum(before != after for before, after in pairwise(budgets)) <= 3
        assert decisions[-1][0].budget_nbytes >= 0.9 * under(available) * MIB


@watching
@pytest.mark.parametrize("place", [0, 1, 16, 31, 40, 63])
def test_cache_emptied_behind_our_back_is_filled_again(watch: str, place: int) -> None:
    emptied = machine(watch, 1000, 1000, pages=30)
    emptied.run(10)
    before = emptied.budget

    def drop(now: int) -> None:
        if now == place:
            emptied.lru.clear()

    emptied.scan(drop)
    emptied.run(25)
    budgets = [scan.decision.budget_nbytes // MIB for scan in emptied.scans]
    if watch == "blind":
        assert budgets[-1] >= 0.9 * before
    else:
        assert min(budgets[10:]) >= 0.9 * before
    assert sum(scan.missed for scan in emptied.scans) <= 2 * before


@watching
def test_no_memory_available_and_back(watch: str) -> None:
    poor = machine(watch, 1000, 1000, pages=30)
    poor.run(5)
    poor.promise = poor.edge = 0
    poor.run(5)
    assert (poor.budget, poor.cached) == (0, frozenset())
    poor.promise = poor.edge = 1000
    poor.run(2)
    assert poor.budget == under(1000)
    assert len(poor.cached) == under(1000) // 30


def test_units_larger_than_the_budget_are_direct() -> None:
    wide = Machine(Adaptive(), 60, 60, pages=64)
    wide.run(3)
    assert wide.cached == frozenset()
    assert "exceed the budget of" in wide.policy.why(wide.units()[0])


def test_under_pressure_nothing_is_raised() -> None:
    pressed = Machine(Adaptive(), 2000, 1000)
    pressed.run(3)
    pressed.pressure, pressed.promise = 40.0, 2000
    pressed.run(10)
    assert pressed.budget == under(1000)
    assert "pressure is 40 %" in pressed.scans[-1].decision.reason
    pressed.pressure = 0.0
    pressed.run(1)
    assert pressed.budget == under(2000)


def test_small_rise_is_believed_after_a_while() -> None:
    rising = Machine(Adaptive(), 2000, 1000)
    rising.run(3)
    rising.promise = 1040
    rising.run(20)
    assert rising.budget == under(1000)
    rising.run(20)
    assert rising.budget == under(1040)


def test_rows_that_were_written_are_no_sign_of_eviction() -> None:
    growing = Machine(Adaptive(), 1000, 1000, layers=16, pages=20)
    growing.run(5)
    before = growing.budget
    for _ in range(20):
        growing.pages += 1
        for key in growing.cached:  # appended directly, and its first read is not excused
            growing.warmed[key] = growing.pages
        growing.scan()
        assert growing.budget == before
    assert sum(scan.missed for scan in growing.scans) > 400


def test_moves_only_the_difference() -> None:
    moving = Machine(Adaptive(), 4000, 2000)
    moving.run(3)
    few = moving.cached
    moving.promise = 4000
    assert moving.scan().moved == len(moving.cached) - len(few)
    assert few < moving.cached
    moving.promise = 2000
    moving.scan()
    assert moving.cached == few
