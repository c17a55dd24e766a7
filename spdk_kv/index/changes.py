"""What changed since the summary of an index was written, appended to it.

A transaction that changes rows of blobs appends a section with them before it ends, and notes in
the index how far the file counts from now on, and the checksum up to there. So what is appended
counts if, and only if, its transaction is. Nothing is flushed: after a power cut the checksum does
not match, and the rows are read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from spdk_kv._native.table import BlobTable
from spdk_kv.index.records import BlobRecord, Row, read_blobs

# Bytes of the key and of the record, which follow; of a record that was deleted:
_HEAD = struct.Struct("<II")
_DELETED = 0xFFFFFFFF


def pack_changes(rows: Sequence[Row]) -> bytes:
    """A section with those of ``rows`` that are of blobs."""
    parts = []
    for row in rows:
        if row.table == "blobs":
            nbytes = _DELETED if row.record is None else len(row.record)
            parts += [_HEAD.pack(len(row.key), nbytes), row.key, row.record or b""]
    return b"".join(parts)


def apply_changes(blobs: BlobTable[BlobRecord], section: bytes | bytearray) -> None:
    """Does to ``blobs`` what :func:`pack_changes` made ``section`` of. ValueError or struct.error
    where it is none: ``blobs`` is of no use then."""
    rows: list[tuple[int, bytes, bytes | None]] = []
    content = bytes(section)
    at = 0
    while at < len(content):
        key_nbytes, nbytes = _HEAD.unpack_from(content, at)
        key_end = at + _HEAD.size + key_nbytes
        end = key_end if nbytes == _DELETED else key_end + nbytes
        if end > len(content):
            raise ValueError("a change ends too soon")
        record = None if nbytes == _DELETED else content[key_end:end]
        rows.append((len(rows), content[at + _HEAD.size : key_end], record))
        at = end
    read_blobs(blobs).change(rows)
