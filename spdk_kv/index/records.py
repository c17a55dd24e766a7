"""The records of the index, and their bytes in a row: packed, checksummed, range-checked."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from spdk_kv._native.table import BlobTable, RowReader
from spdk_kv.errors import CorruptionError
from spdk_kv.index.sequences import SequenceRecord, pack_sequence


class BlobRecord(NamedTuple):
    """Where a blob lies: drive offset, payload bytes, dtype name, shape, payload's CRC32C."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    crc: int


class Row(NamedTuple):
    """A change of a table: the packed record of ``key``, or None to delete it."""

    table: str
    key: bytes
    record: bytes | None


# A row's checksum starts from its table's number, so that it cannot pass for another table's row.
_SEEDS = {"meta": 1, "blobs": 2, "sequences": 3}
# A row is the key's length, a body, and a checksum over the key and both.
_NUMBER = struct.Struct("<I")
_BLOB = struct.Struct("<qI")  # offset, crc; then the kind, which many blobs share:
_KIND = struct.Struct("<qBB")  # nbytes, dtype bytes, dimensions; then dtype, shape
Kind = tuple[int, str, tuple[int, ...]]
Record = TypeVar("Record", BlobRecord, SequenceRecord)


def encode(name: str) -> bytes:
    """A blob's key or a sequence's name as bytes; any str is one."""
    return name.encode("utf-8", "surrogatepass")


def decode(key: bytes) -> str:
    """The name that :func:`encode` made ``key`` of. UnicodeDecodeError where it made none."""
    return key.decode("utf-8", "surrogatepass")


def pack(table: str, key: bytes, record: BlobRecord | SequenceRecord) -> bytes:
    """The bytes of ``record`` in its row. ValueError where a field is out of range."""
    try:
        body = _pack_blob(record) if isinstance(record, BlobRecord) else pack_sequence(record)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a field of the record is out of range: {error}") from None
    body = _NUMBER.pack(len(key)) + body
    return body + _NUMBER.pack(_row_crc(table, key, body))


def unpack(table: str, key: bytes, row: bytes, parse: Callable[[bytes], Record]) -> Record:
    """The record in ``row``, its body read by ``parse``. CorruptionError where it is damaged."""
    try:
        if _NUMBER.unpack(row[-4:])[0] != _row_crc(table, key, row[:-4]):
            raise CorruptionError("its checksum does not match")
        if _NUMBER.unpack_from(row)[0] != len(key):
            raise CorruptionError("its key has the wrong length")
        return parse(row[4:-4])
    except (struct.error, TypeError, ValueError, IndexError) as error:
        raise CorruptionError(f"it is malformed: {error}") from error


def read_blobs(blobs: BlobTable[BlobRecord] | None) -> RowReader:
    """A reader of rows (id, key, record) of the table of blobs into ``blobs``."""
    return RowReader(blobs, _SEEDS["blobs"], parse_kind)


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


def parse_blob(body: bytes, kinds: dict[bytes, Kind]) -> BlobRecord:
    """For :func:`unpack`. ``kinds`` collects what many blobs share: size, dtype, shape."""
    offset, crc = _BLOB.unpack_from(body)
    packed = body[_BLOB.size :]
    kind = kinds.get(packed)
    if kind is None:
        kind = kinds[packed] = parse_kind(packed)
    if offset < 0:
        raise ValueError("negative field")
    return BlobRecord(offset, kind[0], kind[1], kind[2], crc)


def parse_kind(packed: bytes) -> Kind:
    """What many blobs share: size, dtype, shape. ValueError or struct.error where it is none."""
    nbytes, dtype_nbytes, ndim = _KIND.unpack_from(packed)
    shape_at = _KIND.size + dtype_nbytes
    dtype = packed[_KIND.size : shape_at].decode()
    shape = struct.unpack(f"<{ndim}q", packed[shape_at:])
    if nbytes < 0 or (shape and min(shape) < 0):
        raise ValueError("negative field")
    return nbytes, dtype, shape


def meta_crc(name: str, value: str) -> int:
    """The checksum of ``value``, which the table meta keeps under ``name``."""
    return zlib.crc32(f"{name}\0{value}".encode(), _SEEDS["meta"])
