"""The index file: records by key in SQLite, committed after the data."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import (
    ClosedError,
    CorruptionError,
    file_error,
)
from spdk_kv.index import descriptors
from spdk_kv.index.changes import pack_changes
from spdk_kv.index.checks import (
    check_index,
    check_whole,
    read_meta,
    read_number,
    read_row,
    write_meta,
)
from spdk_kv.index.commits import CommitCount
from spdk_kv.index.connection import connect, make_durable, typed_errors
from spdk_kv.index.creation import count_path, create_index
from spdk_kv.index.forks import sqlite_lock
from spdk_kv.index.records import (
    BlobRecord,
    Record,
    Row,
    encode,
    pack,
    parse_blob,
    unpack,
)
from spdk_kv.index.sequences import SequenceRecord, parse_sequence
from spdk_kv.index.space import IndexFull, check_space, file_nbytes
from spdk_kv.index.summary import (
    SUMMARY,
    Note,
    append_changes,
    has_summary,
    open_summary,
    read_summary,
    summary_path,
    write_summary,
)

log = logging.getLogger(__name__)

MakeTable = Callable[[], BlobTable[BlobRecord]]


class Index:
    """The index of one store, in the SQLite file at ``path``; created where there is none.

    Every call may block on the disk, changing ones until the change is on the medium. Errors:
    CorruptionError (damaged, or older than it was; the file and its log are left as they are),
    StoreMismatch (a newer format), StoreLocked (another program holds the file), CapacityError
    (disk full), DeviceError, ClosedError (closed, or after fork). Thread-safe.

    ``make_table``: of an empty table, for :meth:`take_blobs`.
    """

    def __init__(self, path: str | os.PathLike[str], make_table: MakeTable | None = None) -> None:
        self.path = os.path.abspath(os.fsdecode(path))
        self._make_table = make_table
        # All blobs, where their rows were read to check the index.
        self._found: BlobTable[BlobRecord] | None = None
        self._lock = sqlite_lock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        if not os.path.exists(self.path):
            create_index(self.path)
        # None where the rows are read, and so all of the index is checked.
        self._summary: Note | None = None
        self._summary_file = -1  # for what changes
        self._locked: descriptors.Identity | None = _locks_taken(self.path)
        try:
            self._open()
        except BaseException:
            self._locks_dropped()
            raise

    def _open(self) -> None:
        # A refused index must stay as it is, but the last writable connection moves even a damaged
        # log into the file when it closes. So the checks use a read-only connection.
        with typed_errors(self.path), closing(connect(self.path, "ro")) as reader:
            whole = not self._find_summary(reader)
            if whole and self._make_table is not None:
                self._found = self._make_table()
            self.uuid, self.commits = check_index(reader, whole=whole, blobs=self._found)
            self._count = CommitCount(count_path(self.path), self.uuid, self.commits)
            try:
                self._connection = connect(self.path, "rw")
                make_durable(self._connection)
            except BaseException:
                if self._connection is not None:
                    self._connection.close()
                self._count.close()
                raise

    def _find_summary(self, reader: sqlite3.Connection) -> bool:
        try:
            noted, note = _noted(reader)
            if note and noted == read_number(reader, "commits") and has_summary(self.path, note):
                self._summary = note
        except (CorruptionError, UnicodeDecodeError, sqlite3.Error):
            pass  # of which the check of the whole says more
        return self._summary is not None

    uuid: str
    """Identity of the store, drawn when the index was created: 32 hexadecimal digits."""
    commits: int
    """How many commits are on the medium; one less than that after an interrupt (Ctrl-C)."""

    @property
    def generation(self) -> int:
        """The superblock's generation that belongs to it; 0 when new. Setting it commits."""
        with self._lock, typed_errors(self.path):
            return read_number(self._use(), "generation")

    @generation.setter
    def generation(self, value: int) -> None:
        self.set_meta("generation", str(value))

    def get_meta(self, name: str) -> str | None:
        """The text stored under ``name``, or None."""
        with self._lock, typed_errors(self.path):
            return read_meta(self._use(), name)

    def set_meta(self, name: str, value: str) -> None:
        """Stores ``value`` under ``name``; it is on the medium on return."""
        with self._transaction() as connection:
            write_meta(connection, name, value)

    def load_summary(self, blobs: BlobTable[BlobRecord]) -> bool:
        """Adds all blobs to ``blobs``, which has none, without reading their rows. False where that
        cannot be: ``blobs`` is of no use then, and :meth:`load_blobs` has them."""
        note = self._summary
        return note is not None and read_summary(self.path, self.uuid, note, blobs)

    def take_blobs(self, make_table: MakeTable) -> BlobTable[BlobRecord]:
        """All blobs in a new table, least recently used first. Before any commit."""
        found, self._found = self._found, None
        if found is not None:
            return found
        found = make_table()
        if not self.load_summary(found):
            found = make_table()
            with self._lock, typed_errors(self.path):
                check_whole(self._use(), found)
                self._end_changes()
        return found

    @property
    def has_summary(self) -> bool:
        """Whether the next open finds the rows of blobs in a summary."""
        return self._summary is not None

    def save_summary(self, blobs: BlobTable[BlobRecord], changes: int) -> None:
        """Writes down ``blobs``, which after so many ``changes`` are those of all rows, for
        :meth:`load_summary`. RuntimeError where they have changed since; OSError, or as any call.

        None is written where there are not as many rows: a deletion missed its row in a damaged
        index, say, which who reads the rows finds out.
        """
        with self._lock, typed_errors(self.path):
            (rows,) = self._use().execute("SELECT count(*) FROM blobs").fetchone()
            self._end_changes()
        if rows != len(blobs):
            log.warning("index %s has %d blobs, not %d", self.path, rows, len(blobs))
            with self._transaction():  # after which there is no summary any more
                pass
            return
        note = write_summary(self.path, self.uuid, blobs, changes)
        if note is not None:
            with self._transaction(summary=note):
                pass

    def load_blobs(self) -> Iterator[tuple[str, BlobRecord]]:
        """All blobs, least recently used first. Exhaust it before committing."""
        if self._summary:
            with self._lock, typed_errors(self.path):
                check_whole(self._use())
                self._end_changes()
        return self._load("blobs", partial(parse_blob, kinds={}))

    def load_sequences(self) -> Iterator[tuple[str, SequenceRecord]]:
        """All sequences, least recently committed first. Exhaust it before committing."""
        return self._load("sequences", parse_sequence)

    def load_sequence(self, name: str) -> SequenceRecord | None:
        """One sequence, or None."""
        key = encode(name)
        with self._lock, typed_errors(self.path):
            query = "SELECT record FROM sequences WHERE key = ?"
            row = self._use().execute(query, (key,)).fetchone()
        return None if row is None else unpack("sequences", key, row[0], parse_sequence)

    def commit(
        self,
        blobs: Mapping[str, BlobRecord | None],
        sequences: Mapping[str, SequenceRecord | None],
    ) -> None:
        """Stores (or deletes, where None) all of these, or none on any error.

        Blocks until they are on the medium. A key that is stored becomes the most recently used.
        ValueError where a field is out of range.
        """
        changed: list[Row] = []
        tables: list[tuple[str, Mapping[str, Any]]] = [("blobs", blobs), ("sequences", sequences)]
        for table, records in tables:
            for name, record in records.items():
                key = encode(name)
                packed = None if record is None else pack(table, key, record)
                changed.append(Row(table, key, packed))
        self.write(changed)

    def write(self, rows: Sequence[Row]) -> None:
        """As :meth:`commit`, of packed records. IndexFull where the filesystem has no room for
        them; rows that delete need none."""
        try:
            self._write(rows)
        except IndexFull:
            # What the log holds, once it is in the file, is space for the next.
            self._empty_log()
            self._write(rows)

    def _write(self, rows: Sequence[Row]) -> None:
        changes = pack_changes(rows)
        with self._transaction(changes=changes) as connection:
            check_space(connection, self.path, rows)
            for table, key, record in rows:
                if record is None:
                    connection.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
                else:
                    put = f"INSERT OR REPLACE INTO {table}(key, record) VALUES (?, ?)"
                    connection.execute(put, (key, record))

    def _empty_log(self) -> None:
        with self._lock, suppress(sqlite3.Error):
            self._use().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @property
    def paths(self) -> list[str]:
        """Its files: the database, its log, and the count of commits."""
        return [self.path, f"{self.path}-wal", count_path(self.path)]

    @property
    def nbytes(self) -> int:
        """Bytes of its file, the log not counted; 0 where it was removed."""
        return file_nbytes(self.path)

    def touch_order(self, keys: Iterable[str]) -> None:
        """Makes these blobs the most recently used, the last one most. Unknown keys are ignored."""
        with self._transaction() as connection:
            last = connection.execute("SELECT max(id) FROM blobs").fetchone()[0] or 0
            if not 0 <= last < 1 << 62:
                raise CorruptionError(f"a row's number is out of range: {last}")
            connection.executemany(
                "UPDATE blobs SET id = ? WHERE key = ?",
                ((last + place, encode(key)) for place, key in enumerate(keys, 1)),
            )

    def close(self) -> None:
        """Moves the log into the file and closes it. Does nothing once closed, or after fork."""
        with self._lock, typed_errors(self.path):
            if self._pid != os.getpid():
                return
            if self._connection is not None:
                # SQLite checkpoints when the last connection closes. Where it cannot, the log stays
                # and the next open replays it: all of it is on the medium already.
                self._connection.close()
                self._connection = None
            self._end_changes()
            self._count.close()
            self._locks_dropped()

    def _locks_dropped(self) -> None:
        locked, self._locked = self._locked, None
        if locked is not None:
            descriptors.locks_dropped(locked)

    def _use(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ClosedError(f"index {self.path} is closed")
        if self._pid != os.getpid():
            raise ClosedError(f"index {self.path} was opened before a fork, by {self._pid}")
        return self._connection

    @contextmanager
    def _transaction(
        self, *, changes: bytes = b"", summary: Note | None = None
    ) -> Iterator[sqlite3.Connection]:
        """``changes``: those of the rows of blobs; ``summary``: of one that was written and says
        the same as the rows."""
        with self._lock, typed_errors(self.path):
            connection = self._use()
            try:
                if connection.in_transaction:
                    # An interrupt (Ctrl-C) prevented the roll-back.
                    connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                # Counted from the row, because an interrupt can leave a count in memory behind it.
                commits = read_number(connection, "commits") + 1
                write_meta(connection, "commits", str(commits))
                if summary is None and self._summary is not None:
                    noted, summary = _noted(connection)
                    if noted != commits - 1:
                        summary = None
                    elif summary is not None and changes:
                        summary = self._append(summary, changes)
                if summary is not None:
                    write_meta(connection, SUMMARY, f"{commits} {summary}")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back where the disk is full
                    connection.execute("ROLLBACK")
                raise
            self.commits = commits
            self._count.write(commits)
            self._summary = summary

    def _append(self, note: Note, changes: bytes) -> Note | None:
        """Appends ``changes`` to the summary that ``note`` is of; what it is to say then. None
        where it ends with that: the next open reads the rows, unless the store is closed first."""
        try:
            if self._summary_file < 0:
                self._summary_file = open_summary(self.path)
            return append_changes(self._summary_file, note, changes)
        except OSError as failure:
            log.warning("changes are not kept beside %s: %s", summary_path(self.path), failure)
            return None

    def _end_changes(self) -> None:
        """There is no summary any more."""
        self._summary = None
        file, self._summary_file = self._summary_file, -1
        if file >= 0:
            os.close(file)

    def _load(self, table: str, parse: Callable[[bytes], Record]) -> Iterator[tuple[str, Record]]:
        with typed_errors(self.path):
            with self._lock:
                query = f"SELECT id, key, record FROM {table} ORDER BY id"
                cursor = self._use().execute(query)
            while True:
                with self._lock:
                    self._use()
                    found = cursor.fetchone()
                if found is None:
                    return
                yield read_row(table, found, parse)


def _locks_taken(path: str) -> descriptors.Identity:
    try:
        return descriptors.locks_taken(path)
    except OSError as refused:
        raise file_error("open", path, refused) from refused


def _noted(connection: sqlite3.Connection) -> tuple[int, Note | None]:
    """After how many commits there was a summary, and which; -1 where there was none."""
    commits, _, text = (read_meta(connection, SUMMARY) or "").partition(" ")
    note = Note.parse(text)
    return (int(commits), note) if note and commits.isdecimal() else (-1, None)
