"""The index file: records by key in SQLite, committed after the data."""

from __future__ import annotations

import logging
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import quote

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import (
    ClosedError,
    CorruptionError,
    DeviceError,
    StoreLocked,
    StoreMismatch,
    file_error,
)
from spdk_kv.index import descriptors
from spdk_kv.index.checks import (
    SCHEMA,
    VERSION,
    check_index,
    check_whole,
    read_meta,
    read_number,
    read_row,
    write_meta,
)
from spdk_kv.index.commits import CommitCount, create_commit_count
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
from spdk_kv.index.summary import SUMMARY, has_summary, read_summary, write_summary
from spdk_kv.index.unopened import why_unopened

log = logging.getLogger(__name__)

MakeTable = Callable[[], BlobTable[BlobRecord]]

# The file is ours alone, so a lock on it is a backup tool's or a mistake.
_BUSY_TIMEOUT_S = 1.0

_DURABLE = (
    "PRAGMA synchronous = FULL",
    # A stray pointer in a damaged page must find zeroes, not a row that was deleted.
    "PRAGMA secure_delete = ON",
    "PRAGMA cell_size_check = ON",
    "PRAGMA temp_store = MEMORY",  # keys are private and must not reach /tmp
)


@contextmanager
def typed_errors(path: str, opened: str = "") -> Iterator[None]:
    """Turns SQLite's errors into ours, with the file's name in each. ``opened``: the file that is
    opened, where that is not ``path``."""
    try:
        yield
    except (CorruptionError, StoreMismatch) as error:
        raise type(error)(f"index {path}: {error}") from error
    except UnicodeDecodeError as error:  # damaged text in SQLite's own tables
        raise CorruptionError(f"index {path}: {error}") from error
    except sqlite3.Error as error:
        # By message, because Python 3.10 does not give SQLite's code.
        text = str(error)
        if "is locked" in text:
            raise StoreLocked(f"index {path} is in use by another program: {text}") from error
        if "is full" in text:
            raise IndexFull(f"index {path}: {text}: free space on its filesystem") from error
        if "unable to open" in text or "readonly" in text:
            if (refused := why_unopened(opened or path)) is not None:
                raise file_error("open", refused.filename or path, refused) from error
            raise DeviceError(f"index {path}: {text}", op="index") from error
        if "I/O error" in text:
            raise DeviceError(
                f"index {path}: {text}: look at `dmesg` and its drive's SMART log", op="index"
            ) from error
        raise CorruptionError(f"index {path}: {text}") from error


