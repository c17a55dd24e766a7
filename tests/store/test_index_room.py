"""The index beside the data: full disks, records that it cannot hold, and threads that go on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

import spdk_kv
from spdk_kv.errors import CapacityError
from spdk_kv.index import IndexFull, batches
from store.helpers import check_books, folder_fixture, noise, open_store, reopen
from support import blockdev
from support.waiting import wait_until

folder = folder_fixture

MIB = 1 << 20
BYTE = np.ones(1, np.uint8)


def long_key(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest() * 8


@pytest.fixture
def small_disk(tmp_path):
    with blockdev.ext4(tmp_path, 32 * MIB) as at:
        yield at


def test_an_index_that_fills_the_disk_evicts_and_goes_on(small_disk):
    data = np.ones(4096, np.uint8)
    with open_store(small_disk / "kv", capacity="16 MiB", engine="pagecache") as store:
        for number in range(6000):  # the index of as many as fit would need more than is left
            store.put(long_key(number), data)
        assert len(store) > 1000
        store.flush()
        for key in store.keys()[::2]:
            store.delete(key)
        store.flush()
        store.put("new", data)
        kept = store.keys()
        store.get(kept[0])  # so that close() has an order of use to keep
        check_books(store)
    with reopen(small_disk / "kv", engine="pagecache") as store:
        assert set(store.keys()) == set(kept)
        store.put("newer", data)


def test_without_eviction_a_full_index_refuses_until_something_is_deleted(small_disk):
    with open_store(small_disk / "kv", capacity="4 MiB", eviction="none") as store:
        store.put("kept", noise(100))
        store.flush()
        empty = np.empty(0, np.uint8)  # nothing but a record
        store.put_many({long_key(number): empty for number in range(16_000)})
        with pytest.raises(CapacityError, match="index"):
            store.flush()
        for number in range(0, 16_000, 2):
            store.delete(long_key(number))
        store.delete(long_key(1))
        for number in range(2001, 16_000, 2):
            store.delete(long_key(number))
        store.flush()
    with reopen(small_disk / "kv") as store:
        assert set(store.keys()) == {"kept", *(long_key(n) for n in range(3, 2000, 2))}


def test_eviction_for_the_index_ends_where_it_is_in_vain(folder, monkeypatch):
    with open_store(folder, capacity="16 MiB") as store:
        store.put_many({long_key(number): BYTE for number in range(3000)})
        store.flush()
        index = store.catalog.committer.index
        write = index.write

        def full(rows):
            if any(row.record is not None for row in rows):
                raise IndexFull("no room")
            write(rows)

        monkeypatch.setattr(index, "write", full)
        store.put("a", noise(10))
        with pytest.raises(IndexFull):
            store.flush()
        # Four times as much of the index as a MiB, the least that counts as asked.
        assert 3 * MIB < (3000 - len(store)) * 1400 < 6 * MIB
        monkeypatch.setattr(index, "write", write)
        store.flush()


def test_one_record_that_the_index_cannot_hold_blocks_nobody(folder, monkeypatch):
    monkeypatch.setattr(batches, "_MOST_ROW_NBYTES", 16_000)
    shape = spdk_kv.KVShape(2, 1, 64, torch.float16, 4096, batch=2)
    k = torch.zeros(2, 1, 4000, 64, dtype=torch.float16)
    with open_store(folder) as store:
        sequence = store.sequence("beams", shape)
        for layer in range(2):
            sequence.append(layer, k, k)
        store.flush()
        sequence.reorder([1, 0])  # its record now has an entry per token
        store.put("innocent", noise(100))
        with pytest.raises(CapacityError, match="cannot hold the record of sequence 'beams'"):
            store.flush()
        store.put("later", noise(100))
        store.flush()
        assert sequence.read(0)[0].shape[2] == 4000
        check_books(store)
    with reopen(folder) as store:
        assert store.keys() == ["innocent", "later"]
        assert store.sequences() == []


def test_the_flushing_thread_outlives_any_error_and_counts_it(folder, monkeypatch, caplog):
    with open_store(folder, flush_interval_s=0.01) as store:
        commit = store.catalog.commit
        failures = [RuntimeError("a bug"), MemoryError(), SystemExit(1)]

        def failing(timeout_s=None):
            if failures:
                raise failures.pop()
            commit(timeout_s)

        monkeypatch.setattr(store.catalog, "commit", failing)
        store.put("a", noise(100))
        wait_until(lambda: not store.dirty)
        assert store.stats()["failed_background_flushes"] == 3
    assert "a bug" in caplog.text
    with reopen(folder) as store:
        assert store.keys() == ["a"]


def test_close_succeeds_where_only_the_order_of_use_is_not_kept(folder, monkeypatch, caplog):
    store = open_store(folder)
    store.put("a", noise(100))
    store.put("b", noise(100))
    store.flush()
    store.get("a")

    def full(keys):
        raise IndexFull("no room")

    monkeypatch.setattr(store.catalog.committer.index, "touch_order", full)
    store.close()
    assert "order in which things were used is not kept" in caplog.text
    with reopen(folder) as store:
        assert set(store.keys()) == {"a", "b"}
