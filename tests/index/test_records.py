"""The records of the index: round trips through their rows, damaged rows, fields out of range."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spdk_kv.errors import CorruptionError
from spdk_kv.index.records import (
    BlobRecord,
    pack,
    parse_blob,
    unpack,
)
from spdk_kv.index.sequences import PieceRecord, SequenceRecord, parse_sequence
from spdk_kv.types import KVShape, LayerShape

MOST = (1 << 63) - 1
BLOB = BlobRecord(offset=1 << 20, nbytes=4096, dtype="bfloat16", shape=(2, 1024), crc=0xDEADBEEF)
SEQUENCE = SequenceRecord(
    shape=KVShape(layers=2, kv_heads=4, head_dim=64, dtype="float16", max_tokens=128, batch=3),
    granularity="head",
    chunk_nbytes=65536,
    pieces=(
        PieceRecord((0,), (16,), (1 << 20,)),
        PieceRecord((16, 3), (20, 16), (1 << 25, 1 << 26)),
    ),
    tokens=(5, 0),
    checksums=(b"abcd", b""),
    row_map=b"\0\1\2",
    note=b"of a model",
    pinned=True,
)

offsets = st.integers(0, MOST)
blobs = st.builds(
    BlobRecord,
    offset=offsets,
    nbytes=offsets,
    dtype=st.sampled_from(["bfloat16", "float8_e4m3fn", "uint8"]),
    shape=st.lists(offsets, max_size=5).map(tuple),
    crc=st.integers(0, 0xFFFFFFFF),
)
checksums = st.integers(0, 5).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n))
dimensions = st.integers(1, MOST)
dtypes = st.sampled_from(["bfloat16", "float32"])
layer_shapes = st.builds(LayerShape, dimensions, dimensions, dtypes, offsets, dtypes)


@st.composite
def shapes(draw: Any) -> KVShape:
    most, batch = draw(st.none() | dimensions), draw(dimensions)
    if draw(st.booleans()):
        return KVShape.of_layers(draw(st.lists(layer_shapes, min_size=1, max_size=4)), most, batch)
    layers = draw(st.integers(1, 40))
    return KVShape(layers, draw(dimensions), draw(dimensions), draw(dtypes), most, batch)


@st.composite
def sequence_records(draw: Any) -> SequenceRecord:
    shape = draw(shapes())

    def piece() -> PieceRecord:
        count = draw(st.sampled_from([1, shape.layers]))
        origins = [draw(st.integers(0, 100)) for _ in range(count)]
        ends = [origin + draw(st.integers(0, 100)) for origin in origins]
        return PieceRecord(tuple(origins), tuple(ends), (draw(offsets), draw(offsets)))

    return SequenceRecord(
        shape=shape,
        granularity=draw(st.sampled_from(["layer", "head", "token"])),
        chunk_nbytes=draw(dimensions),
        pieces=tuple(piece() for _ in range(draw(st.integers(0, 3)))),
        tokens=tuple(draw(st.lists(offsets, min_size=shape.layers, max_size=shape.layers))),
        checksums=tuple(draw(st.lists(checksums, min_size=1, max_size=4))),
        row_map=draw(st.binary(max_size=30)),
        note=draw(st.binary(max_size=30)),
        pinned=draw(st.booleans()),
    )


sequences = sequence_records()


def sealed(table: int, key: bytes, body: bytes) -> bytes:
    """``body`` as a row under a good checksum and key length."""
    body = len(key).to_bytes(4, "little") + body
    return body + zlib.crc32(body, zlib.crc32(key, table)).to_bytes(4, "little")


def survives(table: str, key: bytes, body: bytes) -> None:
    """``body``, well sealed, is refused as corruption or is exactly a record's row."""
    with suppress(CorruptionError):
        if table == "blobs":
            row = sealed(2, key, body)
            assert pack(table, key, unpack(table, key, row, partial(parse_blob, kinds={}))) == row
        else:
            record = unpack(table, key, sealed(3, key, body), parse_sequence)
            # Not always the same row: there are two formats, and JSON has many spellings.
            assert unpack(table, key, pack(table, key, record), parse_sequence) == record


@given(st.binary(max_size=20), blobs, sequences)
def test_a_record_comes_back_from_its_row(
    key: bytes, blob: BlobRecord, sequence: SequenceRecord
) -> None:
    row = pack("blobs", key, blob)
    assert unpack("blobs", key, row, partial(parse_blob, kinds={})) == blob
    row = pack("sequences", key, sequence)
    assert unpack("sequences", key, row, parse_sequence) == sequence


