"""What is stored under which key: records in SQLite, each with a checksum, committed last."""

from __future__ import annotations

import os
import sqlite3
import struct
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    CorruptionError,
    DeviceError,
    StoreLocked,
    StoreMismatch,
    device_error,
)
from spdk_kv.types import KVShape


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """Where a blob lies: device offset, payload bytes, dtype name, shape, payload's CRC32C."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    crc: int


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """Where a unit lies: its extent's device offset, the payload bytes that are valid, and one
    little-endian uint32 CRC32C per chunk of them."""

    offset: int
    nbytes: int
    checksums: bytes


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """A sequence: shape, ``"layer"`` or ``"head"``, bytes per checksummed chunk, bytes of each
    unit's extent, the units, and the row map (opaque bytes here)."""

    shape: KVShape
    granularity: str
    chunk_nbytes: int
    extent_nbytes: int
    units: tuple[UnitRecord, ...]
    row_map: bytes


_VERSION = 1
_BUSY_TIMEOUT_S = 1.0
_GRANULARITIES = ("layer", "head")

# id is the recency: a row that is put anew gets the highest one.
_SCHEMA = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE blobs(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, record BLOB NOT NULL)",
    "CREATE TABLE sequences"
    "(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, record BLOB NOT NULL)",
)
_DURABLE = (
    "PRAGMA synchronous = FULL",
    # A stray pointer in a damaged page must find zeroes, not a row that was deleted.
    "PRAGMA secure_delete = ON",
    "PRAGMA cell_size_check = ON",
    "PRAGMA temp_store = MEMORY",  # keys are private: nothing of them in /tmp
)

# A row's checksum starts from its table's number, so that a row cannot pass for another table's.
_SEEDS = {"meta": 1, "blobs": 2, "sequences": 3}
# A row is the key's length, a body, and the checksum of key and both.
_NUMBER = struct.Struct("<I")
_BLOB = struct.Struct("<qI")  # offset, crc; then the kind, which many blobs share:
_KIND = struct.Struct("<qBB")  # nbytes, dtype bytes, dimensions; then dtype, shape
# shape (5), chunk_nbytes, extent_nbytes, granularity, dtype bytes, number of units, row map bytes
_SEQUENCE = struct.Struct("<5qqqBBII")  # then dtype, row map, units, all checksums
_UNIT = struct.Struct("<qqI")  # offset, nbytes, checksum bytes

_Kind = tuple[int, str, tuple[int, ...]]
_Record = TypeVar("_Record", BlobRecord, SequenceRecord)


def pack(table: str, key: bytes, record: BlobRecord | SequenceRecord) -> bytes:
    """``record`` as its row keeps it. ValueError where a field is out of range."""
    try:
        body = _pack_blob(record) if isinstance(record, BlobRecord) else _pack_sequence(record)
    except struct.error as error:
        raise ValueError(f"a field of the record is out of range: {error}") from None
    body = _NUMBER.pack(len(key)) + body
    return body + _NUMBER.pack(_row_crc(table, key, body))


def unpack(table: str, key: bytes, row: bytes, parse: Callable[[bytes], _Record]) -> _Record:
    """The record that ``pack`` made, its body read by ``parse``, or CorruptionError."""
    try:
        if _NUMBER.unpack(row[-4:])[0] != _row_crc(table, key, row[:-4]):
            raise CorruptionError("its checksum does not match")
        if _NUMBER.unpack_from(row)[0] != len(key):
            raise CorruptionError("its key has the wrong length")
        return parse(row[4:-4])
    except (struct.error, TypeError, ValueError, IndexError) as error:
        raise CorruptionError(f"it is malformed: {error}") from error


def _row_crc(table: str, key: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(key, _SEEDS[table]))


def _pack_blob(record: BlobRecord) -> bytes:
    if min(record.offset, record.nbytes, *record.shape) < 0:
        raise ValueError(f"negative field in {record}")
    dtype = record.dtype.encode()
    return (
        _BLOB.pack(record.offset, record.crc)
        + _KIND.pack(record.nbytes, len(dtype), len(record.shape))
        + dtype
        + struct.pack(f"<{len(record.shape)}q", *record.shape)
    )


