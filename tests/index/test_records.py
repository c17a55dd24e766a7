"""The records of the index: round trips through their rows, damaged rows, fields out of range."""

from __future__ import annotations

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
    SequenceRecord,
    UnitRecord,
    pack,
    parse_blob,
    parse_sequence,
    unpack,
)
from spdk_kv.types import KVShape

MOST = (1 << 63) - 1
BLOB = BlobRecord(offset=1 << 20, nbytes=4096, dtype="bfloat16", shape=(2, 1024), crc=0xDEADBEEF)
SEQUENCE = SequenceRecord(
    shape=KVShape(layers=2, kv_heads=4, head_dim=64, dtype="float16", max_tokens=128, batch=3),
    granularity="head",
    chunk_nbytes=65536,
    extent_nbytes=1 << 20,
    units=(UnitRecord(1 << 20, 5, b"abcd"), UnitRecord(1 << 21, 1 << 20, b"")),
    row_map=b"\0\1\2",
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
sequences = st.builds(
    SequenceRecord,
    shape=st.builds(
        KVShape,
        layers=dimensions,
        kv_heads=dimensions,
        head_dim=dimensions,
        dtype=st.sampled_from(["bfloat16", "float32"]),
        max_tokens=dimensions,
        batch=dimensions,
    ),
    granularity=st.sampled_from(["layer", "head"]),
    chunk_nbytes=dimensions,
    extent_nbytes=st.integers(1 << 20, MOST),
    units=st.lists(
        st.builds(UnitRecord, offset=offsets, nbytes=st.integers(0, 1 << 20), checksums=checksums),
        max_size=4,
    ).map(tuple),
    row_map=st.binary(max_size=30),
)


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
            row = sealed(3, key, body)
            assert pack(table, key, unpack(table, key, row, parse_sequence)) == row


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
    again = replace(one, offset=one.offset // 2, crc=one.crc ^ 1)
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
        {"granularity": "token"},
        {"chunk_nbytes": 0},
        {"extent_nbytes": 0},
        {"extent_nbytes": 1 << 63, "units": ()},
        {"units": (UnitRecord(-1, 1, b""),)},
        {"units": (UnitRecord(0, SEQUENCE.extent_nbytes + 1, b""),)},
        {"units": (UnitRecord(1 << 63, 1, b""),)},
        {"units": (UnitRecord(0, 1, b"abc"),)},
    ],
)
def test_a_sequence_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"granularity|nbytes|extent|checksums|field"):
        pack("sequences", b"k", replace(SEQUENCE, **change))


def test_a_sequence_at_the_ends_of_its_ranges_is_kept() -> None:
    units = (UnitRecord(0, 0, b""), UnitRecord(1, 1, b"crc1"))
    smallest = replace(SEQUENCE, chunk_nbytes=1, extent_nbytes=1, units=units)
    row = pack("sequences", b"k", smallest)
    assert unpack("sequences", b"k", row, parse_sequence) == smallest
