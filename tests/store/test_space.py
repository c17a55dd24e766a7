"""Space that comes free goes back to the filesystem or the drive, and nobody's bytes with it."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import spdk_kv
from spdk_kv.deadline import Deadline
from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    DeviceError,
    DeviceTimeout,
    KeyNotFound,
)
from spdk_kv.store import KVStore, trimming
from spdk_kv.store.trimming import Reserve
from store.helpers import (
    DATA_START,
    FILE_ENGINES,
    check_books,
    extent_of,
    folder_fixture,
    open_store,
    payload,
    reopen,
    version_of,
)
from support import blockdev
from support.rounds import rounds
from support.waiting import PATIENCE_S, wait_until

folder = folder_fixture
MIB = 1 << 20


@pytest.fixture(autouse=True)
def often(monkeypatch) -> None:
    """The background looks often."""
    monkeypatch.setattr(trimming, "TICK_S", 0.005)


def disk(folder: Path) -> int:
    """What the data file takes of its filesystem, in whole MiB (its map may take a block)."""
    return os.stat(folder / "data").st_blocks * 512 // MIB


def about(nbytes: int) -> Any:
    """The file's map takes a block or two."""
    return pytest.approx(nbytes, abs=16384)


def put(store: KVStore, *keys: str, nbytes: int = MIB, version: int = 1) -> None:
    for key in keys:
        store.put(key, payload(key, version, nbytes))


def check(store: KVStore, *keys: str, version: int = 1) -> None:
    for key in keys:
        assert version_of(key, store.get(key)) == version


@contextmanager
def held(store: KVStore, name: str):
    """Calls of the engine's ``name`` wait until the end; yields an event that one has begun."""
    begun, done = threading.Event(), threading.Event()
    call = getattr(store.engine, name)

    def holding(*arguments):
        begun.set()
        assert done.wait(PATIENCE_S)
        return call(*arguments)

    setattr(store.engine, name, holding)
    try:
        yield begun
    finally:
        done.set()
        delattr(store.engine, name)


# -- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_a_file_gives_back_what_comes_free_in_the_background(folder, engine):
    with open_store(folder, engine=engine) as store:
        put(store, *"abcdefgh")
        store.flush()
        assert disk(folder) == 17
        for key in "bcdgh":
            store.delete(key)
        store.flush()
        wait_until(lambda: disk(folder) <= 4)
        assert os.stat(folder / "data").st_size == DATA_START + 6 * MIB  # up to "f"
        check(store, *"aef")
        wait_until(lambda: store.stats()["discarded_nbytes"] == about(13 * MIB))
        put(store, *"bcdgh", version=2)
        check(store, *"bcdgh", version=2)
        check(store, *"aef")
        check_books(store)


def test_what_a_sequence_never_wrote_goes_back_with_it(folder):
    shape = spdk_kv.KVShape(4, 2, 64, "float32", 16384)
    with open_store(folder, capacity="512 MiB") as store:
        sequence = store.sequence("s", shape)
        block = torch.zeros(1, 2, 20, 64)
        for layer in range(4):
            sequence.append(layer, block, block)
        store.flush()
        assert disk(folder) >= 64
        sequence.delete()
        store.flush()
        wait_until(lambda: disk(folder) == 1)


def test_a_closed_store_leaves_no_free_space_behind(folder):
    with open_store(folder, capacity="512 MiB") as store:
        put(store, *"abc")
        store.sequence("s", spdk_kv.KVShape(4, 2, 64, "float32", 16384), temporary=True)
        store.delete("b")
        assert disk(folder) >= 200
    assert disk(folder) == 3
    assert os.stat(folder / "data").st_size == DATA_START + 3 * MIB
    with reopen(folder) as store:
        check(store, "a", "c")
        put(store, "d", nbytes=9 * MIB)
        check(store, "a", "c", "d")
    assert disk(folder) == 12


def test_without_discard_it_stays_until_it_is_asked_for(folder):
    with open_store(folder, discard=False) as store:
        put(store, *"abcdefgh")
        for key in "bcdgh":
            store.delete(key)
        store.flush()
        time.sleep(0.05)
        assert disk(folder) == 17
        assert store.catalog.trimmer._thread is None
        assert store.trim() == about(13 * MIB)
        assert disk(folder) == 4
        assert store.trim() == 0
        check(store, *"aef")
        store.delete("a")
        assert store.trim() == about(MIB)  # it flushes
        put(store, *"ghi")
        store.delete("g")
    assert disk(folder) > 5


