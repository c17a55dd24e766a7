"""What all sequences share of the two paths is used by one thread at a time."""

from __future__ import annotations

from pathlib import Path

from paths.copies.helpers import fully, on_memory
from paths.helpers import filled, open_dual, scans, set_available
from sequence.helpers import begun
from spdk_kv.deadline import NEVER
from store.helpers import folder_fixture, open_store
from support.guard import Guard

folder = folder_fixture


def test_scans_and_counters_are_used_with_the_lock_held(folder: Path) -> None:
    with open_dual(folder) as store:
        guard = Guard(store.paths._lock)
        guard.watch(store.paths._scans)
        guard.watch(store.paths._accounting)
        sequence, reference = filled(store, tokens=300)
        scans(sequence, reference, 2)
        sequence.prefetch(range(4))
        reference.truncate(sequence, 100)
        set_available(store, 0)
        scans(sequence, reference, 2)
        assert store.stats()["residency"]["direct_read_nbytes"] > 0
        store.why()
        sequence.delete()
        assert guard.missed == []


def test_what_was_copied_is_noted_with_the_lock_held() -> None:
    with on_memory() as place, place.open() as store:
        copy = store.paths.routes.copy
        assert copy is not None
        accept, held = copy._accept, []

        def noted(*arguments) -> None:
            held.append(copy.lock._is_owned())
            accept(*arguments)

        copy._accept = noted
        sequence, reference = filled(store, tokens=300)
        fully(store, sequence, reference)
        assert held
        assert all(held)


def test_who_writes_is_noted_with_the_lock_held() -> None:
    with open_store("ram://", capacity="64 MiB") as store:
        backlog = store.paths.backlog
        guard = Guard(backlog._lock)
        backlog._writing = guard.watch(backlog._writing)
        begun(store, "layer", [300, 100])
        backlog._limit_nbytes = -1
        backlog.make_room(NEVER)
        backlog.sweep()
        assert guard.missed == []


def test_who_reads_ahead_is_noted_with_the_lock_held() -> None:
    with open_store("ram://", capacity="64 MiB") as store:
        ahead = store.paths.ahead
        guard = Guard(ahead._order_lock)
        ahead._holders = guard.watch(ahead._holders)
        sequence, reference = begun(store, "layer", [300])
        sequence.prefetch([0, 1])
        reference.check(sequence)
        ahead.limit_nbytes = 1
        sequence.prefetch([0, 1])  # has no room for the second, and asks who is idle
        assert guard.missed == []
