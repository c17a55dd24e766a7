"""SQLite's write-ahead log as bytes: which of its pages are committed.

The format is fixed (https://www.sqlite.org/fileformat2.html#the_write_ahead_log). A log begins
with a header, whose salt changes whenever SQLite begins to write the log anew. Frames follow: a
header and a page each. One counts as long as its salt is the log's and the checksum over all frames
up to it is right; a transaction counts once its last frame, which says so, does.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np

HEADER_NBYTES = 32

_HEADER = struct.Struct(">8I")  # magic, format, page size, checkpoint, salt (2), checksum (2)
_FRAME = struct.Struct(">6I")  # page number, pages in all after a commit or 0, salt, checksum
_MAGIC = 0x377F0682  # the lowest bit: whether checksums are of big-endian words
_FORMAT = 3007000
_MASK = 0xFFFFFFFF
# Frames whose sums are computed at once: of 4 KiB each, they and their words take 2 MiB.
_BATCH = 256


def apply_log(image: bytearray, log: bytes) -> None:
    """Makes ``image``, the bytes of a database, what it is with the committed pages of ``log``.

    Pages that are not in ``log`` have to be right; those that are may be anything.
    """
    if not has_header(log):
        return
    magic, _, page_nbytes, _, *salt = _HEADER.unpack_from(log)
    pages, total = _committed(log, page_nbytes, bool(magic & 1), salt[:2], salt[2:])
    if not total:
        return
    nbytes = total * page_nbytes
    del image[nbytes:]
    image.extend(bytes(nbytes - len(image)))
    for number, at in pages.items():
        if number <= total:
            image[(number - 1) * page_nbytes : number * page_nbytes] = log[at : at + page_nbytes]


def has_header(log: bytes) -> bool:
    """Whether ``log``, or what begins with these bytes, is a log at all: SQLite takes an empty file
    for none, and one whose header is damaged."""
    if len(log) < HEADER_NBYTES:
        return False
    magic, version, page_nbytes, _, _, _, *checksum = _HEADER.unpack_from(log)
    if magic & ~1 != _MAGIC or version != _FORMAT:
        return False
    if not 512 <= page_nbytes <= 65536 or page_nbytes & (page_nbytes - 1):
        return False
    words = np.frombuffer(log, ">u4" if magic & 1 else "<u4", 6).astype(np.uint32)
    return bool(_sums(words[None], 0)[0].tolist() == checksum)


def _committed(
    log: bytes, page_nbytes: int, is_big: bool, salt: list[int], checksum: list[int]
) -> tuple[dict[int, int], int]:
    """The place in ``log`` of each page that is committed, by number, and the number of pages of
    the database; 0 where nothing is committed."""
    frame_nbytes = _FRAME.size + page_nbytes
    count = (len(log) - HEADER_NBYTES) // frame_nbytes
    frames = np.frombuffer(
        log, ">u4" if is_big else "<u4", count * frame_nbytes // 4, HEADER_NBYTES
    )
    frames = frames.reshape(count, frame_nbytes // 4)
    pages: dict[int, int] = {}
    begun: dict[int, int] = {}
    total = 0
    first, second = checksum
    own = _power((2 + page_nbytes // 4) // 2)
    sums: list[list[int]] = []
    for number in range(count):
        at = HEADER_NBYTES + number * frame_nbytes
        page, ends, *rest = _FRAME.unpack_from(log, at)
        if rest[:2] != salt or not page:
            break
        if number % _BATCH == 0:
            # The salt and the checksum itself, words 2 to 5, do not count.
            sums = _sums(frames[number : number + _BATCH].astype(np.uint32), 4).tolist()
        added = sums[number % _BATCH]
        first, second = (
            (own[0] * first + own[1] * second + added[0]) & _MASK,
            (own[1] * first + own[2] * second + added[1]) & _MASK,
        )
        if rest[2:] != [first, second]:
            break
        begun[page] = at + _FRAME.size
        if ends:
            pages.update(begun)
            begun.clear()
            total = ends
    return pages, total


def _sums(words: np.ndarray[Any, Any], gap: int) -> np.ndarray[Any, Any]:
    """The checksum of each row of ``words``, began at zero; ``gap`` words from the third on do not
    count.

    SQLite adds two words x, y at a time: a += x + b, b += y + a. That is linear, so that all of it
    is one product with constant weights, modulo 2**32.
    """
    weights = _weights(words.shape[1] - gap)
    if gap:
        weights = np.insert(weights, [2] * gap, 0, axis=0)
    found: np.ndarray[Any, Any] = words @ weights
    return found


@lru_cache(8)
def _weights(count: int) -> np.ndarray[Any, Any]:
    """What each of ``count`` words adds to the two halves of a checksum, [count, 2]."""
    weights = np.empty((count, 2), np.uint32)
    # Of one step, [[1, 1], [1, 2]], taken as often as pairs follow.
    p, q, r = 1, 0, 1
    for at in range(count - 2, -1, -2):
        weights[at] = (p + q) & _MASK, (q + r) & _MASK
        weights[at + 1] = q, r
        p, q, r = (p + q) & _MASK, (q + r) & _MASK, (q + 2 * r) & _MASK
    return weights


@lru_cache(8)
def _power(pairs: int) -> tuple[int, int, int]:
    """[[1, 1], [1, 2]] to the power ``pairs``, which is symmetric: its first row, and the last
    number of its second."""
    p, q, r = 1, 0, 1
    for _ in range(pairs):
        p, q, r = (p + q) & _MASK, (q + r) & _MASK, (q + 2 * r) & _MASK
    return p, q, r
