"""The bytes of sequences whose units move between the page cache and the direct path meanwhile."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    rule,
    run_state_machine_as_test,
)

import spdk_kv
from paths.helpers import (
    DIRECT_ENGINES,
    MIB,
    PLENTY,
    SHAPE,
    UNIT_NBYTES,
    UNITS,
    dropped,
    empty_cache,
    fill_cache,
    filled,
    open_dual,
    paths,
    resident_nbytes,
    scans,
    set_available,
    units,
)
from paths.machine import LITTLE, TwoSequences
from sequence.helpers import Reference
from spdk_kv.paths.order import ScanOrder
from spdk_kv.units import KIB
from store.helpers import folder_fixture
from support.rounds import examples
from support.waiting import PATIENCE_S

folder = folder_fixture
engines = pytest.mark.parametrize("engine", DIRECT_ENGINES)


class PathsMachine(TwoSequences):
    """Two sequences, one decision after another, and a kernel that drops pages as it likes."""

    options: dict[str, Any]
    granularity: Any

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="spdk_kv-test-"))
        self.store = open_dual(self.folder, capacity="32 MiB", **self.options)
        self.sequences = [
            self.store.sequence(name, LITTLE, granularity=self.granularity) for name in "ab"
        ]
        self.references = [Reference(LITTLE, seed) for seed in (0, 10**6)]

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            for which in (0, 1):
                self.references[which].check(self.sequences[which])
            # Else a wrong read of one path would hide behind a right one of the other.
            assert self.store.stats()["residency"]["taken_over_nbytes"] == 0
        finally:
            self.store.close()
            shutil.rmtree(self.folder)

    which, layer = TwoSequences.which, TwoSequences.layer

    @rule(which=which)
    def scan(self, which: int) -> None:
        self.references[which].check(self.sequences[which])

    @rule(which=which, layer=layer, weight=st.sampled_from([0.5, 1.0, 2.0]))
    def weigh(self, which: int, layer: int, weight: float) -> None:
        self.sequences[which].set_weight([layer], weight)

    @rule()
    def lose_pages(self) -> None:
        empty_cache(self.folder / "data")

    @rule()
    def read_by_others(self) -> None:
        fill_cache(self.folder / "data")

    @rule(which=which)
    def replace(self, which: int) -> None:
        self.sequences[which].delete()
        self.sequences[which] = self.store.sequence(
            "ab"[which], LITTLE, granularity=self.granularity
        )
        self.references[which] = Reference(LITTLE, self.references[which].seed + 10**4)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("residency", ["adaptive", "pagecache"])
@engines
def test_bytes_are_those_appended_whatever_is_decided(
    engine: str, residency: str, granularity: str
) -> None:
    fields = {
        "options": {"engine": engine, "policy": residency},
        "granularity": granularity,
    }
    machine = type(f"Paths_{engine}_{residency}_{granularity}", (PathsMachine,), fields)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(20),
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )


@engines
def test_threads_that_append_and_read_while_units_move(folder: Path, engine: str) -> None:
    shape = spdk_kv.KVShape(3, 2, 16, "float32", 1500, 2)
    failures: list[BaseException] = []
    over = threading.Event()
    with open_dual(folder, engine=engine) as store:
        sequence = store.sequence("s", shape)

        until = time.monotonic() + PATIENCE_S

        def moves() -> int:
            counters = store.stats()["residency"]
            return min(counters["promotions"], counters["demotions"])

        def use(layer: int) -> None:
            """One thread has the layer to itself, and knows its bytes."""
            reference, chance = Reference(shape, layer * 10**6), random.Random(layer)
            steps = 0
            while steps < 150 or (moves() <= 10 and time.monotonic() < until):
                steps += 1
                match chance.randrange(6):
                    case 0 | 1:
                        room = shape.max_tokens - sequence.tokens(layer)
                        reference.append(sequence, min(room, chance.choice([1, 64, 333])), layer)
                    case 2:
                        keep = chance.randrange(sequence.tokens(layer) + 1)
                        reference.truncate(sequence, keep, layer)
                    case 3:
                        sequence.prefetch([chance.randrange(shape.layers)])
                    case _:
                        reference.check_layer(sequence, layer)
            reference.check_layer(sequence, layer)

        def move() -> None:
            chance = random.Random(7)
            while not over.is_set():
                set_available(store, chance.choice([0, 200 * KIB, MIB, PLENTY]))
                store.paths.decide()
                if chance.random() < 0.1:
                    empty_cache(folder / "data")
                if chance.random() < 0.05:
                    fill_cache(folder / "data")

        def guarded(work: Any, *arguments: Any) -> None:
            try:
                work(*arguments)
            except BaseException as failure:
                failures.append(failure)

        users = [
            threading.Thread(target=guarded, args=(use, layer)) for layer in range(shape.layers)
        ]
        mover = threading.Thread(target=guarded, args=(move,))
        for thread in (*users, mover):
            thread.start()
        for thread in users:
            thread.join()
        over.set()
        mover.join()
        if failures:
            raise failures[0]
        assert moves() > 10
        counters = store.stats()["residency"]
        assert min(counters["cached_read_nbytes"], counters["direct_read_nbytes"]) > 0
        assert counters["taken_over_nbytes"] == 0
        sequence.delete()
        assert store.paths.ahead.held_nbytes == 0


# -- reading ahead --------------------------------------------------------------------------------


def ahead(sequence: Any) -> list[int]:
    """Layers that are read ahead just now."""
    return [
        number
        for number, layer in enumerate(sequence._layers)
        if layer.reader.prefetched.reading is not None
    ]


def watch_held(store: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how much is held by what is read ahead, whenever more is read."""
    held = []
    hold = store.paths.ahead.hold

    def noted(nbytes: int) -> Any:
        taken = hold(nbytes)
        held.append(store.paths.ahead.held_nbytes)
        return taken

    monkeypatch.setattr(store.paths.ahead, "hold", noted)
    return held


