"""What every use of an index begins with: is it one, of which format, and is it whole."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable, Iterator
from typing import Any

from spdk_kv._native.table import BlobTable, RowReader
from spdk_kv.errors import CorruptionError, StoreMismatch
from spdk_kv.index.records import BlobRecord, Record, decode, meta_crc, read_blobs, unpack

VERSION = 2
# Its rows are all of this one's as well.
OLDEST_VERSION = 1

# The id is the recency: a row that is replaced gets the highest one.
SCHEMA = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE blobs(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, record BLOB NOT NULL)",
    "CREATE TABLE sequences"
    "(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, record BLOB NOT NULL)",
)


def write_meta(connection: sqlite3.Connection, name: str, value: str) -> None:
    """Puts ``value`` under ``name`` into the table meta."""
    # Updated in place: replacing the row would also write to SQLite's index of the names.
    row = (value, meta_crc(name, value), name)
    if not connection.execute("UPDATE meta SET value = ?, crc = ? WHERE name = ?", row).rowcount:
        connection.execute("INSERT INTO meta(value, crc, name) VALUES (?, ?, ?)", row)


def read_meta(connection: sqlite3.Connection, name: str) -> str | None:
    """The text under ``name`` in the table meta, or None; CorruptionError."""
    query = "SELECT value, crc FROM meta WHERE name = ?"
    row = connection.execute(query, (name,)).fetchone()
    if row is None:
        return None
    if row[1] != meta_crc(name, row[0]):
        raise CorruptionError(f"the checksum of meta {name!r} does not match")
    return str(row[0])


def read_number(connection: sqlite3.Connection, name: str) -> int:
    """The number under ``name`` in the table meta; CorruptionError."""
    text = read_meta(connection, name)
    if text is None or not text.isdecimal():
        raise CorruptionError(f"meta {name!r} is {text!r}, not a number")
    return int(text)


def read_row(
    table: str, found: tuple[int, bytes, bytes], parse: Callable[[bytes], Record]
) -> tuple[str, Record]:
    """Name and record of a row (id, key, record) of ``table``; CorruptionError."""
    number, key, row = found
    try:
        record = unpack(table, key, row, parse)
        return decode(key), record
    except (CorruptionError, UnicodeDecodeError) as error:
        raise CorruptionError(f"row {number} of {table}: {error}") from error


def check_index(
    connection: sqlite3.Connection,
    *,
    whole: bool = True,
    blobs: BlobTable[BlobRecord] | None = None,
) -> tuple[str, int]:
    """Checks that the index is of a known format and that all of it is whole, or (``whole`` is
    False) all but the rows of blobs, which nobody reads then. ``blobs``: as for
    :func:`check_whole`. Returns its uuid and its commits."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise StoreMismatch(f"its format is {version}; this spdk_kv knows {VERSION}: upgrade it")
    tables = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if version < OLDEST_VERSION or sorted(sql for (sql,) in tables) != sorted(SCHEMA):
        raise CorruptionError("not an index of spdk_kv, or its tables are damaged")
    connection.execute("PRAGMA cell_size_check = ON")
    if whole:
        check_whole(connection, blobs)
    else:
        _check_integrity(connection, "sequences")
    identity = read_meta(connection, "uuid")
    if identity is None:
        raise CorruptionError("meta 'uuid' is missing")
    read_number(connection, "generation")
    return identity, read_number(connection, "commits")


def check_whole(connection: sqlite3.Connection, blobs: BlobTable[BlobRecord] | None = None) -> None:
    """CorruptionError where the index is damaged. ``blobs``, which has none, gets all of them on
    the way; where they are damaged it is of no use.

    Finds a key whose look-up would miss its row: a deleted key could come back. SQLite looks each
    key up for that, which costs more than all the rest, the more so the larger the index is. So
    the rows of blobs and their keys are each gone through in their own order instead, and compared
    by sums of hashes.
    """
    if sqlite3.sqlite_version_info < (3, 33):
        _check_integrity(connection)
    else:
        _check_integrity(connection, kind="quick_check")  # all pages, but no look-ups
        _check_integrity(connection, "meta")
        _check_integrity(connection, "sequences")
    reader = read_blobs(blobs)
    connection.execute("BEGIN")  # of one state, whoever else writes
    try:
        _read_rows(connection, reader)
        for rows in _batches(connection, _KEYS):
            _checked(reader, reader.check_keys, rows)
    finally:
        connection.execute("ROLLBACK")
    if not reader.agree():
        raise CorruptionError("the rows of blobs and the index of their keys do not agree")


def load_rows(connection: sqlite3.Connection, blobs: BlobTable[BlobRecord]) -> None:
    """Adds all blobs to ``blobs``, which has none, least recently used first. CorruptionError, and
    it is of no use, where one is damaged."""
    _read_rows(connection, read_blobs(blobs))


def _read_rows(connection: sqlite3.Connection, reader: RowReader) -> None:
    for rows in _batches(connection, "SELECT id, key, record FROM blobs ORDER BY id"):
        _checked(reader, reader.add, rows)


# SQLite's name of what UNIQUE makes. Were there no such index, or could it not serve, that would be
# an error, not a look at the rows instead.
_KEYS = "SELECT key, id FROM blobs INDEXED BY sqlite_autoindex_blobs_1 ORDER BY key"
_ROWS = 2000


def _batches(connection: sqlite3.Connection, query: str) -> Iterator[list[Any]]:
    cursor = connection.execute(query)
    try:
        while rows := cursor.fetchmany(_ROWS):
            yield rows
    finally:
        cursor.close()


def _checked(reader: RowReader, take: Callable[[list[Any]], None], rows: list[Any]) -> None:
    try:
        take(rows)
    except (struct.error, TypeError, ValueError, IndexError, OverflowError) as error:
        raise CorruptionError(f"row {reader.row} of blobs: {error}") from error


def _check_integrity(
    connection: sqlite3.Connection, table: str = "", kind: str = "integrity_check"
) -> None:
    pragma = f"PRAGMA {kind}(1)"
    if table and sqlite3.sqlite_version_info >= (3, 33):
        pragma = f"PRAGMA {kind}({table})"
    verdict = connection.execute(pragma).fetchone()[0]
    if verdict != "ok":
        raise CorruptionError(verdict)