def parse_blob(body: bytes, kinds: dict[bytes, _Kind]) -> BlobRecord:
    """For ``unpack``. ``kinds`` keeps the sizes, dtypes and shapes seen: equal ones are shared."""
    offset, crc = _BLOB.unpack_from(body)
    packed = body[_BLOB.size :]
    kind = kinds.get(packed)
    if kind is None:
        nbytes, dtype_nbytes, ndim = _KIND.unpack_from(packed)
        shape_at = _KIND.size + dtype_nbytes
        dtype = packed[_KIND.size : shape_at].decode()
        kind = kinds[packed] = nbytes, dtype, struct.unpack(f"<{ndim}q", packed[shape_at:])
    nbytes, dtype, shape = kind
    if offset < 0 or nbytes < 0 or (shape and min(shape) < 0):
        raise ValueError("negative field")
    return BlobRecord(offset, nbytes, dtype, shape, crc)


def _pack_sequence(record: SequenceRecord) -> bytes:
    _check_sequence(record)
    shape, units = record.shape, record.units
    dtype = shape.dtype.encode()
    head = _SEQUENCE.pack(
        *(shape.layers, shape.kv_heads, shape.head_dim, shape.max_tokens, shape.batch),
        *(record.chunk_nbytes, record.extent_nbytes, _GRANULARITIES.index(record.granularity)),
        *(len(dtype), len(units), len(record.row_map)),
    )
    places = [_UNIT.pack(unit.offset, unit.nbytes, len(unit.checksums)) for unit in units]
    return b"".join([head, dtype, record.row_map, *places, *(unit.checksums for unit in units)])


def parse_sequence(body: bytes) -> SequenceRecord:
    """For ``unpack``."""
    layers, kv_heads, head_dim, max_tokens, batch, *rest = _SEQUENCE.unpack_from(body)
    chunk_nbytes, extent_nbytes, granularity, dtype_nbytes, unit_count, map_nbytes = rest
    map_at = _SEQUENCE.size + dtype_nbytes
    units_at = map_at + map_nbytes
    at = checksums_at = units_at + unit_count * _UNIT.size
    units = []
    for offset, nbytes, checksums_nbytes in _UNIT.iter_unpack(body[units_at:checksums_at]):
        units.append(UnitRecord(offset, nbytes, body[at : at + checksums_nbytes]))
        at += checksums_nbytes
    if len(units) != unit_count or at != len(body):
        raise ValueError("its length does not fit its counts")
    dtype = body[_SEQUENCE.size : map_at].decode()
    record = SequenceRecord(
        shape=KVShape(layers, kv_heads, head_dim, dtype, max_tokens, batch),
        granularity=_GRANULARITIES[granularity],
        chunk_nbytes=chunk_nbytes,
        extent_nbytes=extent_nbytes,
        units=tuple(units),
        row_map=body[map_at:units_at],
    )
    _check_sequence(record)
    return record


def _check_sequence(record: SequenceRecord) -> None:
    if record.granularity not in _GRANULARITIES:
        raise ValueError(f"granularity is 'layer' or 'head', not {record.granularity!r}")
    if record.chunk_nbytes < 1 or record.extent_nbytes < 1:
        raise ValueError("chunk_nbytes and extent_nbytes are positive")
    for unit in record.units:
        if unit.offset < 0 or not 0 <= unit.nbytes <= record.extent_nbytes:
            raise ValueError(f"a unit's {unit.nbytes} bytes at {unit.offset} exceed its extent")
        if len(unit.checksums) % 4:
            raise ValueError("a unit's checksums are 4 bytes each")


def _encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


