"""The beginning of what caches note beside a stored sequence, to be read without their host.

A note is: magic with the version of the format, CRC-32 of what follows up to the ids, the fields of
:class:`NoteHead`, the identity of the model (compressed JSON), and the ids (uint32, token after
token). All little-endian.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

_MAGIC = b"KVNOTE01"
_SUM = struct.Struct("<I")
_HEAD = struct.Struct("<IIIIId")
_HEAD_AT = len(_MAGIC) + _SUM.size


class NoteHead(NamedTuple):
    """CRC-32 of the ids, their number in each row, rows, bytes of the identity, how often the text
    was taken up, and the Unix time of its last use."""

    ids_crc: int
    tokens: int
    rows: int
    identity_nbytes: int
    hits: int
    used_s: float

    @property
    def identity_at(self) -> int:
        """Where the identity begins."""
        return _HEAD_AT + _HEAD.size

    @property
    def ids_at(self) -> int:
        """Where the ids begin."""
        return self.identity_at + self.identity_nbytes


def pack_head(head: NoteHead, identity: bytes) -> bytes:
    """What stands before the identity."""
    packed = _HEAD.pack(*head)
    return _MAGIC + _SUM.pack(zlib.crc32(identity, zlib.crc32(packed))) + packed


def read_head(note: bytes) -> NoteHead | None:
    """The head of a note; None where it is none, one of another release, or damaged. The ids are
    not looked at."""
    if note[: len(_MAGIC)] != _MAGIC or len(note) < _HEAD_AT + _HEAD.size:
        return None
    head = NoteHead(*_HEAD.unpack_from(note, _HEAD_AT))
    if _SUM.unpack_from(note, len(_MAGIC))[0] != zlib.crc32(note[_HEAD_AT : head.ids_at]):
        return None
    return head if len(note) == head.ids_at + 4 * head.tokens * head.rows else None
