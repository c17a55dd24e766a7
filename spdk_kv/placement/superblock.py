"""The block at the head of a drive that says whose store it is; bytes only, no I/O."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from spdk_kv.errors import CorruptionError, StoreMismatch

SUPERBLOCK_NBYTES = 4096
"""Bytes of one copy."""
COPY_OFFSETS = (0, 512 * 1024)
"""Offsets of the copies on the drive: far apart, so that one bad spot does not take both."""
DATA_START = 1024 * 1024
"""Offset of the first payload byte; a multiple of every block size that is accepted."""
DRIVE_ID_NBYTES = 512
"""Most bytes of a drive's identity, in UTF-8; longer ones are cut."""
GEOMETRY_NBYTES = 126
"""Most bytes of a drive's geometry, as of its identity."""

_MAGIC = b"spdk_kv\0"
_VERSION = 1
# The magic, the version and the CRC in the last four bytes keep their places in every version,
# so that an old program knows a newer store from a broken one.
_LAYOUT = struct.Struct("<8sIIQQ16sH")
# Added later, in what were zeroes, which is what stores from before have: an empty geometry.
_GEOMETRY = struct.Struct("<H")
_GEOMETRY_OFFSET = _LAYOUT.size + DRIVE_ID_NBYTES
_CRC = struct.Struct("<I")
_CRC_OFFSET = SUPERBLOCK_NBYTES - _CRC.size
_UUID = re.compile(r"[0-9a-f]{32}")


def fit_drive_id(text: str) -> str:
    """``text`` as a superblock keeps it: at most DRIVE_ID_NBYTES of UTF-8, characters whole.

    What UTF-8 cannot encode (lone surrogates) becomes ``?``. Whoever compares a drive with
    ``superblock.drive_id`` passes its identity through this first.
    """
    return _fit(text, DRIVE_ID_NBYTES)


def _fit(text: str, nbytes: int) -> str:
    return text.encode("utf-8", "replace")[:nbytes].decode("utf-8", "ignore")


@dataclass(frozen=True)
class Superblock:
    """The identity and geometry of a store. Fields out of range raise ValueError.

    ``uuid``: 32 lower-case hexadecimal digits. ``block_nbytes``: a power of two from 512 to
    DATA_START. ``capacity_nbytes``: payload bytes from DATA_START on, at least one block.
    ``generation``: counts the writes of the superblock. ``drive_id``: what identifies
    the drive (model, serial, namespace); kept as ``fit_drive_id`` makes it. ``geometry``: the
    drive's block size and size in words; "" for a file, and in superblocks from before it was kept.
    """

    uuid: str
    block_nbytes: int
    capacity_nbytes: int
    generation: int
    drive_id: str
    geometry: str = ""

    def __post_init__(self) -> None:
        if not _UUID.fullmatch(self.uuid):
            raise ValueError(f"uuid is 32 lower-case hexadecimal digits, not {self.uuid!r}")
        block = self.block_nbytes
        if not 512 <= block <= DATA_START or block & (block - 1):
            raise ValueError(f"block_nbytes is a power of two from 512, not {block}")
        if not block <= self.capacity_nbytes < 1 << 63:
            raise ValueError(f"capacity_nbytes is out of range: {self.capacity_nbytes}")
        if not 0 <= self.generation < 1 << 63:
            raise ValueError(f"generation is out of range: {self.generation}")
        object.__setattr__(self, "drive_id", fit_drive_id(self.drive_id))
        object.__setattr__(self, "geometry", _fit(self.geometry, GEOMETRY_NBYTES))


def pack(superblock: Superblock) -> bytes:
    """The SUPERBLOCK_NBYTES to write at each of COPY_OFFSETS."""
    drive_id = superblock.drive_id.encode()
    fields = _LAYOUT.pack(
        _MAGIC,
        _VERSION,
        superblock.block_nbytes,
        superblock.capacity_nbytes,
        superblock.generation,
        bytes.fromhex(superblock.uuid),
        len(drive_id),
    )
    geometry = superblock.geometry.encode()
    body = (fields + drive_id).ljust(_GEOMETRY_OFFSET, b"\0")
    body = (body + _GEOMETRY.pack(len(geometry)) + geometry).ljust(_CRC_OFFSET, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def parse(block: bytes) -> Superblock:
    """The superblock in one copy.

    CorruptionError unless every byte is as it was packed; StoreMismatch where a newer version of
    spdk_kv packed it.
    """
    if len(block) != SUPERBLOCK_NBYTES or block[: len(_MAGIC)] != _MAGIC:
        raise CorruptionError("not a superblock of spdk_kv: wrong size or magic")
    if _CRC.unpack_from(block, _CRC_OFFSET)[0] != zlib.crc32(block[:_CRC_OFFSET]):
        raise CorruptionError("the superblock's checksum does not match")
    _, version, block_nbytes, capacity_nbytes, generation, uuid, id_nbytes = _LAYOUT.unpack_from(
        block
    )
    if version > _VERSION:
        raise StoreMismatch(
            f"the superblock has version {version}; this spdk_kv knows {_VERSION}: upgrade it"
        )
    (geometry_nbytes,) = _GEOMETRY.unpack_from(block, _GEOMETRY_OFFSET)
    if version < _VERSION or id_nbytes > DRIVE_ID_NBYTES or geometry_nbytes > GEOMETRY_NBYTES:
        raise CorruptionError("the superblock's version or a length in it is out of range")
    geometry_at = _GEOMETRY_OFFSET + _GEOMETRY.size
    try:
        return Superblock(
            uuid=uuid.hex(),
            block_nbytes=block_nbytes,
            capacity_nbytes=capacity_nbytes,
            generation=generation,
            drive_id=block[_LAYOUT.size : _LAYOUT.size + id_nbytes].decode(),
            geometry=block[geometry_at : geometry_at + geometry_nbytes].decode(),
        )
    except ValueError as error:
        raise CorruptionError(f"the superblock's fields are out of range: {error}") from error


def is_blank(block: bytes) -> bool:
    """Whether one copy's place holds SUPERBLOCK_NBYTES of zeroes (a short read does not)."""
    return block == bytes(SUPERBLOCK_NBYTES)


def choose(copies: Sequence[bytes]) -> Superblock | None:
    """The newest good copy of a drive's; None where all are blank: there is no store yet.

    CorruptionError where none is good and not all are blank (foreign data looks like this, and
    must not be formatted over). StoreMismatch where good copies are not of one store, contradict
    each other, or one is of a newer version.
    """
    if not copies:
        raise ValueError("choose() needs at least one copy")
    if all(is_blank(copy) for copy in copies):
        return None
    good = []
    for copy in copies:
        try:
            good.append(parse(copy))
        except CorruptionError:
            continue
    if not good:
        raise CorruptionError(
            "the drive is not blank and none of its superblocks is good: it holds foreign data "
            "or a damaged store"
        )
    if len({superblock.uuid for superblock in good}) > 1:
        raise StoreMismatch("the drive's superblocks belong to different stores")
    newest = max(good, key=lambda superblock: superblock.generation)
    if any(sb.generation == newest.generation and sb != newest for sb in good):
        raise StoreMismatch("the drive's superblocks have one generation but differ")
    return newest
