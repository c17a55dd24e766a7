"""What is noted beside the K/V of a lasting sequence: the identity of the model, and the text."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from spdk_kv.integrations.notes import NoteHead, pack_head, read_head
from spdk_kv.integrations.transformers.identity import Identity
from spdk_kv.integrations.transformers.text import Ids, Text


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
    head = NoteHead(text.crc, len(text), text.rows, len(identity), hits, used_s)
    return b"".join((pack_head(head, identity), identity, text.ids.tobytes()))


def decode(note: bytes) -> Note | None:
    """The note in these bytes; None where they are not one, or one of another release."""
    head = read_head(note)
    if head is None or zlib.crc32(memoryview(note)[head.ids_at :]) != head.ids_crc:
        return None
    try:
        identity = _unpack_identity(note[head.identity_at : head.ids_at])
    except (zlib.error, ValueError, TypeError, KeyError):
        return None
    ids = np.frombuffer(note, "<u4", offset=head.ids_at).reshape(head.tokens, head.rows)
    return Note(identity, ids, head.hits, head.used_s)
