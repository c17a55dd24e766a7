"""An index as it was after one commit, in memory: what a reader of the store looks things up in."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar
from urllib.parse import quote

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import ClosedError
from spdk_kv.index.checks import check_index, load_rows, read_meta, read_number, read_row
from spdk_kv.index.connection import typed_errors
from spdk_kv.index.database import MakeTable
from spdk_kv.index.forks import sqlite_lock
from spdk_kv.index.records import BlobRecord, encode, parse_blob
from spdk_kv.index.sequences import SequenceRecord, parse_sequence

T = TypeVar("T")
Record = TypeVar("Record", BlobRecord, SequenceRecord)

# Offsets in a database's header of the versions that are needed to write and to read it: 2 with a
# log beside it, 1 without one.
_WRITE_VERSION_AT, _READ_VERSION_AT = 18, 19


class IndexSnapshot:
    """The index at ``path`` as the bytes ``image`` have it, its log included. Thread-safe.

    Nothing is read from the disk any more. Raises CorruptionError where it is damaged, and
    StoreMismatch where a newer version of spdk_kv wrote it; ``trusted``: it is a later state of
    one that was found whole, which is not looked for again.
    """

    def __init__(self, path: str, image: bytearray, *, trusted: bool = False) -> None:
        self.path = path
        self._lock = sqlite_lock()
        self._connection: sqlite3.Connection | None = None
        image[_WRITE_VERSION_AT : _READ_VERSION_AT + 1] = b"\1\1"
        with self._lock, typed_errors(path):
            self._connection = connection = _connect(image)
            try:
                self.uuid, self.commits = check_index(connection, whole=not trusted)
                self.generation = read_number(connection, "generation")
            except BaseException:
                connection.close()
                raise

    uuid: str
    commits: int
    """How many commits it has."""
    generation: int
    """The superblock's generation that belongs to it; 0: none was written yet."""

    def get_meta(self, name: str) -> str | None:
        """As :meth:`Index.get_meta`."""
        return self._ask(lambda connection: read_meta(connection, name))

    def blob(self, key: str) -> BlobRecord | None:
        """The blob's record, or None."""
        return self._find("blobs", key, partial(parse_blob, kinds={}))

    def sequence(self, name: str) -> SequenceRecord | None:
        """The sequence's record, or None."""
        return self._find("sequences", name, parse_sequence)

    def blob_keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with ``prefix``, least recently used first."""
        return [key for key, _ in self.load_blobs() if key.startswith(prefix)]

    def sequence_names(self) -> list[str]:
        """The names of all sequences, sorted."""
        return sorted(name for name, _ in self.load_sequences())

    def count_blobs(self) -> int:
        """How many blobs there are."""
        query = "SELECT count(*) FROM blobs"
        return self._ask(lambda connection: int(connection.execute(query).fetchone()[0]))

    def load_blobs(self) -> Iterator[tuple[str, BlobRecord]]:
        """As :meth:`Index.load_blobs`."""
        parse = partial(parse_blob, kinds={})
        return (read_row("blobs", row, parse) for row in self._rows("blobs"))

    def take_blobs(self, make_table: MakeTable) -> BlobTable[BlobRecord]:
        """As :meth:`Index.take_blobs`."""
        found = make_table()
        self._ask(lambda connection: load_rows(connection, found))
        return found

    def load_sequences(self) -> Iterator[tuple[str, SequenceRecord]]:
        """As :meth:`Index.load_sequences`."""
        return (read_row("sequences", row, parse_sequence) for row in self._rows("sequences"))

    def close(self) -> None:
        """Gives its memory back. May be called twice."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _ask(self, query: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock, typed_errors(self.path):
            if self._connection is None:
                raise ClosedError(f"this state of the index {self.path} was given up")
            return query(self._connection)

    def _find(self, table: str, name: str, parse: Callable[[bytes], Record]) -> Record | None:
        key = encode(name)
        query = f"SELECT id, key, record FROM {table} WHERE key = ?"
        row = self._ask(lambda connection: connection.execute(query, (key,)).fetchone())
        return None if row is None else read_row(table, row, parse)[1]

    def _rows(self, table: str) -> list[tuple[int, bytes, bytes]]:
        query = f"SELECT id, key, record FROM {table} ORDER BY id"
        return self._ask(lambda connection: connection.execute(query).fetchall())


def _connect(image: bytearray) -> sqlite3.Connection:
    """A database that is ``image``, in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    deserialize = getattr(connection, "deserialize", None)  # from Python 3.11 on
    if deserialize is None:
        connection.close()
        return connect_file(image)
    try:
        deserialize(image)
        connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_file(image: bytearray) -> sqlite3.Connection:
    """As by :meth:`sqlite3.Connection.deserialize`, for Python 3.10, which lacks it: by way of a
    file in memory that has lost its name before anybody uses it."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    with tempfile.NamedTemporaryFile(prefix="spdk_kv-", dir=folder) as file:
        file.write(image)
        file.flush()
        connection = sqlite3.connect(
            f"file:{quote(file.name)}?mode=ro&immutable=1",
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        try:
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # which opens it
        except BaseException:
            connection.close()
            raise
        return connection
