"""Compaction: blobs move down, the file gets shorter, and every get has the bytes that were put."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import spdk_kv
from spdk_kv.errors import CapacityError, ClosedError, CorruptionError, DeviceError, DeviceTimeout
from spdk_kv.store import KVStore, compacting
from spdk_kv.store.movable import MovableBlobs
from store.helpers import (
    DATA_START,
    FILE_ENGINES,
    check_books,
    extent_of,
    flip,
    folder_fixture,
    kill_loop,
    open_store,
    payload,
    reopen,
    version_of,
)
from support.rounds import rounds
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture
MIB = 1 << 20


def put(store: KVStore, *keys: str, nbytes: int = MIB, version: int = 1) -> None:
    for key in keys:
        store.put(key, payload(key, version, nbytes))


def check(store: KVStore, *keys: str, version: int = 1) -> None:
    for key in keys:
        assert version_of(key, store.get(key)) == version


def size(folder: Path) -> int:
    return os.stat(folder / "data").st_size - DATA_START


def with_holes(folder: Path, **options) -> KVStore:
    """A store with every other of 16 blobs of odd sizes gone: 0, 2, 4 ... are left."""
    store = open_store(folder, **{"capacity": "32 MiB"} | options)
    for i in range(16):
        put(store, str(i), nbytes=MIB - 3000 * i - 1)
    store.flush()
    for i in range(1, 16, 2):
        store.delete(str(i))
    return store


LEFT = [str(i) for i in range(0, 16, 2)]


@pytest.mark.parametrize("engine", FILE_ENGINES)
@pytest.mark.parametrize("copy_nbytes", [16 * MIB, 8192])
def test_the_file_gets_as_short_as_what_it_holds(folder, engine, copy_nbytes, monkeypatch):
    # The smaller one cuts each blob into many pieces.
    monkeypatch.setattr(compacting, "_COPY_NBYTES", copy_nbytes)
    with with_holes(folder, engine=engine) as store:
        used = 8 * MIB  # each blob in whole blocks is a little less
        assert store.compact() >= 20 * MIB
        assert size(folder) <= used
        check(store, *LEFT)
        assert set(store.keys()) == set(LEFT)
        check_books(store)
        assert store.compact() == 0
    with open_store(folder, engine=engine, capacity=used) as store:  # what is at its end is gone
        check(store, *LEFT)
        check_books(store)


def test_the_order_of_use_and_the_counters_stay(folder):
    with with_holes(folder) as store:
        store.get("2")
        order, hits = store.keys(), store.stats()["hits"]
        store.compact()
        assert store.keys() == order
        assert store.stats()["hits"] == hits
        assert store.stats()["evictions"] == 0
    with reopen(folder) as store:
        assert store.keys() == order


def test_sequences_stay_where_they_are(folder):
    shape = spdk_kv.KVShape(2, 2, 64, torch.float16, 1024)  # 4 units of 256 KiB
    with open_store(folder) as store:
        put(store, *"abcd")
        sequence = store.sequence("s", shape)
        block = torch.randn(1, 2, 100, 64, dtype=torch.float16)
        for layer in range(2):
            sequence.append(layer, block, block)
        put(store, *"efgh")
        for key in "bdfg":
            store.delete(key)
        before = sequence._growth.recordable()
        assert store.compact() > 0
        assert sequence._growth.recordable() == before
        assert size(folder) == 5 * MIB  # a, e, gap, h, the sequence
        assert torch.equal(sequence.read(1)[0], block)
        check(store, *"aceh")
        check_books(store)


def test_nothing_to_do_is_done_at_once(folder):
    with open_store(folder) as store:
        assert store.compact() > 0  # the end that nobody used
        assert store.compact() == 0
        put(store, *"abc")
        store.put("empty", torch.empty(0))
        store.compact()
        check(store, *"abc")
        assert store.get("empty").numel() == 0


@pytest.mark.parametrize("uri", ["ram://", "null://"])
def test_stores_that_keep_no_file(uri):
    with open_store(uri) as store:
        put(store, *"abcd")
        store.delete("b")
        store.compact()
        assert set(store.keys()) == set("acd")
        if uri == "ram://":
            check(store, *"acd")
            assert extent_of(store, "d")[0] == MIB
            check_books(store)


def test_a_damaged_blob_stays_and_its_get_says_so(folder):
    with with_holes(folder) as store:
        before = extent_of(store, "14")
        flip(folder / "data", before[0] + 70_000)
        store.compact()
        assert extent_of(store, "14") == before
        check(store, *LEFT[:-1])
        with pytest.raises(CorruptionError):
            store.get("14")
        check_books(store)


def test_one_that_cannot_be_read_keeps_no_other_from_moving(folder, monkeypatch):
    with with_holes(folder) as store:
        bad = extent_of(store, "12")[0]
        copy = compacting.Compactor._copy_pieces

        def failing(compactor, group, pieces, staging):
            if any(group[number].move.offset == bad for number, _, _ in pieces):
                raise DeviceError("media error", op="read", status=errno.EIO)
            copy(compactor, group, pieces, staging)

        monkeypatch.setattr(compacting.Compactor, "_copy_pieces", failing)
        store.compact()
        assert extent_of(store, "12")[0] == bad
        assert extent_of(store, "14")[0] < bad
        check(store, *LEFT)
        check_books(store)


def test_a_drive_that_fails_ends_it(folder, monkeypatch):
    with with_holes(folder) as store:

        def failing(*_):
            raise DeviceError("gone", op="write", status=errno.ENODEV)

        with monkeypatch.context() as patch:
            patch.setattr(compacting.Compactor, "_copy_pieces", failing)
            with pytest.raises(DeviceError):
                store.compact()
        check(store, *LEFT)
        check_books(store)


def test_the_old_place_keeps_its_bytes_until_the_new_record_is_committed(folder, tmp_path):
    with with_holes(folder, eviction="none") as store:
        store.flush()
        catalog = store.catalog
        movables = [MovableBlobs(catalog.records)]
        old = {key: extent_of(store, key)[0] for key in LEFT}
        moved = compacting.Compactor(
            catalog.records, store.engine, catalog.backing, catalog.reserved, movables, lambda: None
        ).run(store.staging, lambda: False)
        assert moved > 3 * MIB
        free = catalog.records.extents.allocator.largest_free_nbytes
        put(store, "over all that is free", nbytes=free)
        shutil.copytree(folder, tmp_path / "as a crash leaves it")
        check(store, *LEFT)
    with reopen(tmp_path / "as a crash leaves it") as store:
        assert {key: extent_of(store, key)[0] for key in LEFT} == old
        check(store, *LEFT)
        check_books(store)


# -- beside others --------------------------------------------------------------------------------


class Held:
    """Compaction waits before it gives its new records out, until :meth:`go_on`."""

    def __init__(self, monkeypatch) -> None:
        self.copied, self._going = threading.Event(), threading.Event()
        copy = compacting.Compactor._copy

        def held(compactor, group, staging):
            whole = copy(compactor, group, staging)
            self.copied.set()
            assert self._going.wait(PATIENCE_S)
            return whole

        monkeypatch.setattr(compacting.Compactor, "_copy", held)

    def go_on(self) -> None:
        self._going.set()


def test_what_is_replaced_or_deleted_meanwhile_wins(folder, monkeypatch):
    with with_holes(folder) as store, ThreadPoolExecutor(1) as threads:
        held = Held(monkeypatch)
        compacting_ = threads.submit(store.compact)
        assert held.copied.wait(PATIENCE_S)
        moving = {key: extent_of(store, key)[0] for key in LEFT}
        put(store, "14", version=2)
        store.delete("12")
        put(store, "10", nbytes=1000, version=3)
        store.flush()
        store.delete("8")
        put(store, "8", version=2)
        held.go_on()
        compacting_.result(PATIENCE_S)
        check(store, "0", "2", "4", "6")
        check(store, "14", "8", version=2)
        check(store, "10", version=3)
        assert "12" not in store
        assert extent_of(store, "8")[0] != moving["8"]
        check_books(store)
    with reopen(folder) as store:
        check(store, "0", "2", "4", "6")
        check(store, "14", "8", version=2)
        check(store, "10", version=3)
        assert "12" not in store


def test_a_get_under_way_reads_the_old_place(folder, monkeypatch):
    with with_holes(folder, engine="pagecache", mmap=True) as store:
        old = extent_of(store, "14")[0]
        mapped = store.get("14")  # in its old place for as long as somebody has it
        store.compact()
        assert extent_of(store, "14")[0] < old
        put(store, *map(str, range(20, 32)))  # over all that is free
        assert version_of("14", mapped) == 1
        del mapped
        check(store, *LEFT)
        check_books(store)


def test_a_put_that_needs_the_room_gets_it_without_eviction(folder, monkeypatch):
    with open_store(folder, capacity="8 MiB") as store, ThreadPoolExecutor(2) as threads:
        put(store, *"abcdefgh")
        store.delete("c")
        store.flush()
        held = Held(monkeypatch)
        compacting_ = threads.submit(store.compact)
        assert held.copied.wait(PATIENCE_S)  # the one free MiB is reserved
        with pytest.raises(DeviceTimeout):
            store.put("i", payload("i", 1, MIB), timeout_s=0.02)
        putting = threads.submit(put, store, "i")
        wait_until(lambda: store.catalog.reserved.is_wanted)
        held.go_on()
        putting.result(PATIENCE_S)
        compacting_.result(PATIENCE_S)
        assert store.stats()["evictions"] == 0
        check(store, *"abdefghi")
        check_books(store)


def test_close_and_deadlines_end_it_between_two_steps(folder, monkeypatch):
    store = with_holes(folder)
    held = Held(monkeypatch)
    with pytest.raises(DeviceTimeout, match="compaction"):
        store.compact(timeout_s=0.2)
    assert held.copied.wait(PATIENCE_S)
    closing = threading.Thread(target=store.close)
    closing.start()
    held.go_on()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    with pytest.raises(ClosedError):
        store.compact()
    with reopen(folder) as store:
        check(store, *LEFT)
        check_books(store)


def test_an_error_gives_everything_back(folder, monkeypatch):
    with with_holes(folder) as store:
        wanted = {key: extent_of(store, key) for key in LEFT}

        def full(*_):
            raise CapacityError("full")

        store.trim()
        with monkeypatch.context() as patch:
            patch.setattr(store.engine, "back", full)
            with pytest.raises(CapacityError):
                store.compact()
            patch.setattr(compacting.Compactor, "_copy_pieces", full)
            with pytest.raises(CapacityError):
                store.compact()
        assert {key: extent_of(store, key) for key in LEFT} == wanted
        assert not store.catalog.reserved
        check_books(store)
        assert store.compact() >= 0
        assert size(folder) <= 8 * MIB
        check(store, *LEFT)
        check_books(store)


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_bytes_stay_right_while_blobs_move(folder, engine):
    steps = rounds(120, 3000)
    over = threading.Event()

    def change(store: KVStore, who: int) -> None:
        rng = random.Random(who)
        versions: dict[str, int] = {}
        for step in range(steps):
            key = f"{who} {rng.randrange(8)}"
            if rng.random() < 0.6:
                versions[key] = step
                store.put(key, payload(key, step, 16 + rng.randrange(200_000)))
            elif versions.pop(key, None) is not None:
                store.delete(key)
            for each, version in versions.items():
                assert version_of(each, store.get(each)) == version

    def compact(store: KVStore) -> None:
        count = 0
        while not over.is_set() or count < 2:
            store.compact()
            count += 1

    with open_store(folder, capacity="8 MiB", engine=engine, eviction="none") as store:
        with ThreadPoolExecutor(4) as threads:
            compactions = threads.submit(compact, store)
            try:
                for done in [threads.submit(change, store, who) for who in range(3)]:
                    done.result(600)
            finally:
                over.set()
            compactions.result(PATIENCE_S)
        check_books(store)


# -- kills ----------------------------------------------------------------------------------------


def test_kills_amid_trimming_and_compaction_lose_nothing(folder):
    kills = rounds(30, 200)
    counts = kill_loop(folder, kills, "space", 5)
    assert counts["killed"] == kills
