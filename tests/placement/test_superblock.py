"""The superblock: round trips, damage, and the choice between copies."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdk_kv.errors import CorruptionError, StoreMismatch
from spdk_kv.placement.superblock import (
    COPY_OFFSETS,
    DATA_START,
    DRIVE_ID_NBYTES,
    SUPERBLOCK_NBYTES,
    Superblock,
    choose,
    fit_drive_id,
    is_blank,
    pack,
    parse,
)

SB = Superblock(
    uuid="00112233445566778899aabbccddeeff",
    block_nbytes=4096,
    capacity_nbytes=1 << 40,
    generation=7,
    drive_id="QEMU NVMe Ctrl/deadbeef/1",
    geometry="268435456 blocks of 4096 bytes",
)
OTHER = replace(SB, uuid="f" * 32)
BLANK = bytes(SUPERBLOCK_NBYTES)
BAD = b"\xff" * SUPERBLOCK_NBYTES


def sealed(block: bytes, **fields: tuple[int, str, int]) -> bytes:
    """``block`` with fields (offset, struct format, value) overwritten and a good checksum."""
    edited = bytearray(block)
    for offset, layout, value in fields.values():
        struct.pack_into(layout, edited, offset, value)
    struct.pack_into("<I", edited, 4092, zlib.crc32(edited[:4092]))
    return bytes(edited)


@given(
    st.builds(
        Superblock,
        uuid=st.binary(min_size=16, max_size=16).map(bytes.hex),
        block_nbytes=st.integers(9, 20).map(lambda bits: 1 << bits),
        capacity_nbytes=st.integers(1 << 20, (1 << 63) - 1),
        generation=st.integers(0, (1 << 63) - 1),
        drive_id=st.text(st.characters(), max_size=700),
        geometry=st.text(st.characters(), max_size=200),
    )
)
def test_every_superblock_comes_back_as_it_was_packed(superblock: Superblock) -> None:
    block = pack(superblock)
    assert len(block) == SUPERBLOCK_NBYTES
    assert parse(block) == superblock
    assert choose([block, block]) == superblock


def test_the_longest_identity_and_geometry_come_back() -> None:
    longest = replace(SB, drive_id="x" * DRIVE_ID_NBYTES, geometry="y" * 126)
    assert parse(pack(longest)) == longest


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flip_in_any_byte_is_corruption(mask: int) -> None:
    block = bytearray(pack(SB))
    for place in range(SUPERBLOCK_NBYTES):
        block[place] ^= mask
        with pytest.raises(CorruptionError):
            parse(bytes(block))
        block[place] ^= mask
    assert parse(bytes(block)) == SB


@given(st.binary(max_size=SUPERBLOCK_NBYTES + 1))
def test_foreign_bytes_are_corruption(block: bytes) -> None:
    with pytest.raises(CorruptionError):
        parse(block)
    fields = pack(SB)[:12] + block[:4080].ljust(4080, b"\0")
    with suppress(CorruptionError):  # all that nonsense under a good checksum may raise
        parse(sealed(fields + bytes(4)))


@pytest.mark.parametrize(
    "field",
    [
        (12, "<I", 0),
        (12, "<I", 1000),
        (16, "<Q", 0),
        (16, "<Q", 1 << 63),
        (24, "<Q", 1 << 63),
        (562, "<H", 127),
    ],
)
def test_fields_out_of_range_are_corruption_under_a_good_checksum(
    field: tuple[int, str, int],
) -> None:
    with pytest.raises(CorruptionError, match="out of range"):
        parse(sealed(pack(SB), field=field))


def test_a_newer_version_is_a_mismatch_and_an_older_unknown_one_corruption() -> None:
    with pytest.raises(StoreMismatch, match="version 2"):
        parse(sealed(pack(SB), version=(8, "<I", 2)))
    with pytest.raises(CorruptionError):
        parse(sealed(pack(SB), version=(8, "<I", 0)))


def test_a_superblock_from_before_the_geometry_was_kept_has_none() -> None:
    block = bytearray(pack(SB))
    block[562:4092] = bytes(4092 - 562)
    assert parse(sealed(bytes(block))) == replace(SB, geometry="")


def test_a_long_drive_identity_is_cut_between_characters() -> None:
    cut = fit_drive_id("x" + "é" * DRIVE_ID_NBYTES)
    assert cut == "x" + "é" * ((DRIVE_ID_NBYTES - 1) // 2)
    assert replace(SB, drive_id="x" + "é" * DRIVE_ID_NBYTES).drive_id == cut
    assert fit_drive_id("a\udc80b") == "a?b"


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": "0" * 31},
        {"uuid": "F" * 32},
        {"block_nbytes": 1000},
        {"block_nbytes": 256},
        {"capacity_nbytes": 4095},
        {"generation": -1},
    ],
)
def test_a_superblock_out_of_range_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SB, **change)


def test_the_bytes_are_those_of_the_format() -> None:
    body = (
        b"spdk_kv\0"
        + struct.pack("<IIQQ", 1, 4096, 1 << 40, 7)
        + bytes.fromhex("00112233445566778899aabbccddeeff")
        + struct.pack("<H", 25)
        + b"QEMU NVMe Ctrl/deadbeef/1".ljust(512, b"\0")
        + struct.pack("<H", 30)
        + b"268435456 blocks of 4096 bytes"
    ).ljust(4092, b"\0")
    assert pack(SB) == body + struct.pack("<I", zlib.crc32(body))
    assert (COPY_OFFSETS, DATA_START) == ((0, 524288), 1048576)


def test_copies_lie_before_the_data_and_do_not_touch() -> None:
    first, second = COPY_OFFSETS
    assert first + SUPERBLOCK_NBYTES <= second
    assert second + SUPERBLOCK_NBYTES <= DATA_START


def test_only_whole_zeroed_copies_are_blank() -> None:
    assert is_blank(BLANK)
    assert not is_blank(b"")
    assert not is_blank(BLANK[1:])
    assert not is_blank(BLANK[1:] + b"\1")
    assert choose([BLANK, BLANK]) is None


def test_the_newest_good_copy_is_chosen() -> None:
    newer = replace(SB, generation=8, capacity_nbytes=1 << 41)
    assert choose([pack(SB), pack(newer)]) == newer
    assert choose([pack(newer), pack(SB)]) == newer


@pytest.mark.parametrize("lost", [BLANK, BAD, pack(SB)[:-1], pack(SB)[:512] + BLANK[512:]])
def test_one_good_copy_is_enough(lost: bytes) -> None:
    assert choose([lost, pack(SB)]) == SB
    assert choose([pack(SB), lost]) == SB


@pytest.mark.parametrize("copies", [[BAD, BAD], [BLANK, BAD], [BAD, BLANK], [BLANK, b""]])
def test_no_good_copy_and_not_all_blank_is_corruption(copies: list[bytes]) -> None:
    with pytest.raises(CorruptionError):
        choose(copies)


def test_copies_of_two_stores_are_a_mismatch() -> None:
    with pytest.raises(StoreMismatch, match="different stores"):
        choose([pack(SB), pack(replace(OTHER, generation=9))])


def test_copies_that_contradict_each_other_are_a_mismatch() -> None:
    with pytest.raises(StoreMismatch, match="differ"):
        choose([pack(SB), pack(replace(SB, capacity_nbytes=1 << 41))])


def test_a_newer_copy_beside_an_older_one_is_a_mismatch() -> None:
    with pytest.raises(StoreMismatch, match="upgrade"):
        choose([pack(SB), sealed(pack(SB), version=(8, "<I", 2))])


def test_choosing_from_nothing_never_means_blank() -> None:
    with pytest.raises(ValueError, match="at least one"):
        choose([])
