"""The record of a sequence, and its bytes in a row of the index."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, get_args

from spdk_kv.errors import SpdkKvError
from spdk_kv.types import Granularity, KVShape, LayerShape


class PieceRecord(NamedTuple):
    """Room for a part of every extent of a sequence; other records may have the same one.

    The first chunk that it has of each layer's extents, and the one behind the last, a single
    number standing for all layers; and the drive offsets of its runs.
    """

    origins: tuple[int, ...]
    ends: tuple[int, ...]
    runs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """A sequence: shape, granularity, bytes per checksummed chunk, its pieces, the
    tokens of each layer, for each extent one little-endian uint32 CRC32C per chunk, the row map and
    the note (opaque bytes here), and whether it is kept from eviction.

    ``life`` is not stored: all records of one sequence share it, from its creation (or its being
    loaded) until it is deleted, so that another sequence of its name is not taken for it.
    """

    shape: KVShape
    granularity: Granularity
    chunk_nbytes: int
    pieces: tuple[PieceRecord, ...]
    tokens: tuple[int, ...]
    checksums: tuple[bytes, ...]
    row_map: bytes = b""
    note: bytes = b""
    pinned: bool = False
    life: object = field(default_factory=object, repr=False, compare=False)

    @property
    def is_lean(self) -> bool:
        """Whether it is what :meth:`lean` returned."""
        return not self.tokens

    def lean(self) -> SequenceRecord:
        """Itself without what is only needed to restore the sequence, and lies in the index."""
        return replace(self, tokens=(), checksums=(), row_map=b"", note=b"")


GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
"""Format 1 has their positions."""
_GRANULARITY = {name: name for name in GRANULARITIES}

# A body begins with this, the length of a JSON header, and the header; then, each as little-endian
# int64: the tokens, and of each piece origins, ends and runs; then row map, note and all checksums.
# The first number of a body of format 1 is a count of layers.
_START = struct.Struct("<qI")
_FORMAT_2 = -2
# More than any sequence has.
_MOST_EXTENTS = 1 << 20
# Format 1: shape (5), chunk_nbytes, extent_nbytes, granularity, dtype bytes, number of units, row
# map bytes; then dtype, row map, units, all checksums. Each unit had one extent of its own.
_SEQUENCE_1 = struct.Struct("<5qqqBBII")
_UNIT_1 = struct.Struct("<qqI")  # offset, nbytes, checksum bytes


def pack_sequence(record: SequenceRecord) -> bytes:
    """The body of the row of ``record``. ValueError where a field is out of range."""
    _check(record)
    shape = record.shape
    header: dict[str, Any] = {
        "layers": [_layer_fields(each) for each in shape.per_layer]
        or [shape.layers, shape.kv_heads, shape.head_dim, shape.dtype],
        "batch": shape.batch,
        "max_tokens": shape.max_tokens,
        "granularity": record.granularity,
        "chunk_nbytes": record.chunk_nbytes,
        "pieces": [[len(part) for part in piece] for piece in record.pieces],
        "tokens": len(record.tokens),
        "extents": len(record.checksums),
        "row_map_nbytes": len(record.row_map),
        "note_nbytes": len(record.note),
        "pinned": record.pinned,
    }
    crcs = {len(each) for each in record.checksums}
    header["crcs_nbytes"] = (
        crcs.pop() if len(crcs) == 1 else [len(each) for each in record.checksums]
    )
    text = json.dumps(header, separators=(",", ":")).encode()
    numbers = [*record.tokens]
    for piece in record.pieces:
        for part in piece:
            numbers += part
    return b"".join(
        [
            _START.pack(_FORMAT_2, len(text)),
            text,
            struct.pack(f"<{len(numbers)}q", *numbers),
            record.row_map,
            record.note,
            *record.checksums,
        ]
    )


def parse_sequence(body: bytes) -> SequenceRecord:
    """The record in ``body``. ValueError, TypeError, IndexError or struct.error where it is
    malformed."""
    first, header_nbytes = _START.unpack_from(body)
    if first != _FORMAT_2:
        return _parse_format_1(body)
    try:
        return _parse(body, header_nbytes)
    except (KeyError, SpdkKvError) as error:
        raise ValueError(str(error)) from error


def _parse(body: bytes, header_nbytes: int) -> SequenceRecord:
    at = _START.size + header_nbytes
    header = json.loads(body[_START.size : at])
    layers, batch, most = header["layers"], header["batch"], header["max_tokens"]
    if isinstance(layers[0], list):
        shape = KVShape.of_layers([LayerShape(*each) for each in layers], most, batch)
    else:
        count, kv_heads, head_dim, dtype = layers
        shape = KVShape(count, kv_heads, head_dim, dtype, most, batch)
    lengths = header["pieces"]
    count = header["tokens"] + sum(map(sum, lengths))
    numbers = iter(struct.unpack_from(f"<{count}q", body, at))
    at += 8 * count
    tokens = _take(numbers, header["tokens"])
    pieces = [PieceRecord(*(_take(numbers, length) for length in each)) for each in lengths]
    parts = []
    crcs = header["crcs_nbytes"]
    if not 0 < header["extents"] <= _MOST_EXTENTS:
        raise ValueError(f"{header['extents']} extents")
    each = [crcs] * header["extents"] if isinstance(crcs, int) else crcs
    for nbytes in (header["row_map_nbytes"], header["note_nbytes"], *each):
        parts.append(body[at : at + nbytes])
        at += nbytes
    if at != len(body) or len(each) != header["extents"]:
        raise ValueError("its length does not fit its counts")
    row_map, note, *checksums = parts
    record = SequenceRecord(
        shape=_shared(shape),
        granularity=_GRANULARITY[header["granularity"]],
        chunk_nbytes=header["chunk_nbytes"],
        pieces=tuple(pieces),
        tokens=tokens,
        checksums=tuple(checksums),
        row_map=row_map,
        note=note,
        pinned=header["pinned"],
    )
    _check(record)
    return record


@lru_cache(maxsize=256)
def _shared(shape: KVShape) -> KVShape:
    """One object for all that are equal: many sequences are of one model."""
    return shape


def _take(numbers: Any, count: int) -> tuple[int, ...]:
    return tuple(next(numbers) for _ in range(count))


def _layer_fields(layer: LayerShape) -> list[Any]:
    return [layer.kv_heads, layer.head_dim, layer.dtype, layer.value_dim, layer.value_dtype]


def _parse_format_1(body: bytes) -> SequenceRecord:
    layers, kv_heads, head_dim, max_tokens, batch, *rest = _SEQUENCE_1.unpack_from(body)
    chunk_nbytes, extent_nbytes, granularity, dtype_nbytes, unit_count, map_nbytes = rest
    map_at = _SEQUENCE_1.size + dtype_nbytes
    units_at = map_at + map_nbytes
    at = checksums_at = units_at + unit_count * _UNIT_1.size
    offsets, sizes, checksums = [], [], []
    for offset, nbytes, checksums_nbytes in _UNIT_1.iter_unpack(body[units_at:checksums_at]):
        offsets.append(offset)
        sizes.append(nbytes)
        checksums.append(body[at : at + checksums_nbytes])
        at += checksums_nbytes
    if len(offsets) != unit_count or at != len(body) or layers < 1 or unit_count % layers:
        raise ValueError("its length does not fit its counts")
    if chunk_nbytes < 1 or extent_nbytes < 1 or extent_nbytes % chunk_nbytes:
        raise ValueError("an extent has whole chunks")
    dtype = body[_SEQUENCE_1.size : map_at].decode()
    shape = KVShape(layers, kv_heads, head_dim, dtype, max_tokens, batch)
    heads = kv_heads if granularity else 1
    row_nbytes, each = shape.token_nbytes // heads, unit_count // layers
    for first in range(0, unit_count, each):
        if len(set(sizes[first : first + each])) > 1 or sizes[first] % row_nbytes:
            raise ValueError("extents of one layer have unequal lengths")
        if not 0 <= sizes[first] <= extent_nbytes:
            raise ValueError(f"{sizes[first]} bytes exceed their extent")
    record = SequenceRecord(
        shape=shape,
        granularity=GRANULARITIES[granularity],
        chunk_nbytes=chunk_nbytes,
        pieces=(PieceRecord((0,), (extent_nbytes // chunk_nbytes,), tuple(offsets)),),
        tokens=tuple(size // row_nbytes for size in sizes[::each]),
        checksums=tuple(checksums),
        row_map=body[map_at:units_at],
    )
    _check(record)
    return record


def _check(record: SequenceRecord) -> None:
    if record.granularity not in GRANULARITIES:
        raise ValueError(f"there is no granularity {record.granularity!r}")
    if record.chunk_nbytes < 1:
        raise ValueError("chunk_nbytes is positive")
    if len(record.tokens) != record.shape.layers or min(record.tokens) < 0:
        raise ValueError("every layer has a number of tokens")
    for piece in record.pieces:
        _check_piece(piece, record.shape.layers)
    if any(len(each) % 4 for each in record.checksums):
        raise ValueError("an extent's checksums are 4 bytes each")


def _check_piece(piece: PieceRecord, layers: int) -> None:
    origins, ends, runs = piece
    if {len(origins), len(ends)} - {1, layers} or not runs or min(runs) < 0:
        raise ValueError(f"{piece} is no piece of {layers} layers")
    if any(not 0 <= origin <= end for origin, end in zip(*_even(origins, ends), strict=True)):
        raise ValueError(f"{piece} ends before it begins")


def _even(origins: Sequence[int], ends: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    most = max(len(origins), len(ends))
    return [*origins] * (most // len(origins)), [*ends] * (most // len(ends))
