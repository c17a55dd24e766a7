"""A sequence leaves memory with its last reference, once nothing of it would be lost."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import pytest

from sequence.helpers import Reference, begun, shape_of
from spdk_kv import Sequence
from spdk_kv.errors import KeyNotFound
from spdk_kv.store import KVStore
from store.helpers import check_books, folder_fixture, open_store, reopen
from support.rounds import rounds

folder = folder_fixture


def tracked(store: KVStore) -> int:
    store.flush()
    return len(store.paths._scans.groups)


def leased(store: KVStore) -> int:
    return store.stats()["staging"]["leased_nbytes"]


def test_what_is_recorded_leaves_memory_and_comes_back(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [300])
        gone = weakref.ref(sequence)
        del sequence
        assert store.sequence("s") is gone(), "it has tokens that no record has"
        store.flush()
        assert gone() is None
        assert tracked(store) == 0
        assert leased(store) == 0
        assert store._sequences._bound == {}
        assert store.sequences() == ["s"]
        sequence = store.sequence("s")
        reference.check(sequence)
        assert store.sequence("s") is sequence
        assert tracked(store) == 1
        reference.append(sequence, 5)
        gone = weakref.ref(sequence)
        del sequence
        reference.truncate(store.sequence("s"), 302)
        assert gone() is not None
        store.flush()
        assert gone() is None
        sequence = store.sequence("s")
        reference.check(sequence)
        reference.reorder(sequence, [1, 0])
        del sequence
        reference.check(store.sequence("s"))
        check_books(store)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))


def test_one_that_somebody_holds_stays_the_same(folder):
    with open_store(folder, capacity="64 MiB") as store:
        sequence, reference = begun(store, "layer", [300])
        store.flush()
        store.flush()
        assert store.sequence("s") is sequence
        reference.append(sequence, 1)
        reference.check(store.sequence("s"))


def test_a_temporary_one_and_a_deleted_one(folder):
    with open_store(folder, capacity="64 MiB") as store:
        gone = weakref.ref(store.sequence("t", shape_of(), temporary=True))
        store.flush()
        assert store.sequence("t") is gone()
        store.sequence("t").delete()
        assert gone() is None
        assert tracked(store) == 0
        with pytest.raises(KeyNotFound):
            store.sequence("t")
        assert leased(store) == 0


def test_nothing_is_lost_between_a_change_and_a_flush(folder: Path) -> None:
    count = rounds(60, 400)
    shape = shape_of(max_tokens=count)
    with open_store(folder, capacity="64 MiB", flush_interval_s=None) as store:
        store.sequence("s", shape)
        reference, over = Reference(shape), threading.Event()

        def flush() -> None:
            while not over.is_set():
                store.flush()

        flusher = threading.Thread(target=flush)
        flusher.start()
        seen = set()
        try:
            for _ in range(count):
                sequence = store.sequence("s")
                seen.add(id(sequence))
                reference.append(sequence, 1)
                del sequence
        finally:
            over.set()
            flusher.join()
        found: Sequence = store.sequence("s")
        reference.check(found)
    with reopen(folder) as store:
        reference.check(store.sequence("s"))
