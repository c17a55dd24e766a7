"""Moves what lies at the end of a store to free runs nearer to its beginning.

The order that keeps the truth is that of a put: the bytes are copied to an extent that is free,
then flushed, then the record that names it is committed, and only then is the old extent free. A
process may be killed at any step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from spdk_kv._native.checksum import crc32c_combine
from spdk_kv._native.transfer import READ, WRITE
from spdk_kv.deadline import NEVER
from spdk_kv.engines import Engine
from spdk_kv.errors import SpdkKvError, is_unreadable
from spdk_kv.placement import Allocator, StagingPool
from spdk_kv.store.backing import Backing
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.movable import Movable, Move
from spdk_kv.store.records import Records
from spdk_kv.store.reserved import Reserved
from spdk_kv.units import MIB, align_up

log = logging.getLogger(__name__)

# The staging memory that it takes. Whole blocks, so that a larger extent goes in pieces.
_COPY_NBYTES = 16 * MIB
# A commit at least after so much was copied, so that what it frees can take what comes next.
_COMMIT_NBYTES = 128 * MIB
# Free runs looked at for one extent.
_MOST_RUNS = 1000
# Each pass moves what found no place in the one before. Every move is downwards, so it ends anyway.
_PASSES = 16


@dataclass
class _Moving:
    """An extent on its way to ``target``, which is reserved for it."""

    move: Move
    target: int
    crc: int = 0


class Compactor:
    """Moves extents of one store.

    ``movables``: what may be moved. ``commit`` commits what was moved, and blocks.
    """

    def __init__(
        self,
        records: Records,
        engine: Engine,
        backing: Backing,
        reserved: Reserved,
        movables: Sequence[Movable],
        commit: Callable[[], None],
    ) -> None:
        self._records = records
        self._engine = engine
        self._backing = backing
        self._reserved = reserved
        self._movables = movables
        self._commit = commit

    def run(self, staging: StagingPool, is_stopping: Callable[[], bool]) -> int:
        """Moves what can be moved towards the beginning, in ``staging`` memory of 16 MiB, until
        nothing can or ``is_stopping``. Blocks on the drive. Returns how many bytes were moved.

        CapacityError where the filesystem has no room for a place that it once gave back, or the
        index none for records; DeviceError. What was moved by then stays moved.
        """
        moved = 0
        if not self._engine.keeps_bytes:
            return 0
        for _ in range(_PASSES):
            in_pass = 0
            with closing(self._groups(is_stopping)) as groups:
                for group in groups:
                    in_pass += self._move(group, staging)
                    self._commit()
            if not in_pass or is_stopping():
                break
            moved += in_pass
        return moved

    def _groups(self, is_stopping: Callable[[], bool]) -> Generator[list[_Moving], None, None]:
        """What is moved before each commit, from the end of the store downwards."""
        group: list[_Moving] = []
        nbytes = 0
        try:
            for movable, offset in self._from_the_end():
                if is_stopping():
                    break
                if not group:
                    self._reserved.wait_until_unwanted()
                moving = self._begin(movable, offset)
                if moving is None:
                    continue
                group.append(moving)
                nbytes += moving.move.nbytes
                if nbytes >= _COMMIT_NBYTES or self._reserved.is_wanted:
                    full, group, nbytes = group, [], 0
                    yield full
            if group:
                full, group = group, []
                yield full
        finally:
            self._cancel(group)

    def _from_the_end(self) -> Iterable[tuple[Movable, int]]:
        found = [(offset, movable) for movable in self._movables for offset in movable.offsets()]
        found.sort(key=lambda pair: pair[0], reverse=True)
        return ((movable, offset) for offset, movable in found)

    def _begin(self, movable: Movable, offset: int) -> _Moving | None:
        """None where there is no free run for it below, or it cannot be moved."""
        allocator = self._records.extents.allocator
        with self._records.lock:
            nbytes = allocator.live.get(offset, 0)
            if not nbytes or (target := _lowest(allocator, offset, nbytes)) is None:
                return None
            move = movable.begin(offset)
            if move is None:
                return None
            if not self._reserved.take(target, target, nbytes):
                move.cancel()
                return None
        try:
            if self._backing.lacks([target], [nbytes]):
                self._backing.fill([target], [nbytes], 0, NEVER)
        except BaseException:
            self._cancel([_Moving(move, target)])
            raise
        return _Moving(move, target)

    def _cancel(self, group: Iterable[_Moving]) -> None:
        for moving in group:
            moving.move.cancel()
            self._reserved.give_back(moving.target)

    def _move(self, group: list[_Moving], staging: StagingPool) -> int:
        """Copies all of ``group`` and gives out the new records; returns how many bytes moved."""
        over = nbytes = 0
        try:
            whole = self._copy(group, staging)
            for moving, is_whole in zip(group, whole, strict=True):
                over += 1
                if not is_whole:
                    self._cancel([moving])
                elif self._finish(moving):
                    nbytes += moving.move.nbytes
        finally:
            self._cancel(group[over:])
        return nbytes

    def _finish(self, moving: _Moving) -> bool:
        with self._records.lock:
            if moving.move.finish(moving.target):
                self._reserved.keep(moving.target)
                return True
            self._reserved.give_back(moving.target)
            return False

    # -- bytes ----------------------------------------------------------------------------------

    def _copy(self, group: list[_Moving], staging: StagingPool) -> list[bool]:
        """Copies the bytes; says of each whether those that arrived are those of its record."""
        damaged: set[int] = set()
        for batch in _batches(group):
            pieces = [piece for piece in batch if piece[0] not in damaged]
            if not pieces:
                continue
            try:
                self._copy_pieces(group, pieces, staging)
            except SpdkKvError as failure:
                if not is_unreadable(failure):
                    raise
                if len(pieces) == 1:
                    damaged.add(pieces[0][0])
                    continue
                for piece in pieces:  # which one it was
                    if piece[0] in damaged:
                        continue
                    try:
                        self._copy_pieces(group, [piece], staging)
                    except SpdkKvError as again:
                        if not is_unreadable(again):
                            raise
                        damaged.add(piece[0])
        whole = [
            number not in damaged and moving.crc == moving.move.crc
            for number, moving in enumerate(group)
        ]
        for moving, is_whole in zip(group, whole, strict=True):
            if not is_whole:
                offset = moving.move.offset
                log.warning("what lies at offset %d is damaged, and is not moved", offset)
        return whole

    def _copy_pieces(
        self, group: list[_Moving], pieces: list[tuple[int, int, int]], staging: StagingPool
    ) -> None:
        """Reads ``pieces`` (which of ``group``, from, bytes), then writes them."""
        leases = [staging.lease(nbytes) for _, _, nbytes in pieces]
        read = self._engine.transfer(READ, checksum=True)
        write = self._engine.transfer(WRITE, checksum=True)
        for lease, (number, start, nbytes) in zip(leases, pieces, strict=True):
            moving = group[number]
            read.keep(lease)
            read.add(moving.move.offset + start, lease.address, nbytes, lease.capacity)
            write.keep(lease)
            write.add(moving.target + start, lease.address, nbytes)
        self._engine.run(read)
        self._engine.run(write)
        for place, (number, start, nbytes) in enumerate(pieces):
            moving = group[number]
            # Of what was written. It is that of what was read, or nothing is given out.
            crc = write.crc(place)
            moving.crc = crc if not start else crc32c_combine(moving.crc, crc, nbytes)


def _lowest(allocator: Allocator, offset: int, nbytes: int) -> int | None:
    """Where the lowest free run begins, of those below ``offset`` that are looked at, that holds
    ``nbytes``."""
    runs = islice(allocator.gaps_below(offset, nbytes), _MOST_RUNS)
    return min((start for start, _ in runs), default=None)


def _batches(group: list[_Moving]) -> Iterator[list[tuple[int, int, int]]]:
    """All bytes of ``group`` in pieces (which, from, bytes), as many as are copied at once."""
    batch: list[tuple[int, int, int]] = []
    room = _COPY_NBYTES
    for number, moving in enumerate(group):
        start = 0
        while start < moving.move.nbytes:
            nbytes = min(moving.move.nbytes - start, room)
            batch.append((number, start, nbytes))
            start += nbytes
            room -= align_up(nbytes, BLOCK_NBYTES)
            if room < BLOCK_NBYTES:
                yield batch
                batch, room = [], _COPY_NBYTES
    if batch:
        yield batch