@engines
@pytest.mark.parametrize("available", [0, 5 * UNIT_NBYTES])
def test_the_order_of_the_scans_is_learnt(folder: Path, engine: str, available: int) -> None:
    with open_dual(folder, available, engine=engine) as store:
        sequence, reference = filled(store, tokens=500)
        order = [2, 0, 3, 1]
        for scan in range(2):
            for layer in order:
                reference.check_layer(sequence, layer)
                if scan == 0:
                    assert ahead(sequence) == []
        for at, layer in enumerate(order):
            reference.check_layer(sequence, layer)
            assert set(ahead(sequence)) == {*order} - {layer}, at
        # Another order is not followed blindly, and bytes are right in any.
        for layer in (3, 1, 1, 0, 2, 0, 2, 1):
            reference.check_layer(sequence, layer)
        sequence.read_ahead = False
        for _ in range(3):
            scans(sequence, reference)
        assert ahead(sequence) == []


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], []),
        ([0, 1, 2, 0, 1, 2], []),  # 2 -> 0 was seen once
        ([0, 1, 2, 0, 1, 2, 0], [1, 2]),
        ([2, 0, 1, 2, 0, 1, 2], [0, 1]),
        ([0, 1, 2, 0, 1, 2, 0, 2, 0], []),
        ([0, 0, 0, 0], []),
        ([0, 1, 0, 1, 0, 1], [0]),
    ],
)
def test_what_follows_is_expected_only_when_seen_twice(
    seen: list[int], expected: list[int]
) -> None:
    order = ScanOrder()
    for layer in seen:
        order.record(layer)
    assert order.expected(8) == expected
    assert order.expected(1) == expected[:1]


