"""An index that was copied while its owner had it open, put back or opened beside newer data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spdk_kv.errors import StoreLocked, StoreMismatch
from spdk_kv.placement import COUNT_NBYTES, COUNT_OFFSET, lock, pack_count, parse_count
from store.helpers import flip, folder_fixture, open_store, payload, python, reopen, version_of
from support import blockdev
from support.places import TESTS

folder = folder_fixture
UUID = "0123456789abcdef" * 2

_OWNER = """
import os, sys
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
from store.helpers import open_store, payload
from store.test_old_copies import copy_index

folder = Path(sys.argv[1])
store = open_store(folder / "store", capacity="1 MiB", engine=sys.argv[3])
store.put("a", payload("a", 1, 300_000))
store.flush()
copy_index(folder / "store", folder / "copy")
store.delete("a")
store.flush()
store.put("b", payload("b", 2, 900_000))  # over the bytes of "a", for one
if sys.argv[4] == "flush":
    store.flush()
elif sys.argv[4] == "close":
    store.close()
os.kill(os.getpid(), 9)
"""


def copy_index(source: Path, target: Path) -> None:
    """Database, log and count of commits, as `cp` or a backup would."""
    target.mkdir(mode=0o700, exist_ok=True)
    for path in source.glob("index.sqlite*"):
        shutil.copy(path, target)


@pytest.mark.parametrize("engine", ["uring", "threads", "pagecache"])
@pytest.mark.parametrize("end", ["close", "flush", "put"])
def test_an_older_copy_is_refused_whatever_became_of_the_owner(folder, engine, end):
    ran = python(_OWNER, str(folder), str(TESTS), engine, end)
    assert ran.returncode == -9, ran.stderr
    store, newest = folder / "store", folder / "newest"
    copy_index(store, newest)
    for path in store.glob("index.sqlite*"):
        path.unlink()
    copy_index(folder / "copy", store)
    # Without checksums nothing else would keep it from giving out the bytes of "b" as "a".
    for _ in range(2):
        with pytest.raises(StoreMismatch, match="old copy"):
            reopen(store, verify=False)
    for path in store.glob("index.sqlite*"):
        path.unlink()
    copy_index(newest, store)
    with reopen(store) as opened:
        assert "a" not in opened
        if end != "put":
            assert version_of("b", opened.get("b")) == 2


def test_a_copy_that_is_as_new_is_taken_and_the_original_refused_then(folder):
    with open_store(folder / "store") as store:
        store.put("a", payload("a", 1))
        store.flush()
    copy_index(folder / "store", folder / "copy")
    with reopen(folder / "store") as store:
        store.put("a", payload("a", 2))
    copy_index(folder / "store", folder / "newest")
    copy_index(folder / "copy", folder / "store")
    with pytest.raises(StoreMismatch, match="old copy"):
        reopen(folder / "store")
    copy_index(folder / "newest", folder / "store")
    with reopen(folder / "store") as store:
        assert version_of("a", store.get("a")) == 2


@pytest.mark.parametrize("kind", ["file", "block"])
def test_the_data_is_locked_for_who_has_a_copy_of_the_index(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lock, "_COMMANDS_TIMEOUT_S", 0.05)
    with open(tmp_path / "image", "wb") as image:
        image.truncate(24 << 20)
    if kind == "file":
        with open_store(tmp_path / "store") as store:
            store.put("a", payload("a", 1))
            store.flush()
            copy_index(tmp_path / "store", tmp_path / "twin")
            (tmp_path / "twin" / "data").symlink_to(tmp_path / "store" / "data")
            with pytest.raises(StoreLocked, match="elsewhere"):
                reopen(tmp_path / "twin")
            assert version_of("a", store.get("a")) == 1
        return
    with (
        blockdev.loop_device(tmp_path / "image") as node,
        open_store(f"block://{node}", create=True, index_dir=tmp_path / "index") as store,
    ):
        store.put("a", payload("a", 1))
        store.flush()
        copy_index(tmp_path / "index", tmp_path / "twin")
        with pytest.raises(StoreLocked, match="in use"):
            reopen(f"block://{node}", index_dir=tmp_path / "twin")
        assert version_of("a", store.get("a")) == 1


def test_a_store_without_a_count_or_with_a_damaged_one_opens(folder):
    with open_store(folder) as store:
        store.put("a", payload("a", 1))
    with open(folder / "data", "r+b") as data:  # as an older version left it
        data.seek(COUNT_OFFSET)
        data.write(bytes(COUNT_NBYTES))
    with reopen(folder) as store:
        store.put("b", payload("b", 1))
    flip(folder / "data", COUNT_OFFSET + 30)
    with reopen(folder) as store:
        assert [version_of(key, store.get(key)) for key in "ab"] == [1, 1]


def test_a_count_is_of_one_store_and_whole():
    block = pack_count(UUID, 77)
    assert len(block) == COUNT_NBYTES
    assert parse_count(block, UUID) == 77
    assert parse_count(block, UUID[::-1]) == 0
    assert parse_count(bytes(COUNT_NBYTES), UUID) == 0
    for position in (0, 8, 23, 24, 31, 32, 35, 36, COUNT_NBYTES - 1):
        damaged = bytearray(block)
        damaged[position] ^= 1
        assert parse_count(bytes(damaged), UUID) == 0
