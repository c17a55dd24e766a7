"""What lies before the extents of a drive: superblocks, which are read, written, and refused where
something else may lie there, and the count of commits."""

from __future__ import annotations

import logging
import os

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import Engine
from spdk_kv.errors import (
    CorruptionError,
    DeviceTimeout,
    SpdkKvError,
    StoreMismatch,
    is_unreadable,
)
from spdk_kv.index import Index
from spdk_kv.placement import (
    COPY_OFFSETS,
    COUNT_NBYTES,
    COUNT_OFFSET,
    SUPERBLOCK_NBYTES,
    Superblock,
    choose,
    pack,
    pack_count,
    parse_count,
)
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.units import align_down

log = logging.getLogger(__name__)

# As long as a drive takes that writes at all.
_COUNT_TIMEOUT_S = 5.0
# This much at either end of a drive has to be zero before a store is begun on it: partition
# tables, filesystems, md and LVM all leave a mark within it.
_BLANK_NBYTES = 1 << 20
# Bytes in which one copy may differ from the other and still be damage: a torn write, a few
# flipped bits. Whatever formats a drive writes more.
_MOST_DAMAGED_NBYTES = 64


def read_superblock(drive: Engine) -> Superblock | None:
    """The newest good superblock; None where there is none yet. CorruptionError, DeviceError."""
    return choose(read_copies(drive))


def read_copies(drive: Engine) -> list[bytes]:
    """The bytes at the places of both superblocks; zeroes where a data file is too short."""
    return [_read_if_there(drive, offset, SUPERBLOCK_NBYTES) for offset in COPY_OFFSETS]


def write_superblock(drive: Engine, superblock: Superblock) -> None:
    """Writes both copies, each on the medium before the next: a power cut spoils at most one."""
    for offset in COPY_OFFSETS:
        drive.run(_prepare(drive, offset, pack(superblock), Region(SUPERBLOCK_NBYTES)))
        drive.flush()


def read_count(drive: Engine, uuid: str) -> int:
    """How many commits the index of store ``uuid`` had made at least; 0 where nothing says so."""
    return parse_count(read_count_block(drive), uuid)


def read_count_block(drive: Engine) -> bytes:
    """The block with the count of commits, for :func:`parse_count`; zeroes where it cannot be
    read."""
    try:
        return _read_if_there(drive, COUNT_OFFSET, COUNT_NBYTES)
    except SpdkKvError as failure:
        if not is_unreadable(failure):
            raise
        # It shows old copies and nothing else. Written anew, the block can be read again.
        log.warning("the count of commits on %s cannot be read: %s", drive.where, failure)
        return bytes(COUNT_NBYTES)


class CountWriter:
    """Tells ``drive`` how many commits ``index`` has made.

    What a commit let go of must not be overwritten before the drive has its number: an older copy
    of the index would still name those bytes as its own, and pass. So a commit starts the write,
    and whoever may write over such bytes waits for it (:meth:`settle`). It is not flushed, and
    after a power cut the drive may have an older number. What it has is never newer than what the
    index has on its medium, or a good store would be refused.
    """

    def __init__(self, drive: Engine, index: Index) -> None:
        self._drive = drive
        self._index = index
        self._region = Region(COUNT_NBYTES)
        self._begun = index.commits
        self._last: Transfer | None = None
        self._is_behind = False

    def update(self, timeout_s: float | None) -> None:
        """Starts to write the number of the last commit, where that is not done yet.

        What fails is logged and raises nothing: the commit stands, and the next one tries again.
        Waits for the write before, which is over by now unless the drive hangs: ``timeout_s`` at
        most, and 5 s from its start. One thread at a time.
        """
        try:
            self._update(self._index.commits, timeout_s)
        except SpdkKvError as failure:
            self._warn(failure)

    def _update(self, commits: int, timeout_s: float | None) -> None:
        last = self._last
        if last is not None:
            if last.in_flight:
                last.wait(timeout_s)
            if last.in_flight:  # of two at once the older could come last
                raise DeviceTimeout("an earlier write of it is not over", op="write")
            if last.status:
                self._warn(self._drive.error(last))
                self._begun = -1
            else:
                self._is_behind = False
        if commits != self._begun:
            block = pack_count(self._index.uuid, commits)
            self._last = _prepare(self._drive, COUNT_OFFSET, block, self._region)
            self._last.submit(_COUNT_TIMEOUT_S)
            self._begun = commits

    def settle(self, deadline: Deadline = NEVER) -> None:
        """Blocks until the last write is over, 5 s from its start at most. DeviceTimeout past
        ``deadline``. Thread-safe."""
        last = self._last
        if last is not None and last.in_flight and last.wait(deadline.left_s()) is None:
            raise deadline.error(f"writing the count of commits to {self._drive.where}")

    def end(self) -> None:
        """As :meth:`settle`, and lets go of the drive's queue, and with it of its memory."""
        self.settle()
        self._last = None

    def _warn(self, failure: Exception) -> None:
        if not self._is_behind:
            where = self._drive.where
            log.warning("the count of commits on %s stays behind its index: %s", where, failure)
        self._is_behind = True


def _prepare(drive: Engine, offset: int, block: bytes, region: Region) -> Transfer:
    """The transfer that writes ``block``, from ``region``."""
    transfer = drive.transfer(WRITE)
    transfer.keep(region)
    memoryview(region)[: len(block)] = block
    transfer.add(offset, region.address, len(block))
    return transfer


def _read_if_there(drive: Engine, offset: int, nbytes: int) -> bytes:
    """Zeroes where a data file is too short."""
    if drive.capacity_nbytes is None and os.path.getsize(drive.where) < offset + nbytes:
        return bytes(nbytes)
    return _read(drive, offset, nbytes)


def _read(drive: Engine, offset: int, nbytes: int) -> bytes:
    region = Region(nbytes)
    transfer = drive.transfer(READ)
    transfer.keep(region)
    transfer.add(offset, region.address, nbytes)
    drive.run(transfer)
    return bytes(memoryview(region)[:nbytes])


def refuse_unless_blank(drive: Engine) -> None:
    """StoreMismatch unless both ends of a drive are zero."""
    size = drive.capacity_nbytes or 0
    for offset in {0, max(0, align_down(size - _BLANK_NBYTES, BLOCK_NBYTES))}:
        if any(_read(drive, offset, min(_BLANK_NBYTES, size - offset))):
            raise StoreMismatch(
                f"{drive.where} is not blank within the MiB at offset {offset} and holds no store "
                "of spdk_kv; it is not touched. `wipefs -n` and `blkid` say what may be on it"
            )


def refuse_if_written_over(path: str, copies: list[bytes]) -> None:
    """StoreMismatch where something was written over a part of a store. A filesystem or partition
    table leaves the second superblock, and must not pass for a store whose first one is damaged,
    which opening would mend."""
    first, second = copies
    changed = sum(a != b for a, b in zip(first, second, strict=True))
    if changed <= _MOST_DAMAGED_NBYTES:
        return
    for bad, good in ((0, 1), (1, 0)):
        try:
            choose([copies[bad]])
        except CorruptionError:
            at, source = COPY_OFFSETS[bad], COPY_OFFSETS[good]
            raise StoreMismatch(
                f"{path} held a store, but something else was written at offset {at} (`wipefs -n` "
                "and `blkid` may say what); it is not touched. If it is damage and nothing more, "
                f"mend it: copy its 4096 bytes at offset {source} to offset {at} (of a node: dd "
                f"if={path} of={path} bs=4096 count=1 conv=notrunc skip={source // 4096} "
                f"seek={at // 4096})"
            ) from None
