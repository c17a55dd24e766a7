"""Copies of units for the page cache, for a drive that the kernel's page cache does not reach.

The truth stays on the drive: all writes go there, and the index refers only to it. Each unit on the
page-cache path has a prefix of every extent *filled*: that prefix lies in the copy and is read from
there. The rest is read from the drive, and once it has passed its checksum it fills more of the
copy. These rules keep bytes that are no longer the unit's from being served:

- A unit has one fill under way at a time, and what was truncated meanwhile does not count.
- A unit that leaves the path has nothing filled from that moment on, and another ``copy_epoch``; a
  read that began before does not use what it finds.
- Its range is punched out of the copy only after its fill has ended. Until then nothing is filled
  there, whether for the same unit or for the next owner of the extents.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from spdk_kv._native.holding import Account
from spdk_kv._native.transfer import PREFETCH, WRITE, Transfer
from spdk_kv.engines import CopyPageCacheEngine
from spdk_kv.errors import ClosedError, DeviceTimeout, SpdkKvError
from spdk_kv.paths.units import Extents, Fill, TrackedUnit
from spdk_kv.placement import StagingPool
from spdk_kv.tensors import tensor_from
from spdk_kv.units import align_down, format_nbytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Decisions (about one per decode step) after a failure before filling is tried again. Chosen: a
# full disk takes seconds to be freed.
_PAUSE_DECISIONS = 64
# How often a wait for the end of a fill checks whether the store was closed.
_CLOSED_CHECK_S = 0.2


@dataclass(eq=False)
class Hole:
    """What a unit leaves in the copy: its ranges, and the fill that may still write there."""

    extents: Extents
    fill: Fill | None


@dataclass(eq=False)
class Copy:
    """The copies of all units. Every method but :meth:`punch` takes ``lock``, the orchestrator's,
    or is called with it held.

    ``max_held_nbytes``: memory for what is on its way into the copy. What finds no room there is
    not filled this time. ``trouble``: why nothing is filled at present; empty if all is well.
    """

    engine: CopyPageCacheEngine
    lock: threading.RLock
    max_held_nbytes: int
    written_nbytes: int = 0
    trouble: str = ""
    _pause_decisions: int = 0
    _warned: bool = False
    _holes: list[Hole] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._pool = StagingPool(self.engine.allocate, self.max_held_nbytes)
        self._account = Account()

    @property
    def _held_nbytes(self) -> int:
        """Bytes on their way into the copy."""
        return self._account.nbytes

    def fill(self, unit: TrackedUnit, start: int, lines: torch.Tensor, chunk_nbytes: int) -> None:
        """Fills as much of the copy as ``lines`` continue it and there is room. Takes a copy of
        ``lines`` and returns; a failure of the copy is not raised (see :attr:`trouble`).

        Args:
            unit: whose bytes they are. The caller holds its layer's lock, so they stay so.
            start: byte of every extent at which ``lines`` begin.
            lines: uint8 ``[extents, bytes]``, in host or GPU memory.
            chunk_nbytes: bytes that share a checksum; fills end at such a boundary.
        """
        fill = transfer = None
        try:
            with self.lock:
                fill = self._plan(unit, start, lines, chunk_nbytes)
                if fill is None:
                    return
                fill.hold = self._account.hold(fill.nbytes)
                unit.fill = fill
            transfer = self._prepare(unit, fill, lines[:, fill.start - start : fill.end - start])
            self.engine.start(transfer, partial(self._on_written, unit, fill), priority=PREFETCH)
        except BaseException as failure:
            # A transfer that was started before an interrupt ends like any other.
            has_begun = transfer is not None and (transfer.in_flight or transfer.done)
            if fill is not None and not has_begun:
                self._end(unit, fill)
            if not isinstance(failure, (SpdkKvError, MemoryError)):
                raise

    def _plan(
        self, unit: TrackedUnit, start: int, lines: torch.Tensor, chunk_nbytes: int
    ) -> Fill | None:
        """The part of ``lines`` that can be written now, if any."""
        count, nbytes = lines.shape
        is_paused = self._closed or self._pause_decisions
        if is_paused or not (unit.cached and unit.copyable) or unit.fill is not None:
            return None
        if count != unit.count or not start <= unit.filled < start + nbytes:
            return None
        if any(_overlap(hole.extents, unit.extents) for hole in self._holes):
            return None
        room = align_down((self.max_held_nbytes - self._held_nbytes) // count, chunk_nbytes)
        # One chunk is always admitted, or a small limit would admit nothing for ever.
        room = max(room, 0 if self._held_nbytes else chunk_nbytes)
        end = min(start + nbytes, unit.filled + room)
        return Fill(count, unit.filled, end, unit.copy_epoch) if end > unit.filled else None

    def _prepare(self, unit: TrackedUnit, fill: Fill, lines: torch.Tensor) -> Transfer:
        # Not straight from ``lines``: the reader may change that memory before it is written.
        width = fill.end - fill.start
        lease = self._pool.lease(fill.nbytes)
        tensor_from(lease, "uint8", (fill.count, width)).copy_(lines)
        transfer = self.engine.transfer(WRITE)
        transfer.keep(lease)
        address = lease.address
        for offset, nbytes in unit.ranges(fill.start, fill.end):
            transfer.add(offset, address, nbytes)
            address += nbytes
        return transfer

    def _on_written(self, unit: TrackedUnit, fill: Fill, transfer: Transfer) -> None:
        with self.lock:
            if transfer.status:
                self.pause(self.engine.error(transfer))
            else:
                self._accept(unit, fill)
        self._end(unit, fill)

    def _end(self, unit: TrackedUnit, fill: Fill) -> None:
        with self.lock:
            if unit.fill is fill:
                unit.fill = None
            fill.hold = None
        fill.ended.set()

    def _accept(self, unit: TrackedUnit, fill: Fill) -> None:
        if self._warned:
            log.info("%s: the page cache is filled again", self.engine.where)
            self._warned = False
        self.written_nbytes += fill.nbytes
        more = min(fill.end, fill.valid_end) - unit.filled
        if fill.copy_epoch == unit.copy_epoch and more > 0:
            unit.filled += more
            unit.warmed_nbytes += more * fill.count

    def pause(self, failure: Exception) -> None:
        """The copy could not be written or read: fills nothing for a while."""
        if self._closed or isinstance(failure, ClosedError):
            return
        # Only the first clause: the remedy behind it is for the store's own drive.
        self.trouble = str(failure).split(";")[0]
        self._pause_decisions = _PAUSE_DECISIONS
        if not self._warned:
            log.warning("%s; going on without filling the page cache", self.trouble)
            self._warned = True

    def before_decision(self) -> None:
        """Counts down a pause, and sheds unused memory."""
        self._pool.shed()
        self._pause_decisions = max(0, self._pause_decisions - 1)
        if not self._pause_decisions:
            self.trouble = ""

    # -- what is filled shrinks -----------------------------------------------------------------

    def forget(self, unit: TrackedUnit) -> Hole:
        """Nothing of ``unit`` is filled from now on. Returns what is left to :meth:`punch`."""
        # What lies on shared ground is the copy of another unit.
        hole = self.leave(unit.extents if unit.copyable else (), unit.fill)
        unit.filled = 0
        unit.copy_epoch += 1
        return hole

    def leave(self, extents: Extents, fill: Fill | None) -> Hole:
        """Nothing is filled in ``extents`` from now on, where ``fill`` may still write. Returns
        what is left to :meth:`punch`."""
        hole = Hole(extents, fill)
        self._holes.append(hole)
        return hole

    def punch(self, hole: Hole) -> None:
        """Frees the ranges of ``hole`` in the file. Blocks for that, and until the fill that may
        still write there has ended."""
        while hole.fill is not None and not hole.fill.ended.wait(_CLOSED_CHECK_S):
            if self._closed:
                return
        for offset, nbytes in hole.extents:
            if self._closed:
                return  # the whole file is about to go
            try:
                self.engine.drop(offset, nbytes)
            except DeviceTimeout as late:
                # The drop may still happen, and would take later fills with it: keep the hole.
                log.warning("%s; nothing more is copied there", late)
                return
            except (OSError, SpdkKvError) as refused:
                log.debug("%s: a range stays in the copy: %s", self.engine.where, refused)
        with self.lock:
            self._holes.remove(hole)

    def sweep(self, unit: TrackedUnit) -> None:
        """Drops the pages of zeros that a read of ``unit`` left in memory after its hole was
        punched. Pages that were filled anew meanwhile are dirty, and stay."""
        with suppress(OSError):  # the store may have been closed meanwhile
            for offset, nbytes in unit.extents:
                os.posix_fadvise(self.engine.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    # -- what is reported -----------------------------------------------------------------------

    def stats(self, cached: Iterable[TrackedUnit]) -> dict[str, Any]:
        """``cached``: the units on the page-cache path."""
        return {
            "page_cache_dir": self.engine.where,
            "copied_nbytes": sum(unit.served_nbytes for unit in cached),
            "written_nbytes": self.written_nbytes,
            "trouble": self.trouble,
        }

    def shortfall(self, unit: TrackedUnit) -> str:
        """For people: how much of a unit on the page-cache path is copied, if not all of it."""
        if not unit.cached or unit.served_nbytes == unit.nbytes:
            return ""
        text = f"; {format_nbytes(unit.served_nbytes)} of it are there so far"
        return f"{text}: {self.trouble}" if self.trouble else text

    def close(self) -> None:
        """Nothing is filled from now on; the engine is closed by its owner."""
        self._closed = True


def _overlap(first: Extents, second: Extents) -> bool:
    return any(a < b + m and b < a + n for a, n in first for b, m in second)
