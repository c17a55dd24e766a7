"""The summary of an index: the same blobs in the same order as its rows, or none."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import CorruptionError, DeviceError
from spdk_kv.index import BlobRecord, Index, database, summary
from spdk_kv.index.summary import summary_path
from support.interrupts import interrupted_everywhere

KEYS = ["a", "b", "", "\ud800", "key " * 300]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(summary, "_SECTION_NBYTES", 50)
    return tmp_path / "index.sqlite"


def record(number: int) -> BlobRecord:
    nbytes = 100 * (number % 3)
    offset = (1 << 20) + 4096 * number if nbytes else 0
    return BlobRecord(offset, nbytes, "uint8", (nbytes,), number)


def table_of(blobs: dict[str, BlobRecord]) -> BlobTable[BlobRecord]:
    table = BlobTable(BlobRecord, 4096)
    for key, each in blobs.items():
        table.put(key, each)
    return table


def save(index: Index, blobs: dict[str, BlobRecord]) -> None:
    table = table_of(blobs)
    index.save_summary(table, table.changes)


def loaded(index: Index) -> dict[str, BlobRecord] | None:
    """What its summary has."""
    table = BlobTable(BlobRecord, 4096)
    return dict(table.items()) if index.load_summary(table) else None


@pytest.fixture
def blobs() -> dict[str, BlobRecord]:
    return {key: record(number) for number, key in enumerate(KEYS)}


@pytest.fixture
def saved(path: Path, blobs: dict[str, BlobRecord]) -> Iterator[Path]:
    """An index that was closed with a summary, in another order than that of its rows."""
    with closing(Index(path)) as index:
        index.commit(dict(reversed(blobs.items())), {})
        save(index, blobs)
    return path


def test_a_summary_has_the_blobs_in_the_order_of_use(saved, blobs) -> None:
    with closing(Index(saved)) as index:
        found = loaded(index)
        assert found == blobs
        assert list(found) == list(blobs)
        assert list(dict(index.load_blobs())) == list(blobs)[::-1]


def test_without_one_and_of_an_empty_table_there_is_none(path) -> None:
    with closing(Index(path)) as index:
        assert loaded(index) is None
        save(index, {})
    assert not Path(summary_path(str(path))).exists()
    with closing(Index(path)) as index:
        assert loaded(index) is None


@pytest.fixture
def no_room_for_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "append_changes", lambda *_: None)


def test_changes_of_blobs_are_appended(saved, blobs) -> None:
    for key, change in {"a": None, "new": record(8), "b": record(7), "c": None}.items():
        with closing(Index(saved)) as index:
            index.set_meta("other", "value")
            index.generation += 1
            index.commit({key: change, "twice": record(4)}, {"s": None})
            assert index.has_summary
        blobs = {name: each for name, each in blobs.items() if name not in (key, "twice")}
        blobs |= {key: change} if change else {}
        blobs["twice"] = record(4)
        with closing(Index(saved)) as index:
            found = loaded(index)
            assert found == blobs == dict(index.load_blobs())
            assert list(found or ()) == list(blobs)


def test_the_table_of_changed_blobs_is_whole(saved, blobs) -> None:
    with closing(Index(saved)) as index:
        index.commit({"a": None, "b": record(7), "new": record(8)}, {})
        index.commit({"new": record(10), "b": None, "key " * 300: record(13)}, {})
    with closing(Index(saved)) as index:
        table = BlobTable(BlobRecord, 4096)
        assert index.load_summary(table)
        rows = dict(index.load_blobs())
    assert dict(table.items()) == rows
    assert table.footprint_nbytes == sum(4096 for each in rows.values() if each.nbytes)
    for key, each in rows.items():
        assert not each.nbytes or table.key_at(each.offset) == key
        assert table.pop(key) == each
    assert (len(table), table.footprint_nbytes) == (0, 0)


def test_what_is_appended_counts_only_if_its_transaction_does(saved, blobs, monkeypatch) -> None:
    append = database.append_changes

    def failing(*arguments: Any) -> None:
        append(*arguments)
        raise DeviceError("as if the disk failed")

    with closing(Index(saved)) as index:
        index.commit({"b": record(5)}, {})
        with monkeypatch.context() as patched:
            patched.setattr(database, "append_changes", failing)
            with pytest.raises(DeviceError):
                index.commit({"a": None}, {})
    expected = {**blobs, "b": record(5)}
    with closing(Index(saved)) as index:
        assert loaded(index) == expected
        index.commit({"": None}, {})
    del expected[""]
    with closing(Index(saved)) as index:
        assert loaded(index) == expected == dict(index.load_blobs())


def test_changes_that_another_copy_of_the_index_appended_are_passed_by(saved, blobs) -> None:
    """Both go on from the same summary, in one file."""
    names = [str(saved), f"{saved}-commits"]
    copies = [Path(name).read_bytes() for name in names]
    with closing(Index(saved)) as index:
        index.commit({"a": record(5)}, {})
    newest = [Path(name).read_bytes() for name in names]
    for name, content in zip(names, copies, strict=True):
        Path(name).write_bytes(content)
    with closing(Index(saved)) as index:
        assert loaded(index) == blobs
        index.commit({"a": record(8)}, {})
    for name, content in zip(names, newest, strict=True):
        Path(name).write_bytes(content)
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        assert index.take_blobs(lambda: BlobTable(BlobRecord, 4096))["a"] == record(5)
        assert not index.has_summary
        index.set_meta("other", "value")
        assert not index.has_summary


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_changes_are_passed_by(saved, blobs, damage) -> None:
    file = Path(summary_path(str(saved)))
    begin = file.stat().st_size
    with closing(Index(saved)) as index:
        index.commit({"a": None, "new": record(8)}, {})
        expected = dict(index.load_blobs())
    good = file.read_bytes()
    for place in range(begin, len(good), 5):
        flipped = good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :]
        file.write_bytes(flipped if damage == "flip" else good[:place])
        with closing(Index(saved)) as index:
            assert loaded(index) is None
            assert dict(index.take_blobs(lambda: BlobTable(BlobRecord, 4096)).items()) == expected
        # So that the next round has its note again, which ends as the rows are read.
    file.write_bytes(good)
    with closing(Index(saved)) as index:
        assert loaded(index) == expected


def test_changes_take_no_more_than_is_left_for_them(saved, blobs, monkeypatch) -> None:
    monkeypatch.setattr(summary, "_LEAST_CHANGES_NBYTES", 0)
    with closing(Index(saved)) as index:
        save(index, blobs)
    file = Path(summary_path(str(saved)))
    nbytes = file.stat().st_size
    for number in range(100):
        with closing(Index(saved)) as index:
            index.commit({"a": record(number)}, {})
            if not index.has_summary:
                break
            assert loaded(index) == {**blobs, "a": record(number)}
    assert number > 3
    assert 1.8 * nbytes < file.stat().st_size <= 2 * nbytes
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        save(index, blobs)
        assert file.stat().st_size == nbytes


def test_a_full_disk_ends_it_and_fails_no_commit(saved, blobs, monkeypatch, caplog) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "as if it were full")

    monkeypatch.setattr(os, "pwrite", full)
    with closing(Index(saved)) as index:
        index.commit({"a": record(8)}, {})
        assert not index.has_summary
    assert "full" in caplog.text
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        assert dict(index.load_blobs()) == {**blobs, "a": record(8)}


def test_a_change_without_them_ends_it_and_nothing_else_does(
    saved, blobs, no_room_for_changes
) -> None:
    with closing(Index(saved)) as index:
        index.set_meta("other", "value")
        index.generation = 7
        index.touch_order(["a"])
    with closing(Index(saved)) as index:
        assert loaded(index) == blobs
        index.commit({"a": None}, {})
        assert not index.has_summary
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        index.set_meta("other", "again")  # which does not bring it back
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        assert "a" not in dict(index.load_blobs())


def test_one_of_another_state_is_passed_by(saved, blobs) -> None:
    file = Path(summary_path(str(saved)))
    former = file.read_bytes()
    with closing(Index(saved)) as index:
        index.commit({"new": record(9)}, {})
        save(index, {**blobs, "new": record(9)})
    file.write_bytes(former)
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        assert dict(index.load_blobs()) == {**blobs, "new": record(9)}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_one_is_passed_by(saved, blobs, damage) -> None:
    file = Path(summary_path(str(saved)))
    good = file.read_bytes()
    places = range(0, len(good), 7) if damage in ("flip", "cut") else [0]
    for place in places:
        if damage == "flip":
            file.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        elif damage == "gone":
            file.unlink()
        else:
            file.write_bytes({"cut": good[:place], "empty": b""}[damage])
        table = BlobTable(BlobRecord, 4096)
        with closing(Index(saved)) as index:
            assert not index.load_summary(table), place
            assert dict(index.load_blobs()) == blobs


def test_blobs_that_change_meanwhile_are_not_summed_up(saved, blobs, monkeypatch) -> None:
    table = table_of(blobs)
    with closing(Index(saved)) as index:
        with pytest.raises(RuntimeError, match="changed"):
            index.save_summary(table, table.changes - 1)
        real = summary._write_all

        def changing(out, part) -> None:
            real(out, part)
            table.use(["a"])

        monkeypatch.setattr(summary, "_write_all", changing)
        with pytest.raises(RuntimeError, match="changed"):
            index.save_summary(table, table.changes)
    assert sorted(os.listdir(saved.parent)) == [
        "index.sqlite",
        "index.sqlite-blobs",
        "index.sqlite-commits",
    ]
    with closing(Index(saved)) as index:
        assert loaded(index) == blobs  # the one before


def test_an_interrupt_anywhere_leaves_a_whole_one_or_none(path, blobs) -> None:
    expected: list[dict[str, BlobRecord]] = [{}]

    def prepare(at: int) -> None:
        expected[0] = blobs | {f"{at}": record(3 * at + 1)}
        with closing(Index(path)) as index:
            index.commit(dict.fromkeys(dict(index.load_blobs())) | expected[0], {})

    def change(at: int) -> None:
        index = Index(path)
        try:
            save(index, expected[0])
        finally:
            index.close()

    def check(at: int) -> None:
        with closing(Index(path)) as index:
            assert loaded(index) in (None, expected[0])
            assert dict(index.load_blobs()) == expected[0]

    assert interrupted_everywhere(prepare, change, check, 3) > 30


def test_rows_that_the_store_does_not_know_prevent_it(saved, blobs) -> None:
    with closing(Index(saved)) as index:
        index.commit({"new": record(9)}, {})
        save(index, blobs)
    with closing(Index(saved)) as index:
        assert loaded(index) is None
        assert dict(index.load_blobs()) == {**blobs, "new": record(9)}


def test_a_full_filesystem_gets_none(saved, blobs, monkeypatch) -> None:
    space = SimpleNamespace(f_blocks=100, f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(os, "fstatvfs", lambda file: space)
    with closing(Index(saved)) as index:
        index.commit({"a": None}, {})
        save(index, {key: blobs[key] for key in KEYS if key != "a"})
        assert not Path(f"{summary_path(str(saved))}.new").exists()
    with closing(Index(saved)) as index:
        assert loaded(index) is None


def test_it_is_for_its_owner_only(path, blobs) -> None:
    before = os.umask(0)
    try:
        with closing(Index(path)) as index:
            index.commit(blobs, {})
            save(index, blobs)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(summary_path(str(path))).st_mode) == 0o600


def test_rows_that_are_read_after_all_are_checked_as_a_whole(saved, blobs) -> None:
    """A key whose look-up misses its row: nobody looks at the rows while a summary has them."""
    with closing(sqlite3.connect(saved)) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_blobs_1'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(saved.read_bytes())
    place = content.index(b"b", (root - 1) * size + size // 2)
    content[place] = ord("c")
    saved.write_bytes(content)
    with closing(Index(saved)) as index:
        assert loaded(index) == blobs
    Path(summary_path(str(saved))).unlink()
    with pytest.raises(CorruptionError):
        Index(saved)