@engines
def test_a_long_list_is_worked_off_in_order_within_half_of_staging(
    folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dual(folder, 5 * UNIT_NBYTES, engine=engine, staging="8 MiB") as store:
        sequence, reference = filled(store, tokens=1900)
        held = watch_held(store, monkeypatch)
        sequence.prefetch([3, 1, 0, 2])
        assert ahead(sequence) == [1, 3]
        reference.check_layer(sequence, 3)
        assert ahead(sequence) == [0, 1]
        reference.check_layer(sequence, 1)
        assert ahead(sequence) == [0, 2]
        reference.check_layer(sequence, 0)
        reference.check_layer(sequence, 2)
        assert ahead(sequence) == []
        assert 2 * UNIT_NBYTES < max(held) <= 4 * MIB
        assert store.paths.ahead.held_nbytes == 0


def test_a_store_begins_with_nothing_counted(folder: Path) -> None:
    with open_dual(folder) as store:
        stats = store.stats()
        counted = {name: stats[name] for name in ("hits", "misses", "evictions", "corruptions")}
        of_paths = ("decisions", "promotions", "demotions", "missed_nbytes", "filled_nbytes")
        of_paths += ("cached_read_nbytes", "direct_read_nbytes", "taken_over_nbytes")
        counted |= {name: stats["residency"][name] for name in of_paths}
        assert set(counted.values()) == {0}, counted
        _, reference = filled(store, tokens=100)
        for decisions in (1, 2):
            scans(store.sequence("s"), reference)
            assert store.stats()["residency"]["decisions"] == decisions


def test_a_policy_is_told_of_nothing_where_nothing_was_read_through_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dual(folder, 0) as store:
        seen: list[Any] = []
        decide = store.paths._policy.decide

        def noted(given: Any, cached: Any, observation: Any) -> Any:
            seen.append(observation)
            return decide(given, cached, observation)

        monkeypatch.setattr(store.paths._policy, "decide", noted)
        sequence, reference = filled(store, tokens=100)
        scans(sequence, reference, 3)
        told = [(each.hit_nbytes, each.missed_nbytes, each.resident_nbytes) for each in seen]
        assert told == [(0, 0, None)] * 3


def test_who_left_is_dropped_and_who_came_back_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dual(folder) as store:
        filled(store, tokens=100)
        unit, dropper, cache = units(store)[0], store.paths._dropper, store.paths.routes.cache
        assert dropper is not None
        assert cache is not None
        found: list[int] = []
        drop = cache.drop

        def noted(offset: int, nbytes: int) -> None:
            found.append(offset)
            drop(offset, nbytes)

        monkeypatch.setattr(cache, "drop", noted)
        where = [offset for offset, _ in unit.extents]
        dropper.drop_later(unit)
        dropped(store)
        assert found == where
        unit.cached, unit.warmed_nbytes = True, 100
        dropper.drop_later(unit)
        dropped(store)
        assert found == where
        assert unit.warmed_nbytes == 0
        unit.warmed_nbytes = 100
        dropper.drop_now(unit)
        assert found == where * 2
        assert unit.warmed_nbytes == 0


class Told:
    """A watcher that counts what it is told."""

    def __init__(self) -> None:
        self.changes = self.closes = 0

    def changed(self) -> None:
        self.changes += 1

    def close(self) -> None:
        self.closes += 1


def test_a_watcher_is_told_who_comes_and_goes_and_of_the_end(folder: Path) -> None:
    store = open_dual(folder)
    watcher, told = store.paths._watcher, Told()
    assert watcher is not None
    store.paths.watch(told)
    sequence, reference = filled(store, tokens=100)
    assert told.changes == 1
    scans(sequence, reference)
    assert told.changes == 2, "the first decision"
    store.paths.decide()
    assert told.changes == 2, "it is as it was"
    sequence.delete()
    assert told.changes == 3
    sequence.release_units()
    assert (told.changes, told.closes) == (3, 0)
    store.close()
    watcher.close()
    assert (told.changes, told.closes) == (3, 1)


def test_what_the_cache_has_is_known_also_where_that_is_nothing(folder: Path) -> None:
    with open_dual(folder, 0) as store:
        filled(store, tokens=500)
        empty_cache(folder / "data")
        assert store.paths.routes.measure_resident(units(store)) == 0


def test_one_is_read_ahead_however_small_staging_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dual(folder, staging="1 MiB") as store:
        sequence, reference = filled(store, tokens=1900)
        held = watch_held(store, monkeypatch)
        sequence.prefetch(range(4))
        for layer in range(4):
            assert ahead(sequence) == [layer]
            reference.check_layer(sequence, layer)
        assert max(held) <= 2 * UNIT_NBYTES


def test_sequences_that_prefetch_at_once_share_the_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_dual(folder, staging="4 MiB", capacity="128 MiB") as store:
        sequences = [filled(store, str(number), tokens=500)[0] for number in range(4)]
        held = watch_held(store, monkeypatch)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(80):
                start = threading.Barrier(len(sequences))

                def ask(sequence: Any, start: threading.Barrier = start) -> None:
                    start.wait()
                    sequence.prefetch(range(SHAPE.layers))
                    sequence.prefetch(range(SHAPE.layers), first_token=500)

                threads = [threading.Thread(target=ask, args=(one,)) for one in sequences]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert UNIT_NBYTES < max(held) <= 2 * MIB


def test_prefetched_memory_is_given_back_with_the_sequence(folder: Path) -> None:
    with open_dual(folder) as store:
        sequence, _ = filled(store, tokens=1900)
        sequence.prefetch(range(4))
        assert store.paths.ahead.held_nbytes > 0
        sequence.delete()
        assert store.paths.ahead.held_nbytes == 0
        del sequence
        until = time.monotonic() + PATIENCE_S
        while store.staging.stats()["leased_nbytes"]:  # the device may still write into it
            assert time.monotonic() < until
            store.stats()


@pytest.mark.machine
@engines
@pytest.mark.parametrize("available", [0, PLENTY])
def test_a_demand_read_overtakes_a_long_prefetch(folder: Path, engine: str, available: int) -> None:
    options: dict[str, Any] = {"depth": 1, "segment": "16 KiB", "staging": "64 MiB"}
    with open_dual(folder, available, engine=engine, **options) as store:
        sequence, _ = filled(store)
        small, reference = store.sequence("small", LITTLE), Reference(LITTLE)
        reference.append(small, 64)
        for layer in range(LITTLE.layers):
            small.settle(layer)
        small.read_ahead = False
        store.paths.decide()
        for _ in range(50):
            empty_cache(folder / "data")
            sequence.prefetch(range(SHAPE.layers))
            last = sequence._layers[SHAPE.layers - 1].reader.prefetched.reading.parts[-1].transfer
            reference.check_layer(small, 0)
            overtook = not last.done
            for layer in range(SHAPE.layers):
                sequence.read(layer)
            # Now and then this thread may be the slow one; a read that has to wait loses always.
            if overtook:
                return
        pytest.fail("a read on demand waited for all that was to be read ahead")


@pytest.mark.machine
def test_prefetched_layers_follow_the_path_of_each_half(folder: Path) -> None:
    with open_dual(folder, policy="paper", available=3 * UNIT_NBYTES) as store:
        sequence, reference = filled(store)
        scans(sequence, reference)
        assert paths(store) == list("CCCDDDDD")
        sequence.prefetch([1])
        engines_used = [
            part.engine.name for part in sequence._layers[1].reader.prefetched.reading.parts
        ]
        assert engines_used == ["pagecache", store.engine.name]
        reference.check_layer(sequence, 1)
        assert resident_nbytes(store) == 3 * UNIT_NBYTES
        assert len(units(store)) == UNITS
