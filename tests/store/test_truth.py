"""A get gives the exact bytes or a typed error: damage, foreign and old files, kills."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from spdk_kv.errors import (
    CapacityError,
    CorruptionError,
    KeyNotFound,
    SpdkKvError,
    StoreLocked,
    StoreMismatch,
)
from spdk_kv.index import creation
from spdk_kv.index.database import Index
from spdk_kv.placement import lock
from spdk_kv.placement.superblock import COPY_OFFSETS
from spdk_kv.store import parts
from store.helpers import (
    assert_same,
    check_books,
    extent_of,
    flip,
    folder_fixture,
    kill_loop,
    noise,
    open_store,
    payload,
    reopen,
    sha256,
    version_of,
)
from support.places import TESTS
from support.rounds import rounds
from support.waiting import PATIENCE_S

folder = folder_fixture


def filled(folder: Path, **options) -> Path:
    """A closed store with three blobs, ``a``, ``b`` and ``c``."""
    with open_store(folder, **options) as store:
        store.put_many({key: payload(key, 1, 70_000) for key in "abc"})
    return folder


def copy_of(source: Path, target: Path) -> None:
    # cp keeps the holes, of which a data file is nearly all.
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)


# -- damaged data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["get", "get_many", "get_async", "out", "numpy", "mmap"])
def test_a_flipped_bit_is_found_counted_and_forgotten(folder, how):
    engine = "pagecache" if how == "mmap" else None
    with open_store(folder, engine=engine, mmap=how == "mmap") as store:
        store.put_many({key: payload(key, 1, 70_000) for key in "abc"})
        offset, nbytes = extent_of(store, "b")
        flip(folder / "data", offset + nbytes - 1, 0x80)
        with pytest.raises(CorruptionError, match=r"'b'.*CRC32C"):
            {
                "get": lambda: store.get("b"),
                "get_many": lambda: store.get_many("abc"),
                "get_async": lambda: store.get_async("b").result(PATIENCE_S),
                "out": lambda: store.get("b", out=torch.empty(70_000, dtype=torch.uint8)),
                "numpy": lambda: store.get("b", as_numpy=True),
                "mmap": lambda: store.get("b"),
            }[how]()
        assert store.stats()["corruptions"] == 1
        with pytest.raises(KeyNotFound):
            store.get("b")
        for key in "ac":
            assert version_of(key, store.get(key)) == 1
        store.put("b", payload("b", 2, 70_000))
        assert version_of("b", store.get("b")) == 2
        check_books(store)
    with reopen(folder) as store:
        assert [version_of(key, store.get(key)) for key in "abc"] == [1, 2, 1]


def test_a_damaged_blob_that_was_replaced_meanwhile_stays(folder):
    with open_store(folder) as store:
        store.put("a", payload("a", 1))
        (old,) = store.catalog.records.find(["a"])
        store.put("a", payload("a", 2))
        store.catalog.records.drop_damaged("a", old)
        store.catalog.records.unpin([old])
        assert version_of("a", store.get("a")) == 2
        assert store.stats()["corruptions"] == 0


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
@pytest.mark.parametrize("cut", [1, 60_000, 70_000])
def test_a_truncated_data_file_is_noticed_whatever_is_checked(folder, engine, cut):
    # Without checksums too: the count of bytes that came is always checked.
    with open_store(folder, engine=engine, verify=False) as store:
        store.put_many({key: payload(key, 1, 70_000) for key in "abc"})
        offset, nbytes = max(extent_of(store, key) for key in "abc")
        (last,) = [key for key in "abc" if extent_of(store, key)[0] == offset]
        os.truncate(folder / "data", offset + nbytes - cut)
        with pytest.raises(CorruptionError, match="truncated"):
            store.get(last)
        assert not store.contains(last)
        assert store.stats()["corruptions"] == 1
        for key in set("abc") - {last}:
            assert version_of(key, store.get(key)) == 1
        store.put(last, payload(last, 2, 70_000))  # grows the file again
        assert version_of(last, store.get(last)) == 2
        check_books(store)


def test_a_truncated_data_file_is_noticed_after_a_reopening(folder):
    filled(folder)
    os.truncate(folder / "data", (1 << 20) + 100_000)
    with reopen(folder) as store:
        for key in "abc":
            try:
                assert version_of(key, store.get(key)) == 1
            except CorruptionError:
                assert key not in store
        assert len(store) == 1
        check_books(store)


# -- foreign and old files ------------------------------------------------------------------------


def test_another_store_s_data_is_refused(folder):
    mine, other = filled(folder / "mine"), filled(folder / "other")
    shutil.copy(mine / "data", folder / "kept")
    shutil.copy(other / "data", mine / "data")
    before = sha256(mine / "data")
    with pytest.raises(StoreMismatch, match="the data is that of store"):
        reopen(mine)
    assert sha256(mine / "data") == before
    shutil.copy(folder / "kept", mine / "data")
    with reopen(mine) as store:
        assert [version_of(key, store.get(key)) for key in "abc"] == [1, 1, 1]


@pytest.mark.parametrize("reopenings", [1, 2, 3])
def test_an_old_copy_of_the_data_is_refused(folder, reopenings):
    store = filled(folder / "store")
    copy_of(store / "data", folder / "old")
    for version in range(reopenings):
        with reopen(store) as opened:
            opened.put("a", payload("a", 2 + version, 70_000))
    copy_of(store / "data", folder / "new")
    copy_of(folder / "old", store / "data")
    with pytest.raises(StoreMismatch, match="old copy"):
        reopen(store)
    copy_of(folder / "new", store / "data")
    with reopen(store) as opened:
        assert version_of("a", opened.get("a")) == 1 + reopenings


@pytest.mark.parametrize("with_count", [False, True])
def test_an_old_copy_of_the_index_is_refused(folder, with_count):
    store = filled(folder / "store")
    names = ["index.sqlite", *(["index.sqlite-commits"] if with_count else [])]
    for name in names:
        shutil.copy(store / name, folder / name)
    with reopen(store) as opened:
        opened.put("a", payload("a", 2, 70_000))
    for name in names:
        shutil.copy(folder / name, store / name)
    # Its own count of commits tells, and where that is old too, the data's generation.
    with pytest.raises((StoreMismatch, CorruptionError), match="old copy"):
        reopen(store)


def test_a_wiped_data_file_is_refused(folder):
    store = filled(folder / "store")
    (store / "data").unlink()
    for _ in range(2):  # the refusal makes no store there either
        with pytest.raises(StoreMismatch, match="replaced or wiped"):
            open_store(store)


def test_a_missing_index_is_refused_and_the_data_kept(folder):
    store = filled(folder / "store")
    (store / "index.sqlite").unlink()
    before = sha256(store / "data")
    with pytest.raises(SpdkKvError, match="index"):
        open_store(store)
    assert not (store / "index.sqlite").exists()
    assert sha256(store / "data") == before


def test_a_corrupt_index_is_refused_and_left_as_it_is(folder):
    store = filled(folder / "store")
    index = store / "index.sqlite"
    with open(index, "r+b") as file:
        file.seek(4096)  # past the head: still an SQLite file
        file.write(os.urandom(index.stat().st_size - 4096))
    before = sha256(index), sha256(store / "data")
    with pytest.raises(CorruptionError):
        reopen(store)
    assert (sha256(index), sha256(store / "data")) == before


def test_crashes_amid_opening_one_after_another_are_no_old_copies(folder, monkeypatch):
    store = filled(folder / "store")

    def crash(*_):
        raise SystemExit

    # The data has the next generation, the index not yet.
    with monkeypatch.context() as patch:
        patch.setattr(Index, "generation", property(Index.generation.fget, crash))
        with pytest.raises(SystemExit):
            reopen(store)
    # Then the index says that another is meant, and the data does not get it.
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_superblock", crash)
        with pytest.raises(SystemExit):
            reopen(store)
    with reopen(store) as opened:
        assert [version_of(key, opened.get(key)) for key in "abc"] == [1, 1, 1]


def test_an_index_has_its_log_from_the_beginning(folder):
    # Were it turned on at the first open, a kill amid that would leave a rollback journal, which
    # the connection that checks the index, and may not write, could never play back.
    creation.create_index(str(folder / "index.sqlite"))
    assert (folder / "index.sqlite").read_bytes()[18:20] == b"\2\2"


def test_commands_of_a_killed_process_are_waited_for(folder, monkeypatch):
    filled(folder)
    # As a ring that outlives its process: something holds the data's open file, and its lock.
    descriptor = os.open(folder / "data", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_COMMANDS_TIMEOUT_S", 0.1)
        with pytest.raises(StoreLocked, match="killed"):
            reopen(folder)
    timer = threading.Timer(0.4, os.close, [descriptor])
    started = time.monotonic()
    timer.start()
    with reopen(folder) as store:
        assert time.monotonic() - started >= 0.4
        assert version_of("a", store.get("a")) == 1
    reopen(folder).close()


# -- the superblock -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", COPY_OFFSETS)
def test_one_bad_superblock_is_enough_and_is_mended(folder, bad):
    store = filled(folder / "store")
    flip(store / "data", bad + 40)
    with reopen(store) as opened:
        assert version_of("a", opened.get("a")) == 1
    other = COPY_OFFSETS[1 - COPY_OFFSETS.index(bad)]
    flip(store / "data", other + 40)
    with reopen(store) as opened:
        assert version_of("a", opened.get("a")) == 1


def test_two_bad_superblocks_are_refused_and_not_written_over(folder):
    store = filled(folder / "store")
    for offset in COPY_OFFSETS:
        flip(store / "data", offset + 40)
    before = sha256(store / "data")
    with pytest.raises(CorruptionError, match="superblock"):
        reopen(store)
    with pytest.raises(CorruptionError, match="superblock"):
        open_store(store, create=True)
    assert sha256(store / "data") == before


# -- capacity at reopening ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4])  # 4: the store is full
def test_a_smaller_capacity_that_would_cut_blobs_off_changes_nothing(folder, count):
    with open_store(folder, capacity="4 MiB") as store:
        for i in range(count):
            store.put(str(i), payload(str(i), 1, 1 << 20))
    before = sha256(folder / "data")
    with pytest.raises(CapacityError, match="cut it off"):
        open_store(folder, capacity="1 MiB")
    assert sha256(folder / "data") == before
    with reopen(folder) as store:
        assert store.stats()["capacity_nbytes"] == 4 << 20
        for i in range(count):
            assert version_of(str(i), store.get(str(i))) == 1
    with open_store(folder, capacity="8 MiB") as store:
        assert store.stats()["capacity_nbytes"] == 8 << 20


def test_create_false_begins_nothing(folder):
    with pytest.raises(StoreMismatch, match="create=False"):
        open_store(folder / "none", create=False)
    assert not (folder / "none").exists()
    filled(folder / "some")
    with reopen(folder / "some", create=False) as store:
        assert len(store) == 3


# -- processes ------------------------------------------------------------------------------------

_RIVAL = """
import sys
sys.path[:0] = sys.argv[2:]
from store.helpers import open_store
from spdk_kv.errors import StoreLocked
try:
    open_store(sys.argv[1])
