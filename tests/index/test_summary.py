"""The summary of an index: the same blobs in the same order as its rows, or none."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import CorruptionError
from spdk_kv.index import BlobRecord, Index, summary
from spdk_kv.index.summary import summary_path
from support.interrupts import interrupted_everywhere

KEYS = ["a", "b", "", "\ud800", "key " * 300]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(summary, "LEAST_BLOBS", 1)
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


def test_a_change_of_blobs_ends_it_and_nothing_else_does(saved, blobs) -> None:
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


@pytest.mark.parametrize("damage", ["flip", "cut", "more", "gone", "empty"])
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
            file.write_bytes({"cut": good[:place], "more": good + b"x", "empty": b""}[damage])
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
