"""The records of the index, and their bytes in a row: packed, checksummed, range-checked."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from spdk_kv.errors import CorruptionError
from spdk_kv.types import KVShape


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """Where a blob lies: drive offset, payload bytes, dtype name, shape, payload's CRC32C."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    crc: int


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """Where a unit lies: its extent's offset on the drive, the payload bytes that are valid, and
    one little-endian uint32 CRC32C per chunk of them."""

    offset: int
    nbytes: int
    checksums: bytes


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """A sequence: shape, ``"layer"`` or ``"head"``, bytes per checksummed chunk, bytes of each
    unit's extent, the units, and the row map (opaque bytes here).

    ``life`` is not stored: all records of one sequence share it, from its creation (or its being
    loaded) until it is deleted, so that another sequence of its name is not taken for it.
    """

    shape: KVShape
    granularity: str
    chunk_nbytes: int
    extent_nbytes: int
    units: tuple[UnitRecord, ...]
    row_map: bytes
    life: object = field(default_factory=object, repr=False, compare=False)


class Row(NamedTuple):
    """A change of a table: the packed record of ``key``, or None to delete it."""

    table: str
    key: bytes
    record: bytes | None


_GRANULARITIES = ("layer", "head")

# A row's checksum starts from its table's number, so that it cannot pass for another table's row.
_SEEDS = {"meta": 1, "blobs": 2, "sequences": 3}
# A row is the key's length, a body, and a checksum over the key and both.
_NUMBER = struct.Struct("<I")
_BLOB = struct.Struct("<qI")  # offset, crc; then the kind, which many blobs share:
_KIND = struct.Struct("<qBB")  # nbytes, dtype bytes, dimensions; then dtype, shape
# shape (5), chunk_nbytes, extent_nbytes, granularity, dtype bytes, number of units, row map bytes
_SEQUENCE = struct.Struct("<5qqqBBII")  # then dtype, row map, units, all checksums
_UNIT = struct.Struct("<qqI")  # offset, nbytes, checksum bytes

_Kind = tuple[int, str, tuple[int, ...]]
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
        body = _pack_blob(record) if isinstance(record, BlobRecord) else _pack_sequence(record)
    except struct.error as error:
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
    """For :func:`unpack`. ``kinds`` collects what many blobs share: size, dtype, shape."""
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
    """For :func:`unpack`."""
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


def meta_crc(name: str, value: str) -> int:
    """The checksum of ``value``, which the table meta keeps under ``name``."""
    return zlib.crc32(f"{name}\0{value}".encode(), _SEEDS["meta"])
