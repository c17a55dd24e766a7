"""The books of a store are used by one thread at a time."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from sequence.helpers import begun
from spdk_kv.errors import DeviceError, DeviceTimeout
from spdk_kv.index import Index
from store.helpers import folder_fixture, open_store, payload
from support.guard import Guard
from support.waiting import PATIENCE_S, in_use

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


def test_records_are_used_with_the_lock_held(folder, monkeypatch):
    # Which reads the table itself, and notices changes by their count.
    monkeypatch.setattr(Index, "save_summary", lambda *_: None)
    with open_store(folder, capacity="4 MiB") as store:
        records = store.catalog.records
        guard = Guard(records.lock)
        guard.watch(records.extents)
        guard.watch(records.residents)
        changes = ("__setitem__", "__delitem__", "move_to_end", "pop")
        records.blobs = guard.stand_in(records.blobs, "put", "replace", "pop", "use")
        records.sequences = guard.watch(records.sequences, *changes)
        for number in range(8):
            store.put(f"{number % 6}", payload(f"{number % 6}", number, 1 << 20))
            store.get(f"{number % 6}")
        store.delete("1")
        with monkeypatch.context() as patched:
            patched.setattr(store.catalog.committer.index, "write", refuses)
            with pytest.raises(DeviceError, match="as if"):
                store.flush()  # its changes are given back
        sequence, _ = begun(store, "layer", [100])
        store.flush()
        sequence.delete()
        store.stats()
        assert guard.missed == []


def refuses(rows):
    raise DeviceError("as if its drive had failed")


def test_what_the_drive_may_touch_is_noted_with_the_lock_held(folder):
    with open_store(folder) as store:
        quarantine, background = store.catalog.quarantine, store._background
        waiting, writing = Guard(quarantine._lock), Guard(background._lock)
        quarantine._waiting = waiting.watch(quarantine._waiting, "append")
        background._writes = writing.watch(background._writes)
        transfer = SimpleNamespace(in_flight=True)  # on a drive that takes its time
        over: list[str] = []
        quarantine.release([transfer], lambda: over.append("let go"))
        quarantine.settle()
        assert over == []
        assert not quarantine.is_empty
        transfer.in_flight = False
        quarantine.settle()
        assert over == ["let go"]
        assert quarantine.is_empty
        store.put_async("a", payload("a", 1)).result(PATIENCE_S)
        assert waiting.missed == writing.missed == []


def test_a_close_waits_for_what_is_being_published(folder):
    with open_store(folder) as store:
        records = store.catalog.records
        with in_use(records.lock):
            closing = threading.Thread(target=records.close)
            closing.start()
            closing.join(0.05)
            assert not records._closed
        closing.join()
        assert records._closed


def test_the_data_file_grows_for_one_at_a_time(folder):
    with open_store(folder, engine="threads") as store:
        store.put("a", payload("a", 1, 5000))
        growth = "the growth of the data file"
        with in_use(store.catalog.room._growth_lock), pytest.raises(DeviceTimeout, match=growth):
            store.put("b", payload("b", 1, 1 << 20), timeout_s=0.02)
        store.put("b", payload("b", 2, 1 << 20), timeout_s=PATIENCE_S)