def test_with_discard_a_flush_returns_when_it_is_done(folder, monkeypatch):
    monkeypatch.setattr(trimming, "TICK_S", 3600)
    with open_store(folder, discard=True) as store:
        put(store, *"abcdefgh")
        store.flush()
        for key in "bcdgh":
            store.delete(key)
        store.flush()
        assert disk(folder) == 4
        check(store, *"aef")


def test_small_runs_go_when_they_are_asked_for(folder):
    with open_store(folder, discard=True) as store:
        put(store, *map(str, range(20)), nbytes=4096)
        for i in range(0, 20, 2):
            store.delete(str(i))
        store.flush()
        given = store.stats()["discarded_nbytes"]
        assert store.trim() == about(10 * 4096)
        assert store.stats()["discarded_nbytes"] > given
        check(store, *map(str, range(1, 20, 2)))


def test_what_is_about_to_be_used_again_stays():
    reserve = Reserve()
    assert reserve.look(0) == 0
    assert reserve.look(100 * MIB) == 200 * MIB
    assert reserve.look(160 * MIB) == 120 * MIB
    assert [reserve.look(160 * MIB) >> 20 for _ in range(8)] == [60, 30, 15, 7, 3, 1, 0, 0]
    assert reserve.look(160 * MIB + 4096) == 0  # too little to be kept for


def test_a_busy_store_keeps_a_part_and_gives_the_rest(folder):
    with open_store(folder, capacity="64 MiB", discard=False) as store:
        put(store, *map(str, range(32)))
        for i in range(32):
            if i not in (9, 10, 31):  # runs of 9 and 20 MiB, and the file's end
                store.delete(str(i))
        store.flush()
        trimmer = store.catalog.trimmer
        assert trimmer._give_back(MIB, 57 * MIB, None) == about(4 * MIB)  # of the end
        assert os.stat(folder / "data").st_size == DATA_START + 60 * MIB
        assert trimmer._give_back(MIB, 12 * MIB, None) == about(45 * MIB)
        assert trimmer._give_back(MIB, 12 * MIB, None) == 0
        assert disk(folder) == 1 + 3 + 12
        check(store, "9", "10", "31")
        check_books(store)


# -- who waits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["discard", "shrink"])
def test_nobody_is_given_what_is_being_given_back(folder, name, monkeypatch):
    monkeypatch.setattr(Reserve, "look", lambda self, taken: 0)
    with open_store(folder, capacity="8 MiB") as store, ThreadPoolExecutor(2) as threads:
        put(store, *"abcdefgh")
        store.flush()
        gone = "bc" if name == "discard" else "gh"
        with held(store, name) as begun:
            for key in gone:
                store.delete(key)
            store.flush()
            assert begun.wait(PATIENCE_S)
            assert store.stats()["free_nbytes"] == 2 * MIB
            check(store, *set("abcdefgh") - set(gone))
            # The only room there is; nothing is evicted for it, and nothing refused.
            putting = threads.submit(put, store, "i", version=3)
            wait_until(lambda: store.catalog.reserved.is_wanted)
            with pytest.raises(DeviceTimeout, match="giving space back"):
                store.put("j", payload("j", 1, MIB), timeout_s=0.02)
            assert not putting.done()
            trimming_all = threads.submit(store.trim)
            assert not store.catalog.reserved.take(1, 1, 1)  # nor anything else meanwhile
        putting.result(PATIENCE_S)
        trimming_all.result(PATIENCE_S)
        assert store.stats()["evictions"] == 0
        assert not store.catalog.reserved.is_wanted
        check(store, "i", version=3)
        check(store, *set("abcdefgh") - set(gone))
        put(store, "j")
        assert store.stats()["evictions"] == 0
        check_books(store)


def test_a_put_that_has_other_room_waits_for_nothing(folder):
    with open_store(folder, capacity="8 MiB") as store:
        put(store, *"abcdef")
        store.flush()
        with held(store, "discard") as begun:
            store.delete("b")
            store.delete("d")
            store.flush()
            assert begun.wait(PATIENCE_S)
            put(store, "g", version=2)
            check(store, "g", version=2)
        check(store, *"acefg"[:4])


