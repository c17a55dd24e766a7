"""A commit of any size, in transactions of a bounded one.

Deletions go first: they make room in the index for what follows, and a full filesystem does not
keep them back. A record that the index cannot hold fails alone: what was recorded under its name is
deleted, since the store may have gone on from there, and all others are committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from spdk_kv.errors import CapacityError
from spdk_kv.index.records import BlobRecord, Row, decode, encode, pack
from spdk_kv.index.sequences import SequenceRecord
from spdk_kv.index.space import LEAST_ROWS, IndexFull

# The most in a transaction.
_BATCH_ROWS = 4096
_BATCH_NBYTES = 4 << 20
# The most that SQLite takes in a row (SQLITE_MAX_LENGTH), less the fields beside key and record.
_MOST_ROW_NBYTES = 1_000_000_000 - 1000


class Writer(Protocol):
    """An :class:`Index`."""

    def write(self, rows: Sequence[Row]) -> None: ...


def commit_in_batches(
    index: Writer,
    blobs: MutableMapping[str, BlobRecord | None],
    sequences: MutableMapping[str, SequenceRecord | None],
    refused: list[CapacityError],
) -> None:
    """Stores all of these (or deletes, where None); blocks until they are on the medium, and takes
    out of the mappings what is.

    ``refused`` gets an error for each record that the index cannot hold. IndexFull and other errors
    where the rest could not be written; it is still in the mappings then.
    """
    rows = [*_rows("blobs", blobs, refused), *_rows("sequences", sequences, refused)]
    if len(rows) <= _BATCH_ROWS and sum(map(_nbytes, rows)) <= _BATCH_NBYTES:
        try:
            index.write(rows)
        except IndexFull:
            pass
        else:
            return
    pending: dict[str, MutableMapping[str, Any]] = {"blobs": blobs, "sequences": sequences}
    deletions = [row for row in rows if row.record is None]
    for wanted in (deletions, [row for row in rows if row.record is not None]):
        for batch in _batches(wanted):
            try:
                _write(index, batch)
            except MemoryError:
                if len(batch) > 1:
                    raise
                refused.append(_refusal(batch[0].table, batch[0].key, "it takes too much memory"))
                index.write([batch[0]._replace(record=None)])
            for row in batch:
                pending[row.table].pop(decode(row.key), None)


def _write(index: Writer, batch: list[Row]) -> None:
    """In halves, and halves of these, where the log has no room for the whole: once one is written,
    what it has in the log can make place for the next."""
    try:
        index.write(batch)
    except IndexFull:
        if len(batch) <= LEAST_ROWS:
            raise
        middle = len(batch) // 2
        _write(index, batch[:middle])
        _write(index, batch[middle:])


def _rows(table: str, records: Mapping[str, Any], refused: list[CapacityError]) -> Iterator[Row]:
    for name, record in records.items():
        key = encode(name)
        row = Row(table, key, None)
        try:
            if record is not None:
                row = Row(table, key, pack(table, key, record))
            if _nbytes(row) > _MOST_ROW_NBYTES:
                raise ValueError(f"it has {_nbytes(row)} bytes, and a row at most 10**9")
        except (ValueError, OverflowError, MemoryError) as reason:
            refused.append(_refusal(table, key, str(reason) or "it takes too much memory"))
            row = Row(table, key, None)
        if len(key) <= _MOST_ROW_NBYTES:  # nothing is recorded under a longer one
            yield row


def _refusal(table: str, key: bytes, reason: str) -> CapacityError:
    name = repr(key[:80].decode("utf-8", "replace")) + ("..." if len(key) > 80 else "")
    return CapacityError(
        f"the index cannot hold the record of {table[:-1]} {name}, which will be gone when the "
        f"store is closed: {reason}"
    )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    nbytes = 0
    for row in rows:
        if batch and (len(batch) == _BATCH_ROWS or nbytes + _nbytes(row) > _BATCH_NBYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(row)
        nbytes += _nbytes(row)
    if batch:
        yield batch


def _nbytes(row: Row) -> int:
    return len(row.key) + len(row.record or b"")
