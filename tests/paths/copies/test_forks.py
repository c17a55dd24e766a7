"""Forks and growth where the page cache is a medium of its own: no copy serves another's bytes."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from paths.copies.helpers import copied, deleted, fully, on_memory, waited
from sequence.helpers import Reference, shape_of
from sequence.test_forks import ForkMachine
from store.helpers import bytes_of, check_books
from support.rounds import examples


class CopyForkMachine(ForkMachine):
    """A ForkMachine on memory, with copies. What it stores does not outlive it."""

    def open(self) -> None:
        self.stack = contextlib.ExitStack()
        place = self.stack.enter_context(on_memory())
        self.store = place.open(policy="pagecache")

    def teardown(self) -> None:
        self.held.clear()
        check_books(self.store)
        # Checksums find what is wrong in a copy, and the drive delivers it: there was none.
        assert self.store.paths.stats()["taken_over_nbytes"] == 0
        self.store.close()
        self.stack.close()

    @rule()
    def reopen(self) -> None:
        self.read_all()

    @rule()
    def crash(self) -> None:
        self.read_all()

    def read_all(self) -> None:
        for name, parts in self.model.items():
            self.check(self.held.get(name) or self.store.sequence(name), parts)


def test_forks_are_what_was_appended_whatever_is_copied() -> None:
    options: Any = settings(
        max_examples=examples(8),
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(CopyForkMachine, settings=options)


def test_a_fork_that_goes_leaves_its_parents_copies_alone() -> None:
    shape = shape_of(max_tokens=None)
    with on_memory() as place, place.open(policy="pagecache") as store:
        sequence = store.sequence("s", shape)
        reference = Reference(shape)
        reference.append(sequence, 550)
        fully(store, sequence, reference)
        before = copied(store)
        assert sum(before) > 0
        forks = [sequence.fork(tokens=400) for _ in range(2)]
        for forked in forks:
            for _ in range(4):
                forked.read(0)
                forked.read(1)
        deleted(store, forks[0])
        waited(store)
        reference.check(sequence)
        assert copied(store)[:4] == before
        sequence.delete()
        waited(store)
        store.flush()
        for layer, (k, v) in enumerate(reference.layers):
            found = forks[1].read(layer)
            assert bytes_of(found[0]) == bytes_of(k[:, :, :400])
            assert bytes_of(found[1]) == bytes_of(v[:, :, :400])
        assert store.paths.stats()["taken_over_nbytes"] == 0
