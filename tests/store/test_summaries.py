"""A store that opens with the summary of its index holds what one holds that reads each row."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from spdk_kv.errors import CapacityError, KeyNotFound
from spdk_kv.index import Index, IndexFull, database, records, summary
from spdk_kv.index.summary import summary_path
from spdk_kv.store import KVStore, parts
from store.helpers import (
    check_books,
    extent_of,
    folder_fixture,
    open_store,
    payload,
    reopen,
    version_of,
)

folder = folder_fixture


@pytest.fixture(autouse=True)
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each open that reads the rows."""
    found: list[str] = []

    class Noting(records.RowReader):
        def add(self, rows) -> None:
            found.append("rows")
            super().add(rows)

    monkeypatch.setattr(records, "RowReader", Noting)
    return found


def state_of(store: KVStore) -> list[tuple[str, object]]:
    return store.catalog.records.blobs.items()


def filled(folder: Path, count: int = 20) -> list[str]:
    keys = [f"k{number}" for number in range(count)]
    with open_store(folder) as store:
        for number, key in enumerate(keys):
            store.put(key, payload(key, 1, 16 + number * 500))
        store.put("empty", np.zeros((0, 3)))
    return keys


def test_a_closed_store_opens_without_its_rows_and_is_the_same(folder, rows_read) -> None:
    keys = filled(folder)
    rows_read.clear()
    for _ in range(3):
        with reopen(folder) as store:
            assert not rows_read
            before = state_of(store)
            store.get_many([keys[5], keys[2]])
            assert store.keys()[-2:] == [keys[5], keys[2]]
            used = state_of(store)
            check_books(store)
        Path(summary_path(str(folder / "index.sqlite"))).rename(folder / "away")
        with reopen(folder) as store:
            assert rows_read
            rows_read.clear()
            assert state_of(store) == used
            assert sorted(before) == sorted(used)
            for key in keys:
                assert version_of(key, store.get(key)) == 1
            check_books(store)


def test_what_changed_is_there_and_what_was_deleted_is_not(folder, rows_read) -> None:
    keys = filled(folder)
    rows_read.clear()
    with reopen(folder) as store:
        store.put(keys[0], payload(keys[0], 2))
        store.delete(keys[1])
        store.compact()
        kept = state_of(store)
    with reopen(folder) as store:
        assert not rows_read
        assert state_of(store) == kept
        assert version_of(keys[0], store.get(keys[0])) == 2
        with pytest.raises(KeyNotFound):
            store.get(keys[1])
        check_books(store)


@pytest.mark.parametrize("kept", [True, False])
def test_a_store_that_was_not_closed_has_what_was_committed(
    folder, rows_read, monkeypatch, kept
) -> None:
    if not kept:
        monkeypatch.setattr(database, "append_changes", lambda *_: None)
    keys = filled(folder)
    store = reopen(folder)
    store.put(keys[0], payload(keys[0], 2))
    store.delete(keys[2])
    store.flush()
    store.delete(keys[1])
    # As a kill leaves it: what is committed, and the summary of before.
    store._parts.close()
    for _ in range(2):
        rows_read.clear()
        again = reopen(folder)
        assert bool(rows_read) != kept
        assert version_of(keys[0], again.get(keys[0])) == 2
        assert keys[1] in again
        assert keys[2] not in again
        check_books(again)
        again._parts.close()


def test_a_store_that_is_always_killed_reads_its_rows_once(folder, rows_read, monkeypatch) -> None:
    monkeypatch.setattr(parts, "_MANY_BLOBS", 1)
    keys = filled(folder)
    (folder / "index.sqlite-blobs").unlink()
    for version in range(2, 5):
        store = reopen(folder)
        assert bool(rows_read) == (version == 2)
        rows_read.clear()
        assert version_of(keys[0], store.get(keys[0])) == (1 if version == 2 else version - 1)
        store.put(keys[0], payload(keys[0], version))
        store.flush()
        store._parts.close()


def test_a_summary_that_an_open_cannot_write_is_logged(folder, monkeypatch, caplog) -> None:
    monkeypatch.setattr(parts, "_MANY_BLOBS", 1)
    keys = filled(folder)
    (folder / "index.sqlite-blobs").unlink()

    def fails(*_: object) -> None:
        raise OSError(5, "as if the disk had failed")

    with monkeypatch.context() as patched:
        patched.setattr(summary, "_write_all", fails)
        store = reopen(folder)
    assert "as if the disk" in caplog.text
    assert version_of(keys[0], store.get(keys[0])) == 1
    store.close()


def test_one_that_was_only_read_and_not_closed_has_its_summary_still(folder, rows_read) -> None:
    keys = filled(folder)
    store = reopen(folder)
    store.get(keys[3])
    store._parts.close()
    rows_read.clear()
    with reopen(folder) as again:
        assert not rows_read
        check_books(again)