def test_an_interrupted_put_keeps_nobody_from_giving_back(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with open_store(folder, capacity="2 MiB", discard=False) as store:
        put(store, "a")
        reserved = store.catalog.reserved
        start = extent_of(store, "a")[0] + MIB
        assert reserved.take(start, start, MIB)
        with monkeypatch.context() as patch:
            patch.setattr(reserved._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                put(store, "b")
        assert not reserved.is_wanted
        reserved.give_back(start)
        put(store, "b")
        check_books(store)


def test_a_drive_that_takes_nothing_back_is_asked_once(folder, caplog):
    with open_store(folder, discard=True) as store:
        asked = []

        def refuse(offset, nbytes):
            asked.append(offset)
            raise DeviceError("no", op="discard")

        store.engine.discard = refuse
        put(store, *"abcd")
        store.delete("b")
        store.flush()
        assert "not given back any more" in caplog.text
        store.delete("c")
        store.flush()
        assert len(asked) == 1
        with pytest.raises(DeviceError):  # who asks for it hears of it
            store.trim()
        put(store, *"bc", version=2)
        check(store, *"bc", version=2)
        check(store, *"ad")
        check_books(store)


def test_a_filesystem_without_holes_has_only_the_end_back(folder):
    with open_store(folder, discard=True) as store:
        store.engine.discard = lambda offset, nbytes: False
        put(store, *"abcd")
        store.delete("b")
        store.flush()
        assert store.stats()["discarded_nbytes"] == about(12 * MIB)
        assert not store.catalog.backing.holes()
        put(store, "e")
        check(store, *"acde")


def test_trim_after_close_and_past_a_deadline(folder):
    store = open_store(folder)
    put(store, *"abc")
    store.delete("b")
    with held(store, "shrink"):
        with pytest.raises(DeviceTimeout):
            store.trim(timeout_s=0.05)  # on a busy machine its flush alone takes that long
        with pytest.raises(DeviceTimeout, match="giving space back"):
            store.catalog.trimmer.trim(deadline=Deadline(0.05))
    assert store.trim() >= 0  # waits for that one
    assert disk(folder) == 3
    store.close()
    with pytest.raises(ClosedError):
        store.trim()


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    with blockdev.ext4(tmp_path, 48 * MIB) as at:
        yield at


def fill(folder: Path) -> None:
    """All but 6 MiB, which the index needs."""
    free = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 6 * MIB))


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("eviction", ["lru", "none"])
def test_a_hole_that_the_filesystem_cannot_fill_is_no_room(small_disk, eviction, reopened):
    at = small_disk / "kv"
    store = open_store(at, capacity="16 MiB", eviction=eviction)
    put(store, *"abcdefghijklmnop")
    for key in "cdefgh":
        store.delete(key)
    store.trim()
    if reopened:
        store.close()
        store = reopen(at, eviction=eviction)
    with store:
        fill(small_disk)
        kept = "abijklmnop"
        if eviction == "none":
            with pytest.raises(CapacityError, match="gave back to its filesystem"):
                put(store, "q")
            check(store, *kept)
            (small_disk / "ballast").unlink()
        put(store, "q", version=2)
        check(store, "q", version=2)
        assert store.stats()["evictions"] == (1 if eviction == "lru" else 0)
        check(store, *kept[1 if eviction == "lru" else 0 :])
        with suppress(FileNotFoundError):
            (small_disk / "ballast").unlink()
        put(store, *"rst", version=2)
        check(store, *"rst", version=2)
        check_books(store)


def test_a_full_filesystem_without_holes_refuses_nothing_that_it_has(small_disk):
    at = small_disk / "kv"
    with open_store(at, capacity="16 MiB", eviction="none", discard=False) as store:
        put(store, *"abcdefghijklmnop")
        for key in "cdefgh":
            store.delete(key)
    fill(small_disk)
    with reopen(at, eviction="none", discard=False) as store:
        put(store, *"cdefgh", version=2)  # what is free has its blocks
        check(store, *"cdefgh", version=2)


# -- drives ---------------------------------------------------------------------------------------


def test_a_device_is_told_only_when_asked(tmp_path):
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 24 * MIB)

    def taken() -> int:
        os.sync()
        return os.stat(image).st_blocks * 512 // MIB

    with blockdev.loop_device(image) as node:
        where = f"block://{node}"
        options = {"index_dir": tmp_path / "index", "capacity": None}
        with open_store(where, create=True, **options) as store:
            put(store, *"abcdefgh")
            for key in "bcd":
                store.delete(key)
            store.flush()
            assert store.catalog.trimmer._thread is None
            before = taken()
            assert before >= 8
        with open_store(where, discard=True, **options) as store:
            discards, discard = [], store.engine.discard
            store.engine.discard = lambda *extent: (discards.append(extent), discard(*extent))[1]
            check(store, *"aefgh")
            start = extent_of(store, "f")[0]
            for key in "fg":
                store.delete(key)
            store.flush()
            assert discards == [(start, 2 * MIB)]  # two as one, and not what was free before
            if not discard(start, 4096):
                pytest.skip("this loop device takes no discards")
            assert taken() <= before - 2
            assert store.trim() == store.stats()["free_nbytes"]
            assert taken() <= before - 5
            check(store, *"aeh")
            put(store, *"fg", version=2)
            store.delete("f")
            discards.clear()
            store.flush()
            assert discards == [(start, MIB)]
            check(store, "g", version=2)