@contextmanager
def _typed_errors(path: str) -> Iterator[None]:
    """SQLite's errors as ours, and the file's name on every refusal."""
    try:
        yield
    except (CorruptionError, StoreMismatch) as error:
        raise type(error)(f"index {path}: {error}") from error
    except UnicodeDecodeError as error:  # of text in SQLite's own tables
        raise CorruptionError(f"index {path}: {error}") from error
    except sqlite3.Error as error:
        # By message, for Python 3.10 does not say SQLite's code.
        text = str(error)
        if "is locked" in text:
            raise StoreLocked(f"index {path} is in use by another program: {text}") from error
        if "is full" in text:
            raise CapacityError(f"index {path}: {text}: free space on its filesystem") from error
        if "I/O error" in text or "unable to open" in text or "readonly" in text:
            raise DeviceError(f"index {path}: {text}", op="index") from error
        raise CorruptionError(f"index {path}: {text}") from error


def _create(path: str) -> None:
    """A new, empty index at ``path``: whole or not there, whenever this is interrupted."""
    new = f"{path}.new"
    try:
        if os.path.exists(f"{path}-wal"):
            # SQLite would replay the log of the lost index into the new one.
            raise CorruptionError(f"index {path} is gone, but its log {path}-wal is not")
        for leftover in (new, f"{new}-journal"):
            if os.path.exists(leftover):
                os.unlink(leftover)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # Against the umask. SQLite gives its log and shared memory the mode of this file.
        os.chmod(new, 0o600)
        with _typed_errors(path), closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            _write_meta(connection, "uuid", uuid.uuid4().hex)
            _write_meta(connection, "generation", "0")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")
        os.rename(new, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise device_error("create", 0, 0, error.errno or 0, path) from error


def _write_meta(connection: sqlite3.Connection, name: str, value: str) -> None:
    row = (name, value, _meta_crc(name, value))
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", row)


def _meta_crc(name: str, value: str) -> int:
    return zlib.crc32(f"{name}\0{value}".encode(), _SEEDS["meta"])


class Index:
    """The index of one store, in the SQLite file at ``path``; made new where there is none.

    Every call may block on the disk, changing ones until the change is on the medium. Errors:
    CorruptionError (never reformatted), StoreMismatch (a newer format), StoreLocked (another
    program holds the file), CapacityError (disk full), DeviceError, ClosedError (closed, or after
    fork). Safe to use from several threads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        if not os.path.exists(self.path):
            _create(self.path)
        with _typed_errors(self.path):
            # As a URI that does not create: an index that vanishes is not replaced by a blank one.
            uri = f"file:{quote(self.path)}?mode=rw"
            connection = sqlite3.connect(
                uri, _BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True
            )
        try:
            with _typed_errors(self.path):
                _prepare(connection)
            self._connection = connection
            self.uuid = self._required("uuid")
            self._required("generation")
        except BaseException:
            connection.close()
            raise

    uuid: str
    """Identity of the store, drawn when the index was made: 32 hexadecimal digits."""

    @property
    def generation(self) -> int:
        """The superblock generation that this index goes with; 0 when new. Setting it commits."""
        text = self._required("generation")
        if not text.isdecimal():
            raise CorruptionError(f"index {self.path}: generation is {text!r}")
        return int(text)

    @generation.setter
    def generation(self, value: int) -> None:
        self.set_meta("generation", str(value))

    def get_meta(self, name: str) -> str | None:
        """The text stored under ``name``, or None."""
        with self._lock, _typed_errors(self.path):
            query = "SELECT value, crc FROM meta WHERE name = ?"
            row = self._use().execute(query, (name,)).fetchone()
            if row is not None and row[1] != _meta_crc(name, row[0]):
                raise CorruptionError(f"the checksum of meta {name!r} does not match")
        return None if row is None else row[0]

    def set_meta(self, name: str, value: str) -> None:
        """Store ``value`` under ``name``; on the medium on return."""
        with self._transaction() as connection:
            _write_meta(connection, name, value)

    def load_blobs(self) -> Iterator[tuple[str, BlobRecord]]:
        """All blobs, least recently used first. Exhaust it before committing."""
        return self._load("blobs", partial(parse_blob, kinds={}))

    def load_sequences(self) -> Iterator[tuple[str, SequenceRecord]]:
        """All sequences, least recently committed first. Exhaust it before committing."""
        return self._load("sequences", parse_sequence)

    def commit(
        self,
        blobs: Mapping[str, BlobRecord | None],
        sequences: Mapping[str, SequenceRecord | None],
    ) -> None:
        """Put (or delete, where None) all of these, or on any error none; on the medium on return.

        A key that is put becomes the most recently used. ValueError where a field is out of range.
        """
        changed: list[tuple[str, bytes, bytes | None]] = []
        tables: list[tuple[str, Mapping[str, Any]]] = [("blobs", blobs), ("sequences", sequences)]
        for table, records in tables:
            for name, record in records.items():
                key = _encode(name)
                changed.append((table, key, None if record is None else pack(table, key, record)))
        with self._transaction() as connection:
            for table, key, row in changed:
                if row is None:
                    connection.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
                else:
                    put = f"INSERT OR REPLACE INTO {table}(key, record) VALUES (?, ?)"
                    connection.execute(put, (key, row))

    def touch_order(self, keys: Iterable[str]) -> None:
        """Make these blobs the most recently used, the last one most; unknown keys do nothing."""
        with self._transaction() as connection:
            last = connection.execute("SELECT max(id) FROM blobs").fetchone()[0] or 0
            if not 0 <= last < 1 << 62:
                raise CorruptionError(f"a row's number is out of range: {last}")
            connection.executemany(
                "UPDATE blobs SET id = ? WHERE key = ?",
                ((last + place, _encode(key)) for place, key in enumerate(keys, 1)),
            )

    def close(self) -> None:
        """Move the log into the file and close it; again, or in a forked child: does nothing."""
        with self._lock, _typed_errors(self.path):
            if self._connection is not None and self._pid == os.getpid():
                # SQLite checkpoints as the last connection closes. Where it cannot, the log stays:
                # all of it is on the medium already, and the next open replays it.
                self._connection.close()
                self._connection = None

    def _required(self, name: str) -> str:
        value = self.get_meta(name)
        if value is None:
            raise CorruptionError(f"index {self.path}: meta {name!r} is missing")
        return value

    def _use(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ClosedError(f"index {self.path} is closed")
        if self._pid != os.getpid():
            raise ClosedError(f"index {self.path} was opened before a fork, by {self._pid}")
        return self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _typed_errors(self.path):
            connection = self._use()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back where the disk is full
                    connection.execute("ROLLBACK")
                raise

    def _load(self, table: str, parse: Callable[[bytes], _Record]) -> Iterator[tuple[str, _Record]]:
        with _typed_errors(self.path):
            with self._lock:
                query = f"SELECT id, key, record FROM {table} ORDER BY id"
                cursor = self._use().execute(query)
            while True:
                with self._lock:
                    self._use()
                    found = cursor.fetchone()
                if found is None:
                    return
                number, key, row = found
                try:
                    record = unpack(table, key, row, parse)
                    name = key.decode("utf-8", "surrogatepass")
                except (CorruptionError, UnicodeDecodeError) as error:
                    raise CorruptionError(f"row {number} of {table}: {error}") from error
                yield name, record


def _prepare(connection: sqlite3.Connection) -> None:
    """Check that this is a whole index of a format we know, then set up its durability."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise StoreMismatch(f"its format is {version}; this spdk_kv knows {_VERSION}: upgrade it")
    tables = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if version < _VERSION or sorted(sql for (sql,) in tables) != sorted(_SCHEMA):
        raise CorruptionError("not an index of spdk_kv, or its tables are damaged")
    for pragma in _DURABLE:
        connection.execute(pragma)
    # Finds a key whose look-up would miss its row: a deleted key could come back. 50 ms for
    # 100,000 rows.
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise CorruptionError(verdict)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise DeviceError(f"the index's filesystem cannot hold a write-ahead log ({mode})")