except StoreLocked as locked:
    print(locked.pid)
"""


def test_a_second_process_is_refused_by_pid_and_the_first_is_unharmed(folder):
    with open_store(folder) as store:
        store.put("a", payload("a", 1))
        command = [sys.executable, "-c", _RIVAL, str(folder), str(TESTS)]
        rival = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert rival.stdout.strip() == str(os.getpid()), rival.stderr
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}") as locked:
            open_store(folder)
        assert locked.value.pid == os.getpid()
        store.put("b", payload("b", 1))
        store.flush()
        assert version_of("a", store.get("a")) == version_of("b", store.get("b")) == 1


def test_reopening_finds_everything_that_was_put(folder):
    tensors = {f"key {i}": noise(i * 1000, i) for i in range(50)}
    with open_store(folder) as store:
        store.put_many(tensors)
        futures = [store.put_async(f"async {i}", noise(100_000, i)) for i in range(20)]
        # Closed with puts under way: it waits for them.
    assert all(future.exception() is None for future in futures)
    with reopen(folder) as store:
        assert len(store) == 70
        for key, tensor in tensors.items():
            assert_same(store.get(key), tensor)
        for i in range(20):
            assert_same(store.get(f"async {i}"), noise(100_000, i))
        check_books(store)


def test_what_was_flushed_in_the_background_survives(folder):
    script = f"""
import os, sys, time
sys.path[:0] = {[str(TESTS)]!r}
from store.helpers import open_store, payload
store = open_store({str(folder)!r}, flush_interval_s=0.05)
store.put("a", payload("a", 1))
while store.dirty:
    time.sleep(0.01)
with store.catalog.committer.lock:  # what was taken up is committed
    pass
os.kill(os.getpid(), 9)
"""
    ran = subprocess.run([sys.executable, "-c", script], timeout=PATIENCE_S)
    assert ran.returncode == -signal.SIGKILL
    with reopen(folder) as store:
        assert version_of("a", store.get("a")) == 1


def test_kills_leave_old_or_new_values_and_all_that_was_flushed(folder):
    kills = rounds(30, 200)
    counts = kill_loop(folder, kills, "blobs", 1)
    assert counts["killed"] == kills


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["blobs", "sequences", "forks", "evicted"])
def test_thousands_of_kills(folder, what):
    counts = kill_loop(folder, 5000, what, 2)
    assert counts["killed"] == 5000