def test_the_order_of_use_decides_who_goes_after_a_reopening(folder, rows_read) -> None:
    with open_store(folder, capacity="1 MiB") as store:
        for key in "abcd":
            store.put(key, payload(key, 1, 250_000))
    with reopen(folder) as store:
        store.get("a")
        store.get("b")
    rows_read.clear()
    with reopen(folder) as store:
        assert not rows_read
        store.put("e", payload("e", 1, 250_000))
        assert "c" not in store
        assert "a" in store


@pytest.mark.parametrize("end", ["close", "kill"])
def test_what_was_used_again_outlives_what_was_put_once(folder, end) -> None:
    """In a store of a few blobs, which is closed, and then opened and killed."""
    with open_store(folder, capacity="1 MiB") as store:
        for key in "abcd":
            store.put(key, payload(key, 1, 250_000))
            if key == "a":
                store.get(key)
    if end == "kill":
        store = reopen(folder)
        store.put("b", payload("b", 2, 100_000))
        store.flush()
        store._parts.close()
    with reopen(folder) as store:
        store.put("e", payload("e", 1, 250_000))
        assert "a" in store
        assert ("b" in store, "c" in store) == (end == "kill", end == "close")


def test_what_could_not_be_committed_is_in_no_summary(folder, rows_read, monkeypatch) -> None:
    keys = filled(folder)
    store = reopen(folder)
    store.put(keys[0], payload(keys[0], 2))

    def full(rows: object) -> None:
        raise IndexFull("as if its filesystem were full")

    monkeypatch.setattr(store.catalog.committer.index, "write", full)
    monkeypatch.setattr(store.catalog.room, "_eviction", "none")
    with pytest.raises(CapacityError):
        store.close()
    with reopen(folder) as store:
        assert version_of(keys[0], store.get(keys[0])) == 1
        assert sorted(store.keys()) == sorted([*keys, "empty"])
        check_books(store)


def test_a_record_that_the_index_refuses_is_in_no_summary(folder, monkeypatch) -> None:
    filled(folder)
    monkeypatch.setattr("spdk_kv.index.batches._MOST_ROW_NBYTES", 1000)
    store = reopen(folder)
    store.put("x" * 2000, payload("x", 1))
    with pytest.raises(CapacityError, match="will be gone"):
        store.close()
    with reopen(folder) as store:
        assert "x" * 2000 not in store
        check_books(store)


@pytest.mark.parametrize("kept", [True, False])
def test_a_damaged_blob_that_is_forgotten_as_the_store_closes_is_there_at_the_next_open(
    folder, rows_read, monkeypatch, kept
) -> None:
    """Its row is still there, so its extent must not be free."""
    if not kept:
        monkeypatch.setattr(database, "append_changes", lambda *_: None)
    keys = filled(folder)
    store = reopen(folder)
    store.put("new", payload("new", 1))
    records, committer = store.catalog.records, store.catalog.committer
    record, save = records.blobs[keys[9]], committer._save_summary

    def forgetting(index: Index) -> None:
        assert not records.dirty  # the last commit is over
        records.drop_damaged(keys[9], record)
        save(index)

    monkeypatch.setattr(committer, "_save_summary", forgetting)
    store.close()
    assert keys[9] not in records.blobs
    rows_read.clear()
    with reopen(folder) as store:
        assert bool(rows_read) != kept
        assert extent_of(store, keys[9])[0] == record.offset
        check_books(store)


def test_a_summary_that_cannot_be_written_is_logged(folder, monkeypatch, caplog) -> None:
    keys = filled(folder)

    def fails(*_: object) -> None:
        raise OSError(5, "as if the disk had failed")

    monkeypatch.setattr(summary, "_write_all", fails)
    with caplog.at_level(logging.WARNING), reopen(folder) as store:
        store.put("new", payload("new", 1))
    assert "as if the disk" in caplog.text
    with reopen(folder) as store:
        assert set(store.keys()) == {*keys, "empty", "new"}


def test_extents_that_overlap_in_a_summary_are_left_out(folder, rows_read, caplog) -> None:
    keys = filled(folder)
    with reopen(folder) as store:
        records = store.catalog.records
        twin = records.blobs[keys[4]]
        store.put("twin", payload("twin", 1))
        store.flush()
        with records.lock:
            records.publish({"twin": twin})
    rows_read.clear()
    with reopen(folder) as store:
        assert not rows_read
        assert "twin" not in store
        assert keys[4] not in store
        assert store.stats()["corruptions"] == 2
        check_books(store)
    with reopen(folder) as store:
        assert store.stats()["corruptions"] == 0
