"""Commits of any size: bounded transactions, deletions first, and one bad record alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from index.test_database import BLOB, SEQUENCE
from spdk_kv.errors import CapacityError
from spdk_kv.index import IndexFull, batches, commit_in_batches, space
from spdk_kv.index.database import Index
from spdk_kv.index.records import Row


class Watched(Index):
    """An index that notes its transactions, and is full for records after a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.transactions: list[list[Row]] = []
        self.records_left = 1 << 60

    def write(self, rows: Sequence[Row]) -> None:
        records = sum(row.record is not None for row in rows)
        if records > self.records_left:
            raise IndexFull("full")
        super().write(rows)
        self.records_left -= records
        self.transactions.append(list(rows))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Watched]:
    with closing(Watched(tmp_path / "index.sqlite")) as index:
        yield index


def commit(index: Watched, blobs: dict, sequences: dict) -> list[CapacityError]:
    refused: list[CapacityError] = []
    commit_in_batches(index, blobs, sequences, refused)
    return refused


def test_a_small_commit_is_one_transaction(index):
    assert commit(index, {"a": BLOB, "b": None}, {"s": SEQUENCE}) == []
    assert len(index.transactions) == 1
    assert dict(index.load_blobs()) == {"a": BLOB}
    assert dict(index.load_sequences()) == {"s": SEQUENCE}


def test_a_large_commit_goes_in_bounded_transactions_deletions_first(index):
    commit(index, {f"old {i}": BLOB for i in range(6000)}, {})
    index.transactions.clear()
    new = {f"new {i}": BLOB for i in range(6000)}
    changes = new | {f"old {i}": None for i in range(5000)}
    assert commit(index, changes, {"s": SEQUENCE}) == []
    assert changes == {}  # all of it is written
    deleting = [all(row.record is None for row in rows) for rows in index.transactions]
    assert deleting == sorted(deleting, reverse=True)
    assert 4 <= len(deleting) <= 8
    assert max(map(len, index.transactions)) <= batches._BATCH_ROWS
    assert set(dict(index.load_blobs())) == {*new, *(f"old {i}" for i in range(5000, 6000))}
    assert dict(index.load_sequences()) == {"s": SEQUENCE}


def test_large_records_do_not_share_a_transaction(index):
    large = replace(SEQUENCE, row_map=bytes(3 << 20))
    assert commit(index, {}, dict.fromkeys("abc", large)) == []
    assert [len(rows) for rows in index.transactions] == [1, 1, 1]


def test_a_full_filesystem_keeps_no_deletion_back_and_what_was_written_is_known(index):
    commit(index, dict.fromkeys("ab", BLOB), {})
    index.records_left = 300
    changes = {f"new {i}": BLOB for i in range(1000)} | {"a": None}
    with pytest.raises(IndexFull):
        commit(index, changes, {})
    found = dict(index.load_blobs())
    assert "a" not in found
    assert "a" not in changes
    assert "b" in found
    assert {key for key in found if key != "b"} | changes.keys() == {
        f"new {i}" for i in range(1000)
    }
    index.records_left = 1 << 60
    assert commit(index, changes, {}) == []
    assert len(dict(index.load_blobs())) == 1001


@pytest.mark.parametrize("many", [False, True])
def test_a_record_that_cannot_be_held_fails_alone_and_is_named(index, many, monkeypatch):
    commit(index, {"bad": BLOB}, {"long": SEQUENCE})
    monkeypatch.setattr(batches, "_MOST_ROW_NBYTES", 100_000)
    blobs = {"first": BLOB, "bad": BLOB._replace(crc=1 << 40), "last": BLOB}
    blobs |= {str(i): BLOB for i in range(5000 * many)}
    sequences = {"long": replace(SEQUENCE, row_map=bytes(200_000)), "short": SEQUENCE}
    refused = commit(index, blobs, sequences)
    assert [str(error).split("'")[1] for error in refused] == ["bad", "long"]
    # Nor is what was recorded before: the store goes on from there, and may write over it.
    assert {"bad"}.isdisjoint(dict(index.load_blobs()))
    assert {"first", "last"} <= set(dict(index.load_blobs()))
    assert dict(index.load_sequences()) == {"short": SEQUENCE}


def test_memory_that_runs_out_for_one_row_is_that_row_s_failure(index, monkeypatch):
    write = index.write

    def scarce(rows: Sequence[Row]) -> None:
        if sum(len(row.record or b"") for row in rows) > 4 << 20:
            raise MemoryError
        write(rows)

    monkeypatch.setattr(index, "write", scarce)
    large = replace(SEQUENCE, row_map=bytes(5 << 20))
    (refused,) = commit(index, {"a": BLOB}, {"large": large, "small": SEQUENCE})
    assert "'large'" in str(refused)
    assert dict(index.load_blobs()) == {"a": BLOB}
    assert dict(index.load_sequences()) == {"small": SEQUENCE}


def test_records_are_refused_while_the_log_still_has_room_for_deletions(index, monkeypatch):
    commit(index, {f"{i:04}" * 50: BLOB for i in range(1000)}, {})

    class Small:
        f_blocks, f_frsize, f_bavail = 10_000, 4096, 1000

    monkeypatch.setattr(space.os, "statvfs", lambda path: Small)
    with pytest.raises(IndexFull, match="is full"):
        commit(index, {f"new {i:04}" * 50: BLOB for i in range(1000)}, {})
    assert commit(index, {f"{i:04}" * 50: None for i in range(500)}, {}) == []
    assert commit(index, {f"new {i:04}" * 50: BLOB for i in range(100)}, {}) == []  # in their place
    assert len(dict(index.load_blobs())) == 600


def test_a_transaction_has_room_to_be_copied_from_the_log_to_the_byte(index, monkeypatch):
    connection = index._use()
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    commit(index, {f"{i:04}" * 50: BLOB for i in range(1000)}, {})
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    in_log = pages - index.nbytes // 4096
    assert in_log > 51  # of 17 rows with three pages each

    class Small:
        f_blocks, f_frsize, f_bavail = 100_000, 4096, in_log + 51

    monkeypatch.setattr(space.os, "statvfs", lambda path: Small)
    rows = [Row("blobs", b"%d" % i, None) for i in range(17)]
    space.check_space(connection, index.path, rows)
    Small.f_bavail -= 1
    with pytest.raises(IndexFull):
        space.check_space(connection, index.path, rows)
    space.check_space(connection, index.path, rows[:16])  # so few deletions are always tried
