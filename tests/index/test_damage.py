"""A damaged index: every refusal, and what it leaves alone."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import CorruptionError, StoreMismatch
from spdk_kv.index.database import Index
from spdk_kv.index.records import BlobRecord
from spdk_kv.index.sequences import PieceRecord, SequenceRecord
from spdk_kv.types import KVShape

BLOB = BlobRecord(offset=1 << 20, nbytes=4096, dtype="bfloat16", shape=(2, 1024), crc=0xDEADBEEF)
SEQUENCE = SequenceRecord(
    shape=KVShape(layers=2, kv_heads=4, head_dim=64, dtype="float16", max_tokens=128, batch=3),
    granularity="head",
    chunk_nbytes=65536,
    pieces=(
        PieceRecord((0,), (16,), (1 << 20,)),
        PieceRecord((16, 3), (20, 16), (1 << 25, 1 << 26)),
    ),
    tokens=(5, 0),
    checksums=(b"abcd", b""),
    row_map=b"\0\1\2",
    note=b"of a model",
    pinned=True,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


def table() -> BlobTable[BlobRecord]:
    return BlobTable(BlobRecord, 4096)


def load(path: Path) -> tuple[dict[str, BlobRecord], dict[str, SequenceRecord]]:
    with closing(Index(path)) as index:
        blobs = dict(index.load_blobs())
        assert list(index.take_blobs(table).items()) == list(blobs.items())
        return blobs, dict(index.load_sequences())


def test_a_flipped_byte_anywhere_never_yields_a_wrong_record(path: Path) -> None:
    chance = random.Random(3)
    before = {
        f"doc-{i}": BlobRecord(i << 20, 4096 + i, "float16", (i, 2), i * 7919) for i in range(60)
    }
    with closing(Index(path)) as index:
        index.commit({f"old-{i}": BLOB for i in range(30)} | before, {"s": SEQUENCE})
        index.commit({f"old-{i}": None for i in range(30)}, {})
    good = path.read_bytes()
    places = [*range(100), *(chance.randrange(len(good)) for _ in range(250))]
    refused = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            blobs, sequences = load(path)
        except (CorruptionError, StoreMismatch):
            refused += 1
            continue
        assert blobs.items() <= before.items(), place
        assert sequences in ({}, {"s": SEQUENCE}), place
    assert refused > len(places) // 10


def test_a_key_that_its_look_up_would_miss_is_found_at_open(path: Path) -> None:
    with closing(Index(path)) as index:
        index.commit({"needle": BLOB}, {})
    good = path.read_bytes()
    row, key = (place for place in range(len(good)) if good.startswith(b"needle", place))
    for place in (row, key):  # in the table, and in SQLite's own index of its keys
        path.write_bytes(good[:place] + b"noodle" + good[place + 6 :])
        with pytest.raises(CorruptionError, match=r"index\.sqlite"):
            Index(path)


@pytest.mark.parametrize("damage", ["swapped", "number", "missing", "twice"])
def test_an_index_of_keys_that_is_not_that_of_the_rows_is_found_at_open(
    path: Path, damage: str
) -> None:
    """As SQLite's own check of the whole finds it."""
    keys = [f"key-{number:03}" for number in range(300)]
    with closing(Index(path)) as index:
        index.commit({key: BLOB._replace(crc=number) for number, key in enumerate(keys)}, {})
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        if damage == "swapped":
            content = bytearray(path.read_bytes())
            one, other = (content.rindex(key.encode()) for key in (keys[7], keys[8]))
            content[one : one + 7], content[other : other + 7] = (
                content[other : other + 7],
                content[one : one + 7],
            )
            path.write_bytes(content)
        else:
            (root,) = connection.execute(
                "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_blobs_1'"
            ).fetchone()
            connection.execute("CREATE TABLE other(id INTEGER PRIMARY KEY, key UNIQUE)")
            connection.execute("INSERT INTO other SELECT id, key FROM blobs")
            change = {
                "number": "UPDATE other SET id = 9999 WHERE key = CAST('key-123' AS BLOB)",
                "missing": "DELETE FROM other WHERE key = CAST('key-123' AS BLOB)",
                "twice": "INSERT INTO other SELECT 9999, CAST('key-123a' AS BLOB)",
            }
            connection.execute(change[damage])
            connection.execute(
                "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master "
                "WHERE name = 'sqlite_autoindex_other_1') WHERE name = 'sqlite_autoindex_blobs_1'"
            )
            connection.execute(
                f"UPDATE sqlite_master SET rootpage = {root} "
                "WHERE name = 'sqlite_autoindex_other_1'"
            )
            connection.commit()
    if damage != "swapped":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("DROP TABLE other")
            connection.commit()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA quick_check").fetchone()[0] == "ok"
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] != "ok"
    with pytest.raises(CorruptionError, match=r"out of order|do not agree"):
        Index(path)
    with pytest.raises(CorruptionError, match=r"out of order|do not agree"):
        Index(path, table)


