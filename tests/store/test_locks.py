"""The books of a store are used by one thread at a time."""

from __future__ import annotations

import pytest

from sequence.helpers import begun
from spdk_kv.errors import DeviceTimeout
from store.helpers import folder_fixture, open_store, payload
from support.guard import Guard
from support.waiting import in_use

folder = folder_fixture


def test_names_are_bound_and_kept_with_the_lock_held(folder):
    with open_store(folder, capacity="64 MiB") as store:
        names = store._sequences
        guard = Guard(names._lock)
        names._bound, names._kept = guard.watch(names._bound), guard.watch(names._kept)
        sequence, reference = begun(store, "layer", [100])
        store.flush()
        assert store.sequences() == ["s"]
        reference.truncate(sequence, 50)
        store.flush()
        del sequence
        reference.check(store.sequence("s"))
        store.sequence("s").delete()
        assert guard.missed == []


def test_records_are_used_with_the_lock_held(folder):
    with open_store(folder, capacity="4 MiB") as store:
        records = store.catalog.records
        guard = Guard(records.lock)
        guard.watch(records.extents)
        guard.watch(records.residents)
        for number in range(8):
            store.put(f"{number % 6}", payload(f"{number % 6}", number, 1 << 20))
            store.get(f"{number % 6}")
        store.delete("1")
        store.flush()
        begun(store, "layer", [100])
        store.stats()
        assert guard.missed == []


def test_the_data_file_grows_for_one_at_a_time(folder):
    with open_store(folder, engine="threads") as store:
        store.put("a", payload("a", 1, 5000))
        growth = "the growth of the data file"
        with in_use(store.catalog.room._growth_lock), pytest.raises(DeviceTimeout, match=growth):
            store.put("b", payload("b", 1, 1 << 20), timeout_s=0.02)
        store.put("b", payload("b", 2, 1 << 20), timeout_s=30)
