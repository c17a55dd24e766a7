"""What is noted beside the K/V of a lasting sequence: the identity of the model, and the text."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.text import Ids, Text

# magic with the version of the format; CRC-32 of all up to the ids, without these 12 bytes; then
# CRC-32 of the ids, tokens, rows, bytes of the identity, hits, Unix time of the last use. The
# identity (zlib, JSON, UTF-8) and the ids (uint32, token after token) follow. Little-endian.
_MAGIC = b"KVNOTE01"
_SUM = struct.Struct("<I")
_HEAD = struct.Struct("<IIIIId")


@dataclass(frozen=True)
class Note:
    """The identity that K/V was computed with, and the text.

    ``hits``: how often its beginning was taken up; ``used_s``: Unix time of the last use.
    """

    identity: Identity
    ids: Ids
    hits: int = 0
    used_s: float = 0.0

    def used_again(self, now_s: float) -> Note:
        return replace(self, hits=self.hits + 1, used_s=now_s)

    def encode(self) -> bytes:
        packed = pack_identity(self.identity)
        return encode(packed, Text(self.ids), self.hits, self.used_s)


def pack_identity(identity: Identity) -> bytes:
    """The identity as it stands in a note."""
    return zlib.compress(json.dumps(identity.to_json(), sort_keys=True).encode())


@lru_cache(maxsize=64)
def _unpack_identity(packed: bytes) -> Identity:
    # Thousands of notes of one model are read, when their index is made.
    fields: Any = json.loads(zlib.decompress(packed))
    return Identity.from_json(fields)


def encode(identity: bytes, text: Text, hits: int = 0, used_s: float = 0.0) -> bytes:
    """The bytes of a note. Copies the ids, and sums up nothing but the rest."""
    head = _HEAD.pack(text.crc, len(text), text.rows, len(identity), hits, used_s) + identity
    return b"".join((_MAGIC, _SUM.pack(zlib.crc32(head)), head, text.ids.tobytes()))


def decode(note: bytes) -> Note | None:
    """The note in these bytes; None where they are not one, or one of another release."""
    at = len(_MAGIC) + _SUM.size
    try:
        if note[: len(_MAGIC)] != _MAGIC:
            return None
        ids_crc, tokens, rows, identity_nbytes, hits, used_s = _HEAD.unpack_from(note, at)
        end = at + _HEAD.size + identity_nbytes
        if _SUM.unpack_from(note, len(_MAGIC))[0] != zlib.crc32(note[at:end]):
            return None
        if zlib.crc32(note[end:]) != ids_crc or len(note) != end + 4 * tokens * rows:
            return None
        identity = _unpack_identity(note[at + _HEAD.size : end])
        ids = np.frombuffer(note, "<u4", offset=end).reshape(tokens, rows)
        return Note(identity, ids, hits, used_s)
    except (struct.error, zlib.error, ValueError, TypeError, KeyError):
        return None
