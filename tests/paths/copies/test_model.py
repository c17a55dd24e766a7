"""Bytes on two media, whatever happens in whatever order: promotions, truncations, new owners."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from paths.copies.helpers import (
    CopyPlace,
    copy_path,
    deleted,
    on_loop_device,
    on_memory,
    place_fixture,
    waited,
)
from paths.helpers import (
    MIB,
    PLENTY,
    empty_cache,
    scans,
    set_available,
    units,
)
from paths.machine import LITTLE, TwoSequences
from sequence.helpers import Reference
from spdk_kv.units import KIB
from support.rounds import examples

place = place_fixture


class ApartMachine(TwoSequences):
    """As of one medium (test_paths.py): sequences that come and go in little room, so that extents
    have one owner after another, on a drive and in a copy of it."""

    granularity: Any
    residency: str
    drive: Any

    @initialize()
    def begin(self) -> None:
        self.made = self.drive()
        self.place = self.made.__enter__()
        self.open()
        self.sequences = [self.sequence(name) for name in "ab"]
        self.references = [Reference(LITTLE, seed) for seed in (0, 10**6)]

    def open(self) -> None:
        options: dict[str, Any] = {"policy": self.residency}
        if not self.place.lasting:
            options["capacity"] = "5 MiB"
        self.store = self.place.open(**options)

    def sequence(self, name: str) -> Any:
        return self.store.sequence(name, LITTLE, granularity=self.granularity)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            for which in (0, 1):
                self.references[which].check(self.sequences[which])
            # Else a wrong read of the copy would hide behind a right one of the drive.
            told = self.store.stats()["residency"]
            assert (told["taken_over_nbytes"], told["trouble"]) == (0, "")
        finally:
            self.store.close()
            self.made.__exit__(None, None, None)

    which, layer = TwoSequences.which, TwoSequences.layer

    @rule(which=which)
    def append_much(self, which: int) -> None:
        for layer in range(LITTLE.layers):
            self.append(which, layer, 500)
            self.sequences[which].settle(layer)

    @rule(which=which, count=st.integers(1, 3))
    def scan(self, which: int, count: int) -> None:
        scans(self.sequences[which], self.references[which], count)

    @rule(which=which, rows=st.sampled_from([[1, 0], [0, 0], [1, 1]]))
    def reorder(self, which: int, rows: list[int]) -> None:
        self.references[which].reorder(self.sequences[which], rows)

    @rule()
    def wait(self) -> None:
        waited(self.store)

    @rule()
    def lose_pages(self) -> None:
        empty_cache(copy_path(self.store))

    @rule(which=which)
    def replace(self, which: int) -> None:
        deleted(self.store, self.sequences[which])
        self.sequences[which] = self.sequence("ab"[which])
        self.references[which] = Reference(LITTLE, self.references[which].seed + 10**4)

    @precondition(lambda self: hasattr(self, "place") and self.place.lasting)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()
        self.sequences = [self.sequence(name) for name in "ab"]


def run_machine(drive: Any, residency: str, granularity: str, count: int = 25) -> None:
    fields = {"drive": staticmethod(drive), "residency": residency, "granularity": granularity}
    run_state_machine_as_test(
        type(f"Apart_{residency}_{granularity}", (ApartMachine,), fields),
        settings=settings(
            max_examples=examples(count),
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("residency", ["adaptive", "pagecache"])
def test_bytes_are_those_appended_whatever_is_copied(residency: str, granularity: str) -> None:
    run_machine(on_memory, residency, granularity)


def test_bytes_are_those_appended_and_last() -> None:
    run_machine(on_loop_device, "adaptive", "layer", 10)


def churn(place: CopyPlace, rounds: int = 150) -> None:
    """Threads that append, truncate, read, and give extents to one another, while units move."""
    failures: list[BaseException] = []
    over = threading.Event()
    options = {} if place.lasting else {"capacity": "6 MiB"}
    with place.open(**options) as store:

        def use(number: int) -> None:
            chance = random.Random(number)
            name, life = f"s{number}", 0
            sequence, reference = store.sequence(name, LITTLE), Reference(LITTLE, number * 10**6)
            for _ in range(rounds):
                layer = chance.randrange(LITTLE.layers)
                match chance.randrange(8):
                    case 0 | 1:
                        room = LITTLE.max_tokens - sequence.tokens(layer)
                        count = min(room, chance.choice([1, 64, 333, 900]))
                        reference.append(sequence, count, layer)
                        sequence.settle(layer)
                    case 2:
                        keep = chance.randrange(sequence.tokens(layer) + 1)
                        reference.truncate(sequence, keep, layer)
                    case 3:
                        sequence.prefetch([chance.randrange(LITTLE.layers)])
                    case 4 if chance.random() < 0.3:
                        deleted(store, sequence)
                        life += 1
                        sequence = store.sequence(name, LITTLE)
                        reference = Reference(LITTLE, number * 10**6 + life * 10**4)
                    case _:
                        scans(sequence, reference)
            scans(sequence, reference)

        def move() -> None:
            chance = random.Random(7)
            while not over.is_set():
                set_available(store, chance.choice([0, 200 * KIB, MIB, PLENTY, PLENTY]))
                store.paths.decide()
                over.wait(0.02 * chance.random())
                if chance.random() < 0.1:
                    empty_cache(copy_path(store))

        def guarded(work: Any, *arguments: Any) -> None:
            try:
                work(*arguments)
            except BaseException as failure:
                failures.append(failure)

        users = [threading.Thread(target=guarded, args=(use, number)) for number in range(2)]
        mover = threading.Thread(target=guarded, args=(move,))
        for thread in (*users, mover):
            thread.start()
        for thread in users:
            thread.join()
        over.set()
        mover.join()
        if failures:
            raise failures[0]
        told = store.stats()["residency"]
        assert (told["taken_over_nbytes"], told["trouble"]) == (0, "")
        assert min(told["written_nbytes"], told["cached_read_nbytes"], told["demotions"]) > 0
        waited(store)
        assert not any(unit.fill for unit in units(store))


def test_threads_that_share_extents_one_after_another(place: CopyPlace) -> None:
    churn(place)
