"""The block on a drive that says how many commits its index has made; bytes only, no I/O.

The count beside the index shows that an index lost commits, but is copied and put back with it.
The drive is not. So an older copy of an index, whose records name extents that have other owners by
now, is noticed here. All of a count lies within one sector: a power cut tears none.
"""

from __future__ import annotations

import struct
import zlib

COUNT_OFFSET = 256 * 1024
"""Offset of the block, between the superblocks."""
COUNT_NBYTES = 4096

_MAGIC = b"skvcount"
_FIELDS = struct.Struct("<8s16sQ")  # magic, the store's uuid, commits; then the CRC of these
_CRC = struct.Struct("<I")


def pack_count(uuid: str, commits: int) -> bytes:
    """The COUNT_NBYTES to write at COUNT_OFFSET."""
    fields = _FIELDS.pack(_MAGIC, bytes.fromhex(uuid), commits)
    return (fields + _CRC.pack(zlib.crc32(fields))).ljust(COUNT_NBYTES, b"\0")


def parse_count(block: bytes, uuid: str) -> int:
    """How many commits the index of store ``uuid`` had made at least. 0 where the block says
    nothing: it is damaged, another store's, or blank, as older versions of spdk_kv leave it."""
    commits = int(_FIELDS.unpack_from(block)[2])
    return commits if block == pack_count(uuid, commits) else 0