@given(blobs, blobs)
def test_records_of_one_kind_share_its_fields_and_others_do_not(
    one: BlobRecord, other: BlobRecord
) -> None:
    parse = partial(parse_blob, kinds={})
    again = one._replace(offset=one.offset // 2, crc=one.crc ^ 1)
    loaded = [
        unpack("blobs", b"k", pack("blobs", b"k", record), parse) for record in (one, other, again)
    ]
    assert loaded == [one, other, again]
    assert loaded[0].shape is loaded[2].shape


@given(key=st.binary(max_size=10), body=st.binary(max_size=200))
@example(key=b"", body=b"")
@example(key=b"", body=bytes(4) + b"\xff" * 100)
def test_nonsense_under_a_good_checksum_is_corruption_or_a_valid_record(
    key: bytes, body: bytes
) -> None:
    survives("blobs", key, body)
    survives("sequences", key, body)


@given(st.integers(0, 1000), st.integers(1, 255))
def test_an_edited_field_under_a_good_checksum_is_corruption_or_a_valid_record(
    place: int, mask: int
) -> None:
    for table, record in (("blobs", BLOB), ("sequences", SEQUENCE)):
        body = bytearray(pack(table, b"k", record)[4:-4])
        body[place % len(body)] ^= mask
        survives(table, b"k", bytes(body))


@pytest.mark.parametrize("place", [7, 19, 37], ids=["offset", "nbytes", "shape"])
def test_a_negative_field_under_a_good_checksum_is_corruption(place: int) -> None:
    body = bytearray(pack("blobs", b"k", BLOB)[4:-4])
    body[place] |= 0x80  # the sign of a little-endian int64
    with pytest.raises(CorruptionError, match="negative"):
        unpack("blobs", b"k", sealed(2, b"k", bytes(body)), partial(parse_blob, kinds={}))


def test_a_flip_in_any_byte_of_a_row_is_corruption() -> None:
    row = bytearray(pack("sequences", b"key", SEQUENCE))
    for place in range(len(row)):
        row[place] ^= 1
        with pytest.raises(CorruptionError):
            unpack("sequences", b"key", bytes(row), parse_sequence)
        row[place] ^= 1
    for key, edited, why in ((b"kez", row, "checksum"), (b"ke", b"y" + row, "wrong length")):
        with pytest.raises(CorruptionError, match=why):
            unpack("sequences", key, bytes(edited), parse_sequence)
    of_another_table = sealed(2, b"key", bytes(row[4:-4]))
    with pytest.raises(CorruptionError, match="checksum"):
        unpack("sequences", b"key", of_another_table, parse_sequence)


@pytest.mark.parametrize(
    "record",
    [
        BlobRecord(-1, 1, "uint8", (1,), 0),
        BlobRecord(0, 1 << 63, "uint8", (1,), 0),
        BlobRecord(0, 1, "uint8", (-1,), 0),
        BlobRecord(0, 1, "u" * 256, (1,), 0),
        BlobRecord(0, 1, "uint8", (1,) * 256, 0),
        BlobRecord(0, 1, "uint8", (1,), 1 << 32),
    ],
)
def test_a_blob_out_of_range_is_refused(record: BlobRecord) -> None:
    with pytest.raises(ValueError, match="field"):
        pack("blobs", b"k", record)


@pytest.mark.parametrize(
    "change",
    [
        {"granularity": "page"},
        {"chunk_nbytes": 0},
        {"tokens": (1,)},
        {"tokens": (1, -1)},
        {"tokens": (1, 1 << 63)},
        {"pieces": (PieceRecord((0,), (1,), ()),)},
        {"pieces": (PieceRecord((0,), (1,), (-1,)),)},
        {"pieces": (PieceRecord((0,), (1,), (1 << 63,)),)},
        {"pieces": (PieceRecord((2,), (1,), (0,)),)},
        {"pieces": (PieceRecord((-1, 0), (1, 1), (0,)),)},
        {"pieces": (PieceRecord((0, 0, 0), (1,), (0,)),)},
        {"checksums": (b"abc",)},
    ],
)
def test_a_sequence_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"granularity|nbytes|tokens|piece|ends|checksums|field"):
        pack("sequences", b"k", replace(SEQUENCE, **change))


def test_a_sequence_at_the_ends_of_its_ranges_is_kept() -> None:
    smallest = replace(SEQUENCE, chunk_nbytes=1, pieces=(), tokens=(0, 0), checksums=(b"",))
    row = pack("sequences", b"k", smallest)
    assert unpack("sequences", b"k", row, parse_sequence) == smallest


def test_a_row_of_format_1_is_read_as_one_piece() -> None:
    """As releases before 0.2 wrote it: shape, chunk and extent size, granularity, counts; dtype,
    row map, offset, size and number of checksum bytes of each extent, all checksums."""
    chunk, extent = 16384, 4 * 16384
    offsets = [(7 << 20) + number * extent for number in range(4)]
    fields = (2, 2, 64, 500, 1, chunk, extent, 0, 7, 4, 3)
    body = struct.pack("<5qqqBBII", *fields) + b"float16" + b"map"
    for number, offset in enumerate(offsets):
        body += struct.pack("<qqI", offset, 256 * (65 if number < 2 else 3), 8 if number < 2 else 4)
    body += b"aaaabbbb" + b"ccccdddd" + b"eeee" + b"ffff"
    assert unpack("sequences", b"k", sealed(3, b"k", body), parse_sequence) == SequenceRecord(
        shape=KVShape(2, 2, 64, "float16", 500),
        granularity="layer",
        chunk_nbytes=chunk,
        pieces=(PieceRecord((0,), (4,), tuple(offsets)),),
        tokens=(65, 3),
        checksums=(b"aaaabbbb", b"ccccdddd", b"eeee", b"ffff"),
        row_map=b"map",
    )
    for place in (0, 40, 48, 56):
        wrong = bytearray(body)
        wrong[place] ^= 3
        with pytest.raises(CorruptionError):
            unpack("sequences", b"k", sealed(3, b"k", bytes(wrong)), parse_sequence)
