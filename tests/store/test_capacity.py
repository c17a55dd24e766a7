"""Full stores: eviction, refusals, fragments, full disks, and what comes back when."""

from __future__ import annotations

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from spdk_kv.errors import CapacityError, KeyNotFound
from spdk_kv.store import KVStore
from store.helpers import (
    DATA_START,
    FILE_ENGINES,
    check_books,
    extent_of,
    folder_fixture,
    noise,
    open_store,
    payload,
    reopen,
    version_of,
)
from support import blockdev
from support.waiting import PATIENCE_S

folder = folder_fixture

MIB = 1 << 20


@pytest.fixture(params=["ram", "file"])
def where(request, folder) -> Path | str:
    return "ram://" if request.param == "ram" else folder


def put(store: KVStore, *keys: str, nbytes: int = MIB, version: int = 1) -> None:
    for key in keys:
        store.put(key, payload(key, version, nbytes))


# -- eviction -------------------------------------------------------------------------------------


def test_the_blobs_used_longest_ago_make_room(where):
    with open_store(where, capacity="8 MiB") as store:
        put(store, *"abcdefgh")
        assert store.stats()["free_nbytes"] == 0
        store.get("a")  # used: now the last to go
        store.put("c", payload("c", 2, MIB // 2))  # replaced: used too; and "b" made its room
        assert store.keys() == [*"defgh", "a", "c"]
        put(store, "i", "j")
        assert store.keys() == [*"efgh", "a", "c", "i", "j"]
        for key in store.keys(""):
            assert version_of(key, store.get(key)) == (2 if key == "c" else 1)
        for key in "bd":
            with pytest.raises(KeyNotFound):
                store.get(key)
        assert store.stats()["evictions"] == 2
        check_books(store)


def test_recency_survives_a_reopening(folder):
    with open_store(folder, capacity="8 MiB") as store:
        put(store, *"abcdefgh")
        store.get("a")
        store.put("b", payload("b", 2, MIB))
        order = store.keys()
    with reopen(folder) as store:
        assert store.keys() == order
        put(store, "i")
        assert order[0] not in store
        assert "a" in store


def test_recency_of_two_puts_of_a_key_before_one_commit(folder):
    with open_store(folder) as store:
        put(store, "a", "b", "a", nbytes=100)
    with reopen(folder) as store:
        assert store.keys() == ["b", "a"]


def test_none_refuses_and_says_what_is_asked_and_what_is_free(where):
    with open_store(where, capacity="4 MiB", eviction="none") as store:
        put(store, *"abc")
        with pytest.raises(CapacityError) as full:
            put(store, "d", nbytes=3 * MIB // 2)
        numbers = set(map(int, re.findall(r"\d+(?= bytes)", str(full.value))))
        assert {3 * MIB // 2, MIB} <= numbers
        assert store.keys() == [*"abc"]
        # The old value of a key that cannot be replaced stays.
        with pytest.raises(CapacityError):
            store.put("a", payload("a", 2, 2 * MIB))
        assert [version_of(key, store.get(key)) for key in "abc"] == [1, 1, 1]
        put(store, "d")
        store.delete("b")
        put(store, "e")  # room that has yet to be committed is room
        check_books(store)


@pytest.mark.parametrize("eviction", ["none", "lru"])
def test_room_that_a_commit_under_way_will_free_is_waited_for(folder, eviction):
    with open_store(folder, capacity="4 MiB", eviction=eviction) as store:
        put(store, "stays")
        put(store, "goes", nbytes=3 * MIB)
        store.flush()
        store.delete("goes")
        index = store.catalog.committer.index
        under_way, may_end, write = threading.Event(), threading.Event(), index.write

        def held(rows):
            under_way.set()
            assert may_end.wait(PATIENCE_S)
            write(rows)

        index.write = held
        with ThreadPoolExecutor(2) as threads:
            try:
                committed = threads.submit(store.flush)
                assert under_way.wait(PATIENCE_S)
                late = threads.submit(put, store, "new", nbytes=3 * MIB)
                deadline = time.monotonic() + 0.3
                while time.monotonic() < deadline and not late.done():
                    time.sleep(0.01)
            finally:
                may_end.set()
            committed.result(PATIENCE_S)
            late.result(PATIENCE_S)
        assert store.keys() == ["stays", "new"]
        assert store.stats()["evictions"] == 0
        check_books(store)


@pytest.mark.parametrize("eviction", ["none", "lru"])
def test_room_that_came_free_meanwhile_is_used_and_nothing_evicted(folder, eviction):
    with open_store(folder, capacity="4 MiB", eviction=eviction) as store:
        put(store, "stays")
        put(store, "goes", nbytes=3 * MIB)
        room = store.catalog.room
        make_room = room._make_room

        def after_another_threads_commit(*wanted):
            room._make_room = make_room
            store.delete("goes")
            store.flush()
            return make_room(*wanted)

        room._make_room = after_another_threads_commit
        put(store, "new", nbytes=3 * MIB)
        assert store.keys() == ["stays", "new"]
        assert store.stats()["evictions"] == 0
        check_books(store)


def test_a_full_store_replaces_a_key_in_place_of_another(where):
    with open_store(where, capacity="4 MiB") as store:
        put(store, *"abcd")
        for version in range(2, 8):
            put(store, "a", version=version)
            assert version_of("a", store.get("a")) == version
        check_books(store)


@pytest.mark.parametrize("many", [False, True])
def test_a_put_that_can_never_fit_evicts_nothing(where, many):
    with open_store(where, capacity="4 MiB") as store:
        put(store, *"abc")
        nbytes = [MIB] * 5 if many else [4 * MIB + 1]
        with pytest.raises(CapacityError):
            store.put_many({str(i): noise(size) for i, size in enumerate(nbytes)})
        assert store.keys() == [*"abc"]
        assert store.stats()["evictions"] == 0
        check_books(store)


def test_a_put_that_fails_before_it_begins_gives_its_room_back(where, monkeypatch):
    with open_store(where, capacity="4 MiB") as store:
        transfer = store.engine.transfer

        def submitted(*arguments, **options):
            made = transfer(*arguments, **options)
            made.submit()
            return made

        with monkeypatch.context() as patched:
            patched.setattr(store.engine, "transfer", submitted)
            with pytest.raises(ValueError, match="already submitted"):
                put(store, "a")
        assert store.stats()["used_nbytes"] == 0
        check_books(store)


def test_small_blobs_are_evicted_by_the_blocks_that_they_hold(where):
    # 1,000 blobs of 100 bytes fill 4 MiB: forgetting some of them makes room for a large one.
    with open_store(where, capacity="4 MiB") as store:
        for i in range(1024):
            store.put(str(i), noise(100, i))
        assert store.stats()["free_nbytes"] == 0
        put(store, "large")
        assert version_of("large", store.get("large")) == 1
        assert store.stats()["evictions"] < 512
        check_books(store)


def test_blobs_without_bytes_are_not_evicted(where):
    with open_store(where, capacity="4 MiB") as store:
        for i in range(100):
            store.put(f"empty {i}", noise(0))
        put(store, *"abcdef")
        assert sum(key.startswith("empty") for key in store.keys("")) == 100


def test_fragments_are_joined_by_evicting_more(where):
    with open_store(where, capacity="8 MiB") as store:
        for i in range(128):
            store.put(str(i), noise(MIB // 16, i))
        for i in range(0, 128, 2):
            store.delete(str(i))
        store.flush()
        stats = store.stats()
        assert stats["free_nbytes"] == 4 * MIB
        assert stats["largest_free_nbytes"] == MIB // 16
        put(store, "whole", nbytes=2 * MIB)
        assert version_of("whole", store.get("whole")) == 1
        check_books(store)


def test_fragments_without_eviction_are_refused_by_the_largest_run(where):
    with open_store(where, capacity="2 MiB", eviction="none") as store:
        for i in range(8):
            store.put(str(i), noise(MIB // 4, i))
        for i in range(0, 8, 2):
            store.delete(str(i))
        with pytest.raises(CapacityError, match=f"{MIB // 4} bytes"):
            store.put("whole", noise(MIB // 2))
        check_books(store)


def test_what_is_being_read_is_neither_reused_nor_evicted(folder):
    with open_store(folder, capacity="4 MiB", engine="pagecache", mmap=True) as store:
        put(store, *"abcd")
        held = store.get("a")  # mapped: its extent stays pinned
        offset, _ = extent_of(store, "a")
        put(store, *"efg")
        assert "a" in store
        store.put("a", payload("a", 2, MIB))
        put(store, *"hij")
        assert version_of("a", held) == 1
        assert store.catalog.records.extents.is_pinned(offset)
        # All but that one can be had, and not more.
        with pytest.raises(CapacityError):
            put(store, "k", nbytes=4 * MIB)
        del held
        put(store, "k", nbytes=4 * MIB)
        check_books(store)


def test_several_sequences_and_blobs_share_the_room(where):
    import torch

    import spdk_kv

    shape = spdk_kv.KVShape(2, 2, 64, torch.float16, 1024)  # 4 units of 256 KiB
    with open_store(where, capacity="4 MiB") as store:
        put(store, *"abcd")
        sequence = store.sequence("s", shape)  # evicts
        assert len(store) == 3
        with pytest.raises(CapacityError):
            put(store, "huge", nbytes=7 * MIB // 2)  # sequences are never evicted
        assert len(store) == 3
        sequence.delete()
        put(store, "huge", nbytes=4 * MIB)
        check_books(store)


def test_discard_gives_the_blocks_back_to_the_filesystem(folder):
    with open_store(folder, capacity="8 MiB", discard=True) as store:
        put(store, *"abcdef")
        store.flush()
        before = os.stat(folder / "data").st_blocks
        for key in "abcd":
            store.delete(key)
        store.flush()
        assert os.stat(folder / "data").st_blocks <= before - 4 * MIB // 512
        put(store, *"ghij")
        assert [version_of(key, store.get(key)) for key in "efghij"] == [1] * 6
        check_books(store)


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    with blockdev.ext4(tmp_path, 48 * MIB) as at:
        yield at


def fill(store: KVStore) -> list[str]:
    """Puts blobs until the disk is full; returns the keys that went in."""
    for i in range(64):
        try:
            put(store, str(i))
        except CapacityError:
            with pytest.raises(CapacityError, match="filesystem"):
                put(store, str(i))
            return [str(kept) for kept in range(i)]
    raise AssertionError("the disk did not fill up")


@pytest.mark.parametrize("capacity", [4096, 3 * MIB + 4096, 16 * MIB])
@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_small_store_has_a_small_data_file(folder, engine, capacity):
    with open_store(folder, engine=engine, capacity=capacity) as store:
        for i in range(40):
            store.put(str(i), noise(min(capacity, MIB), i))
        assert (folder / "data").stat().st_size == DATA_START + capacity
    with reopen(folder, engine=engine) as store:
        assert store.stats()["evictions"] == 0
        store.put("more", noise(min(capacity, MIB), 0))
    assert (folder / "data").stat().st_size == DATA_START + capacity


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_data_file_grows_in_steps_that_end_at_the_capacity(folder, engine):
    with open_store(folder, engine=engine, capacity=300 * MIB) as store:
        assert (folder / "data").stat().st_size == 256 * MIB
        extents = store.catalog.room.allocate([300 * MIB])  # grown for, not written
        assert (folder / "data").stat().st_size == DATA_START + 300 * MIB
        store.catalog.abandon(extents)
    with open_store(folder, engine=engine, capacity=310 * MIB) as store:
        store.catalog.abandon(store.catalog.room.allocate([310 * MIB]))
        assert (folder / "data").stat().st_size == DATA_START + 310 * MIB


def test_a_full_disk_refuses_the_put_and_keeps_the_rest(small_disk):
    with open_store(small_disk / "kv", capacity="64 MiB", eviction="none") as store:
        (small_disk / "ballast").write_bytes(bytes(4 * MIB))
        kept = fill(store)
        assert len(kept) >= 8
        refused = str(len(kept))
        assert refused not in store
        used = store.stats()["used_nbytes"]
        assert used == len(kept) * MIB  # the space of the refused one came back
        with pytest.raises(CapacityError):
            store.put(kept[0], payload(kept[0], 2, MIB))
        for key in kept:
            assert version_of(key, store.get(key)) == 1
        (small_disk / "ballast").unlink()
        store.flush()
        put(store, refused)
        check_books(store)
    with reopen(small_disk / "kv") as store:
        for key in [*kept, refused]:
            assert version_of(key, store.get(key)) == 1


def test_a_full_disk_evicts_a_part_and_not_everything(small_disk):
    # The capacity is far more than the disk has; what is evicted goes by what is held.
    with open_store(small_disk / "kv", capacity="1 GiB") as store:
        most = 0
        for i in range(400):
            # Long keys, so that the index grows beside the data.
            store.put(f"{i:04}" * 300, noise(128 << 10, i))
            most = max(most, len(store))
            assert len(store) > 0.8 * most
        assert 100 < most < 400
        for i in range(400, 450):
            store.put(str(i), payload(str(i), 1, 128 << 10))
        for i in range(400, 450):
            assert version_of(str(i), store.get(str(i))) == 1
        check_books(store)


def test_a_disk_too_full_for_the_index_loses_nothing(small_disk):
    # Without discard: the room that "grown" leaves stays the store's, whenever the disk fills up.
    options = {"capacity": "16 MiB", "eviction": "none", "discard": False}
    with open_store(small_disk / "kv", **options) as store:
        put(store, "a")
        put(store, "grown", nbytes=13 * MIB)
        store.delete("grown")
        store.flush()
        with open(small_disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        # More than what the index's log has room for already.
        keys = [f"{i:04}" * 100 for i in range(3000)]
        for i, key in enumerate(keys):
            store.put(key, noise(10, i))
        for _ in range(2):
            with pytest.raises(CapacityError, match="index"):
                store.flush()
        assert version_of("a", store.get("a")) == 1
        (small_disk / "ballast").unlink()
        store.flush()
    with reopen(small_disk / "kv") as store:
        assert set(store.keys()) == {"a", *keys}
        assert version_of("a", store.get("a")) == 1
        check_books(store)
