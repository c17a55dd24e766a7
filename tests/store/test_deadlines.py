"""Deadlines of puts and flushes, while a commit takes long: they end the wait and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import spdk_kv
from spdk_kv.errors import DeviceTimeout
from store.helpers import check_books, folder_fixture, open_store, payload, reopen, version_of
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture

MIB = 1 << 20


@contextmanager
def held_commits(store: spdk_kv.KVStore) -> Iterator[threading.Event]:
    """While it lasts no commit of the index ends. Yields what is set once one is under way."""
    index = store.catalog.committer.index
    under_way, may_end, write = threading.Event(), threading.Event(), index.write

    def held(rows):
        under_way.set()
        assert may_end.wait(PATIENCE_S)
        write(rows)

    index.write = held
    try:
        yield under_way
    finally:
        may_end.set()
        index.write = write


def full_store(folder) -> spdk_kv.KVStore:
    store = open_store(folder, capacity="4 MiB", engine="pagecache")
    for key in "abcd":
        store.put(key, payload(key, 1, MIB))
    store.flush()
    return store


def test_calls_on_a_full_store_end_by_their_deadlines_and_the_commit_goes_on(folder):
    store = full_store(folder)
    with held_commits(store) as under_way:
        with pytest.raises(DeviceTimeout, match=r"commit .*not over after 0\.05 s"):
            store.put("e", payload("e", 1, MIB), timeout_s=0.05)
        assert under_way.wait(PATIENCE_S)
        with pytest.raises(DeviceTimeout):
            store.put_async("e", payload("e", 1, MIB), timeout_s=0.05)
        with pytest.raises(DeviceTimeout):
            store.put_many({"e": payload("e", 1, MIB)}, timeout_s=0.05)
        for _ in range(3):  # all of them wait for the one that has not begun
            with pytest.raises(DeviceTimeout):
                store.flush(timeout_s=0.05)
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("spdk_kv-commit") <= 2
        with pytest.raises(DeviceTimeout):
            store.flush_async(timeout_s=0.05).result(PATIENCE_S)
        # What needs no commit does not wait.
        assert version_of("b", store.get("b")) == 1
        assert store.stats()["blobs"] == 3
        assert store.delete("b")
    store.put("e", payload("e", 2, MIB), timeout_s=PATIENCE_S)
    store.flush(timeout_s=PATIENCE_S)
    check_books(store)
    store.close()
    with reopen(folder) as store:
        assert store.keys() == ["c", "d", "e"]
        assert version_of("e", store.get("e")) == 2


def test_a_wait_for_another_call_s_commit_ends_by_its_own_deadline(folder):
    store = full_store(folder)
    with held_commits(store) as under_way:
        other = threading.Thread(target=store.put, args=("e", payload("e", 1, MIB)))
        other.start()
        assert under_way.wait(PATIENCE_S)
        with pytest.raises(DeviceTimeout, match="a commit"):
            store.put("f", payload("f", 1, MIB), timeout_s=0.05)
    other.join(PATIENCE_S)
    assert version_of("e", store.get("e")) == 1
    assert "f" not in store
    store.close()


def test_a_commit_has_the_time_of_whoever_waits_longest_for_it(folder, monkeypatch):
    store = full_store(folder)
    given = []
    flush = store.catalog.committer.data.flush

    def noted(timeout_s):
        given.append(timeout_s)
        flush(timeout_s)

    monkeypatch.setattr(store.catalog.committer.data, "flush", noted)
    store.put("a", payload("a", 2, MIB // 2))
    with held_commits(store) as under_way:
        with pytest.raises(DeviceTimeout):
            store.flush(timeout_s=0.05)
        assert under_way.wait(PATIENCE_S)
        store.put("b", payload("b", 2, MIB // 2))
        with pytest.raises(DeviceTimeout):
            store.flush(timeout_s=0.05)
        longer = threading.Thread(target=store.flush, args=(PATIENCE_S,))
        longer.start()
        wait_until(lambda: store.catalog.committer._next_timeout_s > 1)
    longer.join(PATIENCE_S)
    assert given[0] < 1 < given[1] <= PATIENCE_S
    store.close()


def test_close_waits_for_a_commit_that_nobody_waits_for_any_more(folder):
    store = full_store(folder)
    store.delete("a")
    with held_commits(store) as under_way:
        with pytest.raises(DeviceTimeout):
            store.flush(timeout_s=0.05)
        assert under_way.wait(PATIENCE_S)
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
    closing.join(PATIENCE_S)
    with reopen(folder) as store:
        assert store.keys() == ["b", "c", "d"]


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_deadline_is_a_positive_number(folder, timeout_s):
    with open_store(folder) as store:
        calls = (store.put, store.put_async)
        for call in calls:
            with pytest.raises(ValueError, match="positive"):
                call("a", payload("a", 1, 100), timeout_s=timeout_s)
        with pytest.raises(ValueError, match="positive"):
            store.flush(timeout_s=timeout_s)
