"""Superblocks on the drive: read, written, and refused where something else may lie there."""

from __future__ import annotations

import os

from spdk_kv._native.memory import Region
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError, StoreMismatch
from spdk_kv.placement import COPY_OFFSETS, SUPERBLOCK_NBYTES, Superblock, choose, is_blank, pack
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.units import align_down

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
    size = drive.capacity_nbytes
    copies = []
    for offset in COPY_OFFSETS:
        if size is None and os.path.getsize(drive.where) < offset + SUPERBLOCK_NBYTES:
            copies.append(bytes(SUPERBLOCK_NBYTES))
        else:
            copies.append(_read(drive, offset, SUPERBLOCK_NBYTES))
    return copies


def write_superblock(drive: Engine, superblock: Superblock) -> None:
    """Writes both copies, each on the medium before the next: a power cut spoils at most one."""
    for offset in COPY_OFFSETS:
        region = Region(SUPERBLOCK_NBYTES)
        transfer = drive.transfer(WRITE)
        transfer.keep(region)
        memoryview(region)[:SUPERBLOCK_NBYTES] = pack(superblock)
        transfer.add(offset, region.address, SUPERBLOCK_NBYTES)
        drive.run(transfer)
        drive.flush()


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
    if any(map(is_blank, copies)) or changed <= _MOST_DAMAGED_NBYTES:
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