def test_text_that_is_no_utf_8_in_sqlites_own_tables_is_corruption(path: Path) -> None:
    Index(path).close()
    good = path.read_bytes()
    path.write_bytes(good.replace(b"NOT NULL UNIQUE", b"NOT NULL \xdbNIQUE"))
    with pytest.raises(CorruptionError, match=r"index\.sqlite"):
        Index(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage" * 1000, b"SQLite format 3\0" + bytes(4080)],
    ids=["empty", "garbage", "header"],
)
def test_a_file_that_is_no_index_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"index\.sqlite"):
        Index(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE sequences",
        "ALTER TABLE blobs ADD COLUMN more",
        "DELETE FROM meta WHERE name = 'uuid'",
        "UPDATE meta SET value = '5' WHERE name = 'generation'",
        "DELETE FROM meta WHERE name = 'commits'",
        "UPDATE meta SET value = '5' WHERE name = 'commits'",
        "PRAGMA user_version = 0",
    ],
)
def test_a_database_that_was_changed_behind_our_back_is_refused(path: Path, damage: str) -> None:
    Index(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(damage)
        connection.commit()
    with pytest.raises(CorruptionError, match=r"index\.sqlite"):
        Index(path)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE blobs SET key = x'62'",
        "UPDATE blobs SET record = record || x'00'",
        "UPDATE blobs SET record = 'text'",
        "UPDATE blobs SET key = 'text'",
        "INSERT INTO blobs(key, record) SELECT key, record FROM sequences",
    ],
)
def test_an_edited_row_is_corruption_that_names_the_file(path: Path, damage: str) -> None:
    with closing(Index(path)) as index:
        index.commit({"a": BLOB}, {"s": SEQUENCE})
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(damage)
        connection.commit()
    with pytest.raises(CorruptionError, match=r"index\.sqlite"):
        load(path)
    good = path.read_bytes()
    with pytest.raises(CorruptionError, match=r"index\.sqlite"):
        Index(path, table)
    assert path.read_bytes() == good


def test_a_newer_format_is_a_mismatch(path: Path) -> None:
    Index(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(StoreMismatch, match=r"index\.sqlite.*upgrade"):
        Index(path)


def test_a_log_without_its_index_is_refused(path: Path) -> None:
    with closing(Index(path)) as index:
        index.commit({"a": BLOB}, {})
        saved = path.with_suffix(".saved")
        shutil.copy(f"{path}-wal", saved)
    path.unlink()
    saved.rename(f"{path}-wal")
    with pytest.raises(CorruptionError, match="log"):
        Index(path)
    assert not path.exists()


def test_an_interrupted_creation_is_started_over(path: Path) -> None:
    Path(f"{path}.new").write_bytes(b"half")
    Path(f"{path}.new-journal").write_bytes(b"half")
    Path(f"{path}-commits").write_bytes(b"half")
    Index(path).close()
    assert load(path) == ({}, {})
    assert sorted(os.listdir(path.parent)) == ["index.sqlite", "index.sqlite-commits"]