def test_memory_is_given_back_when_asked():
    with open_store("ram://", discard=True) as store:
        put(store, *"abcd")
        store.delete("b")
        store.flush()
        assert store.stats()["discarded_nbytes"] == MIB
        check(store, *"acd")
        put(store, "b", version=2)
        check(store, "b", version=2)


# -- all at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", FILE_ENGINES)
def test_bytes_stay_right_while_space_goes_and_comes(folder, monkeypatch, engine):
    monkeypatch.setattr(trimming, "TICK_S", 0.0005)
    monkeypatch.setattr(trimming, "LEAST_NBYTES", 4096)
    monkeypatch.setattr(trimming, "_LEAST_WHILE_BUSY_NBYTES", 4096)
    monkeypatch.setattr(trimming, "_PART_NBYTES", 64 << 10)
    monkeypatch.setattr(Reserve, "look", lambda self, taken: 0)
    steps = rounds(150, 3000)

    def change(store: KVStore, who: int) -> None:
        rng = random.Random(who)
        versions: dict[str, int] = {}
        for step in range(steps):
            key = f"{who} {rng.randrange(6)}"
            if rng.random() < 0.6:
                versions[key] = step
                store.put(key, payload(key, step, 16 + rng.randrange(200_000)))
            elif versions.pop(key, None) is not None:
                store.delete(key)
            if rng.random() < 0.2:
                store.flush()
            if rng.random() < 0.02:
                store.trim()
            for each, version in versions.items():
                assert version_of(each, store.get(each)) == version
        for step in range(6):
            if f"{who} {step}" not in versions:
                with pytest.raises(KeyNotFound):
                    store.get(f"{who} {step}")

    with open_store(folder, capacity="6 MiB", engine=engine, eviction="none") as store:
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(change, store, who) for who in range(4)]:
                done.result(600)
        assert store.stats()["discarded_nbytes"] > 0
        check_books(store)


def test_tokens_stay_right_while_space_goes_and_comes(folder, monkeypatch):
    monkeypatch.setattr(trimming, "TICK_S", 0.0005)
    monkeypatch.setattr(trimming, "LEAST_NBYTES", 4096)
    monkeypatch.setattr(trimming, "_PART_NBYTES", 64 << 10)
    monkeypatch.setattr(Reserve, "look", lambda self, taken: 0)
    shape = spdk_kv.KVShape(2, 2, 64, "float32", 512)
    count = rounds(25, 400)

    def once_there_is_room(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What was deleted while it was written comes free only when the drive is done with it."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call(*arguments, **options)
            except CapacityError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.001)

    def live(store: KVStore, who: int) -> None:
        rng = random.Random(who)
        for life in range(count):
            temporary = life % 2 == 0
            sequence = once_there_is_room(store.sequence, f"{who}", shape, temporary=temporary)
            k = torch.randn(1, 2, rng.randrange(1, 512), 64)
            for layer in range(2):
                for part in (k[:, :, :7], k[:, :, 7:]):
                    once_there_is_room(sequence.append, layer, part, part)
            if rng.random() < 0.3:
                store.flush()
            for layer in range(2):
                assert all(torch.equal(found, k) for found in sequence.read(layer))
            if k.shape[2] < 512:
                once_there_is_room(sequence.append, 0, k[:, :, :1], k[:, :, :1])
            sequence.delete()  # its writes may be on their way
            if rng.random() < 0.5:
                store.flush()

    with open_store(folder, capacity="5 MiB", eviction="none") as store:
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(live, store, who) for who in range(4)]:
                done.result(600)
        assert store.stats()["discarded_nbytes"] > 0

        def is_empty() -> bool:
            assert store.trim() >= 0  # once no write is on its way any more
            return store.stats()["used_nbytes"] == 0

        wait_until(is_empty)
        assert disk(folder) == 1


def test_a_hole_is_filled_before_it_is_written(folder):
    filled = []
    with open_store(folder, discard=False) as store:
        put(store, *"abcd")
        store.delete("b")
        store.trim()
        back = store.engine.back
        store.engine.back = lambda *range_: (filled.append(range_), back(*range_))[1]
        offset = DATA_START + MIB
        put(store, "e", nbytes=MIB // 2)
        assert extent_of(store, "e")[0] == offset
        assert [each[:2] for each in filled] == [(offset, MIB)]  # all of it, for what comes next
        put(store, "f", nbytes=MIB // 2)
        assert extent_of(store, "f")[0] == offset + MIB // 2
        assert len(filled) == 1
        check(store, *"aecdf")
