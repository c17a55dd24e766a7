"""What QEMU's blklogwrites recorded of a drive, and what the drive may hold after a power cut.

The format is that of the kernel's dm-log-writes (Documentation/admin-guide/device-mapper/
log-writes.rst): a superblock, then for each request a header of one sector and its data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = 0x6A736677736872
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_SECTOR = 512


@dataclass(frozen=True)
class Entry:
    """One request. ``data``: of a write. ``flush``: everything before it is on the medium."""

    offset: int
    nbytes: int
    flush: bool
    discard: bool
    data: bytes


def read_log(path: Path) -> Iterator[Entry]:
    """The requests in order, to the end of the file."""
    with path.open("rb") as log:
        head = log.read(_SECTOR)
        magic, _, _, sector_nbytes = struct.unpack_from("<QQQI", head)
        assert (magic, sector_nbytes) == (_MAGIC, _SECTOR), "not a log of writes"
        while len(head := log.read(_SECTOR)) == _SECTOR:
            sector, sectors, flags, _ = struct.unpack_from("<QQQQ", head)
            discard = bool(flags & _DISCARD)
            data = b"" if discard else log.read(sectors * _SECTOR)
            yield Entry(sector * _SECTOR, sectors * _SECTOR, bool(flags & _FLUSH), discard, data)


class Replay:
    """The image of a drive, built up request by request.

    ``volatile_nbytes``: the drive's first bytes, whose writes may be lost until the next flush;
    of those behind, each is on the medium in its turn.
    """

    def __init__(self, entries: list[Entry], nbytes: int, volatile_nbytes: int) -> None:
        self._entries = entries
        self._volatile_nbytes = volatile_nbytes
        self._image = np.zeros(nbytes, np.uint8)
        self._applied = 0

    def flushed_before(self, cut: int) -> int:
        """Up to where everything is on the medium if power fails after ``cut`` requests."""
        flushes = (n for n in range(cut, 0, -1) if self._entries[n - 1].flush)
        return next(flushes, 0)

    def image(self, cut: int, random: np.random.Generator | None) -> np.ndarray:
        """The image after ``cut`` requests, which only grow from call to call.

        ``random``: chooses which of the volatile writes are lost, and which are torn; None loses
        none.
        """
        safe = self.flushed_before(cut)
        while self._applied < safe:
            _apply(self._image, self._entries[self._applied])
            self._applied += 1
        image = self._image.copy()
        for entry in self._entries[safe:cut]:
            kept = random is None or entry.offset >= self._volatile_nbytes
            # Lost, on the medium, or some of its sectors.
            fate = 1 if kept else int(random.integers(3))
            if fate:
                torn = random.random(entry.nbytes // _SECTOR) < 0.5 if fate == 2 else None
                _apply(image, entry, torn)
        return image


def _apply(image: np.ndarray, entry: Entry, sectors: np.ndarray | None = None) -> None:
    if not entry.nbytes:
        return
    place = image[entry.offset : entry.offset + entry.nbytes].reshape(-1, _SECTOR)
    new = np.zeros(entry.nbytes, np.uint8) if entry.discard else np.frombuffer(entry.data, np.uint8)
    chosen = slice(None) if sectors is None else sectors
    place[chosen] = new.reshape(-1, _SECTOR)[chosen]
