"""A write budget: what is over it is refused or declined, and a restart gives no new one."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

import spdk_kv
from spdk_kv.integrations.pages import get_pages, put_pages
from store.helpers import folder_fixture, open_store

folder = folder_fixture

KIB = 1 << 10
BLOB = np.zeros(600 * KIB, np.uint8)
BUDGET = "8 MiB/day"  # 1 MiB at once, and 85 bytes come back in a second


def left(store: spdk_kv.KVStore) -> int:
    return store.stats()["write_budget"]["left_nbytes"]


def spend(store: spdk_kv.KVStore) -> None:
    """Two puts of more than the budget gives at once; only what is asked after that is refused."""
    store.put("a", BLOB)
    store.put("b", BLOB)
    assert left(store) < 0


def test_a_put_over_the_budget_is_refused_and_changes_nothing(folder):
    with open_store(folder, write_budget=BUDGET) as store:
        spend(store)
        for put in (store.put, store.put_async):
            with pytest.raises(spdk_kv.WriteBudgetSpent, match=r"8\.0 MiB/day is spent"):
                put("a", BLOB + 1)
        assert "c" not in store
        assert not store.get("a", as_numpy=True).any()
        assert store.stats()["write_budget"]["declined"] == 2


def test_a_restart_gives_no_new_budget(folder):
    with open_store(folder, write_budget=BUDGET) as store:
        spend(store)
        before = left(store)
    with open_store(folder, write_budget=BUDGET) as store:
        # Closing and opening write as well, a few blocks.
        assert before - 64 * KIB < left(store) < 0
        with pytest.raises(spdk_kv.WriteBudgetSpent):
            store.put("c", BLOB)
    # Who asks for none has none, and a larger one is not given at once.
    with open_store(folder) as store:
        store.put("c", BLOB)
        assert store.stats()["write_budget"] is None
    with open_store(folder, write_budget="80 GiB/day") as store:
        assert left(store) < 1 << 30


def test_a_flush_keeps_what_is_left(folder):
    with open_store(folder, write_budget=BUDGET) as store:
        spend(store)
        store.flush()
        kept = store._parts.index.get_meta("write_budget_left")
    assert kept is not None
    assert float(kept.strip("[]").split(",")[0]) < 0


def test_of_two_flushes_at_once_the_later_one_s_rest_is_kept(folder, monkeypatch):
    with open_store(folder, write_budget=BUDGET) as store:
        index = store._parts.index
        store.put("a", BLOB)
        set_meta = index.set_meta
        other = threading.Thread(target=store.writes.keep)

        def overtaken(name: str, value: str) -> None:
            if threading.current_thread() is not other:
                store.put("b", BLOB)
                other.start()
                other.join(0.5)  # over by then, or waiting for this one
            set_meta(name, value)

        monkeypatch.setattr(index, "set_meta", overtaken)
        store.writes.keep()
        other.join()
        kept = json.loads(index.get_meta("write_budget_left"))[0]
        assert kept < 0
        assert kept <= left(store)


def test_sequences_count_and_are_never_refused(folder):
    shape = spdk_kv.KVShape(1, 2, 64, torch.float32, 4096)
    with open_store(folder, write_budget=BUDGET) as store:
        k = torch.randn(1, 2, 4096, 64)
        sequence = store.sequence("s", shape)
        sequence.append(0, k, k)
        sequence.settle(0)
        assert left(store) < 0
        assert torch.equal(sequence.read(0)[0], k)
        with pytest.raises(spdk_kv.WriteBudgetSpent):
            store.put("a", BLOB)


def test_hosts_pages_are_declined_until_they_are_asked_for_again(folder):
    page, other = ("p", bytes(300 * KIB)), ("q", bytes(300 * KIB))
    with open_store(folder, write_budget=BUDGET) as store:
        store.put("a", BLOB)  # less than half is left
        assert put_pages(store, [page, other]) == [False, False]
        assert store.keys() == ["a"]
        assert put_pages(store, [page]) == [True]
        place = bytearray(300 * KIB)
        assert get_pages(store, [("p", place)]) == [True]
        assert place == page[1]
        assert store.worth_writing({"new": 1, "q": 300 * KIB}) == [False, True]


def test_what_one_call_admits_counts_for_the_rest_of_it(folder):
    with open_store(folder, write_budget=BUDGET) as store:
        sizes = {"a": 400 * KIB, "b": 400 * KIB, "c": 1, "d": 1}
        assert store.worth_writing(sizes) == [True, True, False, False]
        assert store.worth_writing({"c": 1}) == [True]


def test_without_a_budget_everything_is_worth_writing(folder):
    with open_store(folder) as store:
        assert store.worth_writing({"a": 1 << 60}) == [True]


def test_a_budget_is_checked_when_the_store_is_opened(folder):
    with pytest.raises(ValueError, match="write budget"):
        open_store(folder, write_budget="much")
    open_store(folder).close()
    with pytest.raises(ValueError, match="write_budget"):
        spdk_kv.open(folder, read_only=True, write_budget=BUDGET)
    with spdk_kv.open(folder, read_only=True) as reader, pytest.raises(spdk_kv.ReadOnlyStore):
        reader.worth_writing({"a": 1})