def _create(path: str) -> None:
    """Creates an empty index at ``path``. Interrupted at any moment, it is whole or not there."""
    new = f"{path}.new"
    try:
        if os.path.exists(f"{path}-wal"):
            # SQLite would replay the log of the lost index into the new one.
            raise CorruptionError(f"index {path} is gone, but its log {path}-wal is not")
        for leftover in (new, f"{new}-journal", f"{new}-wal", f"{new}-shm"):
            if os.path.exists(leftover):
                os.unlink(leftover)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # Whatever the umask. SQLite gives its log and shared memory the mode of this file.
        os.chmod(new, 0o600)
        identity = uuid.uuid4().hex
        with typed_errors(path, new), closing(sqlite3.connect(new, isolation_level=None)) as fresh:
            fresh.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                fresh.execute(statement)
            write_meta(fresh, "uuid", identity)
            write_meta(fresh, "generation", "0")
            write_meta(fresh, "commits", "0")
            fresh.execute(f"PRAGMA user_version = {VERSION}")
            fresh.execute("COMMIT")
            # Not left to the first open: a kill in the middle would leave a rollback journal, which
            # a read-only fresh cannot play back.
            _use_log(fresh)
        create_commit_count(count_path(path), identity)
        _sync_folder(path)  # no index without its count, even after a power cut
        os.rename(new, path)
        _sync_folder(path)
    except OSError as error:
        raise file_error("create", path, error) from error


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def count_path(path: str) -> str:
    """The file with the count of commits of the index at ``path``."""
    return f"{path}-commits"


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
            _create(self.path)
        # The number of the summary; "" where the rows are read, and so all of the index is checked.
        self._summary = ""
        self._locked: descriptors.Identity | None = _locks_taken(self.path)
        try:
            self._open()
        except BaseException:
            self._locks_dropped()
            raise

    def _open(self) -> None:
        # A refused index must stay as it is, but the last writable connection moves even a damaged
        # log into the file when it closes. So the checks use a read-only connection.
        with typed_errors(self.path), closing(_connect(self.path, "ro")) as reader:
            whole = not self._find_summary(reader)
            if whole and self._make_table is not None:
                self._found = self._make_table()
            self.uuid, self.commits = check_index(reader, whole=whole, blobs=self._found)
            self._count = CommitCount(count_path(self.path), self.uuid, self.commits)
            try:
                self._connection = _connect(self.path, "rw")
                _make_durable(self._connection)
            except BaseException:
                if self._connection is not None:
                    self._connection.close()
                self._count.close()
                raise

    def _find_summary(self, reader: sqlite3.Connection) -> bool:
        try:
            noted, number = _noted(reader)
            if noted == read_number(reader, "commits") and has_summary(self.path, number):
                self._summary = number
        except (CorruptionError, UnicodeDecodeError, sqlite3.Error):
            pass  # of which the check of the whole says more
        return bool(self._summary)

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
        with self._transaction(keeps_blobs=True) as connection:
            write_meta(connection, name, value)

    def load_summary(self, blobs: BlobTable[BlobRecord]) -> bool:
        """Adds all blobs to ``blobs``, which has none, without reading their rows. False where that
        cannot be: ``blobs`` is of no use then, and :meth:`load_blobs` has them."""
        number = self._summary
        return bool(number) and read_summary(self.path, self.uuid, number, blobs)

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
                self._summary = ""
        return found

    @property
    def has_summary(self) -> bool:
        """Whether the next open finds the rows of blobs as this one did in a summary, if it found
        one, unless :meth:`write` changed them."""
        return bool(self._summary)

    def save_summary(self, blobs: BlobTable[BlobRecord], changes: int) -> None:
        """Writes down ``blobs``, which after so many ``changes`` are those of all rows, for
        :meth:`load_summary`. RuntimeError where they have changed since; OSError, or as any call.

        None is written where there are not as many rows: a deletion missed its row in a damaged
        index, say, which who reads the rows finds out.
        """
        with self._lock, typed_errors(self.path):
            (rows,) = self._use().execute("SELECT count(*) FROM blobs").fetchone()
        if rows != len(blobs):
            log.warning("index %s has %d blobs, not %d", self.path, rows, len(blobs))
            return
        number = write_summary(self.path, self.uuid, blobs, changes)
        if number is not None:
            with self._transaction(summary=number):
                pass

    def load_blobs(self) -> Iterator[tuple[str, BlobRecord]]:
        """All blobs, least recently used first. Exhaust it before committing."""
        if self._summary:
            with self._lock, typed_errors(self.path):
                check_whole(self._use())
            self._summary = ""
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
        keeps = not any(row.table == "blobs" for row in rows)
        with self._transaction(keeps_blobs=keeps) as connection:
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
        with self._transaction(keeps_blobs=True) as connection:
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
        self, *, keeps_blobs: bool = False, summary: str = ""
    ) -> Iterator[sqlite3.Connection]:
        """``keeps_blobs``: a summary says the same as the rows of blobs as before; ``summary``: the
        number of one that does."""
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
                if keeps_blobs and not summary:
                    noted, number = _noted(connection)
                    summary = number if noted == commits - 1 else ""
                if summary:
                    write_meta(connection, SUMMARY, f"{commits} {summary}")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back where the disk is full
                    connection.execute("ROLLBACK")
                raise
            self.commits = commits
            self._count.write(commits)
            if not keeps_blobs:
                self._summary = summary

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


def _noted(connection: sqlite3.Connection) -> tuple[int, str]:
    """After how many commits there was a summary, and its number; -1 where there was none."""
    commits, _, number = (read_meta(connection, SUMMARY) or "").partition(" ")
    return (int(commits), number) if commits.isdecimal() and number else (-1, "")


def _connect(path: str, mode: str) -> sqlite3.Connection:
    # A URI, whose mode does not create: an index that vanished must not become a blank one.
    uri = f"file:{quote(os.fsencode(path))}?mode={mode}"
    return sqlite3.connect(
        uri, _BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True
    )


def _make_durable(connection: sqlite3.Connection) -> None:
    for pragma in _DURABLE:
        connection.execute(pragma)
    _use_log(connection)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < VERSION:
        # An earlier release, which would not know the rows to come, is to refuse it from now on.
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _use_log(connection: sqlite3.Connection) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise DeviceError(f"the index's filesystem cannot hold a write-ahead log ({mode})")
