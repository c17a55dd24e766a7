"""The page cache's own copy of units, for a drive that the kernel's page cache does not reach.

The truth stays on the drive: all writes go there, and the index refers to it alone. Of each unit on
the page-cache path a prefix of every extent is *filled*: it lies in the copy too, and is read from
there. The rest is read from the drive, and what was read, and passed its checksum, fills more.
Bytes that are not of the unit as it is now are never served:

- one fill of a unit is under way at a time, and counts only for what was not truncated meanwhile;
- a unit that leaves the path has nothing filled from that moment on, and another life: what a read
  under way finds after that is not used;
- its range is punched out of the copy only after its fill has ended, and until that is done nobody
  fills there, be it the same unit again or the next owner of the extents.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

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

# Decisions for which nothing is filled after something failed: then it is tried again.
_PAUSE = 64
_LOOK_S = 0.2


@dataclass(eq=False)
class Hole:
    """What a unit leaves behind: its ranges, and the fill that may still write there."""

    extents: Extents
    fill: Fill | None


@dataclass(eq=False)
class Copy:
    """What is filled, of which units. Every method but :meth:`punch` is called with ``lock``, the
    orchestrator's, held or takes it.

    ``most_nbytes``: memory for what is on its way into the copy; what finds no room there is not
    filled this time.
    """

    engine: CopyPageCacheEngine
    lock: threading.RLock
    most_nbytes: int
    written_nbytes: int = 0
    trouble: str = ""
    """Why nothing is filled at present; empty if all is well."""
    _held_nbytes: int = 0
    _pause: int = 0
    _warned: bool = False
    _holes: list[Hole] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._pool = StagingPool(self.engine.allocate, self.most_nbytes)

    def fill(self, unit: TrackedUnit, start: int, lines: torch.Tensor, chunk_nbytes: int) -> None:
        """Takes ``lines`` ([extents, bytes], on whatever device), the bytes of every extent of
        ``unit`` from ``start`` on, into the copy, as far as they continue what is filled and there
        is room.

        Called with the unit's layer locked, so that they are its bytes. Copies them and returns:
        they are written in the background. Does not raise for what goes wrong with the copy.
        """
        with self.lock:
            fill = self._begin(unit, start, lines, chunk_nbytes)
            if fill is None:
                return
            unit.fill = fill
            self._held_nbytes += fill.nbytes
        transfer = None
        try:
            transfer = self._prepare(unit, fill, lines[:, fill.start - start : fill.end - start])
            self.engine.start(transfer, partial(self._written, unit, fill), priority=PREFETCH)
        except BaseException as failure:
            # Interrupted after it was begun, it ends as any other.
            if transfer is None or not (transfer.in_flight or transfer.done):
                self._ended(unit, fill)
            if not isinstance(failure, (SpdkKvError, MemoryError)):
                raise

    def _begin(
        self, unit: TrackedUnit, start: int, lines: torch.Tensor, chunk_nbytes: int
    ) -> Fill | None:
        """What of ``lines`` is to be written now, if anything."""
        count, nbytes = lines.shape
        if self._closed or self._pause or not unit.cached or unit.fill is not None:
            return None
        if count != len(unit.extents) or not start <= unit.filled < start + nbytes:
            return None
        if any(_overlap(hole.extents, unit.extents) for hole in self._holes):
            return None
        room = align_down((self.most_nbytes - self._held_nbytes) // count, chunk_nbytes)
        # One chunk always may, however little room there is.
        room = max(room, 0 if self._held_nbytes else chunk_nbytes)
        end = min(start + nbytes, unit.filled + room)
        return Fill(count, unit.filled, end, unit.life) if end > unit.filled else None

    def _prepare(self, unit: TrackedUnit, fill: Fill, lines: torch.Tensor) -> Transfer:
        # Not from where the lines are: that memory is the reader's to change.
        width = fill.end - fill.start
        lease = self._pool.lease(fill.nbytes)
        tensor_from(lease, "uint8", (fill.count, width)).copy_(lines)
        transfer = self.engine.transfer(WRITE)
        transfer.keep(lease)
        for number, (offset, _) in enumerate(unit.extents):
            transfer.add(offset + fill.start, lease.address + number * width, width)
        return transfer

    def _written(self, unit: TrackedUnit, fill: Fill, transfer: Transfer) -> None:
        with self.lock:
            if transfer.status:
                self.failed(self.engine.error(transfer))
            else:
                self._took(unit, fill)
        self._ended(unit, fill)

    def _ended(self, unit: TrackedUnit, fill: Fill) -> None:
        with self.lock:
            unit.fill = None
            self._held_nbytes -= fill.nbytes
        fill.over.set()

    def _took(self, unit: TrackedUnit, fill: Fill) -> None:
        if self._warned:
            log.info("%s: the page cache is filled again", self.engine.where)
            self._warned = False
        self.written_nbytes += fill.nbytes
        more = min(fill.end, fill.cut) - unit.filled
        if fill.life == unit.life and more > 0:
            unit.filled += more
            unit.warmed_nbytes += more * fill.count

    def failed(self, failure: Exception) -> None:
        """The copy could not be written or read: nothing is filled for a while."""
        if self._closed or isinstance(failure, ClosedError):
            return
        self.trouble = str(failure).split(";")[0]  # without the remedy for a store's own drive
        self._pause = _PAUSE
        if not self._warned:
            log.warning("%s; going on without filling the page cache", self.trouble)
            self._warned = True

    def turn(self) -> None:
        """Another decision is made."""
        self._pool.shed()
        self._pause = max(0, self._pause - 1)
        if not self._pause:
            self.trouble = ""

    # -- what is filled shrinks -----------------------------------------------------------------

    def forget(self, unit: TrackedUnit) -> Hole:
        """From now on nothing of ``unit`` is filled. What is returned is to be punched."""
        hole = Hole(unit.extents, unit.fill)
        self._holes.append(hole)
        unit.filled = 0
        unit.life += 1
        return hole

    def punch(self, hole: Hole) -> None:
        """Blocks until the fill that may still write there is over, and on the file."""
        while hole.fill is not None and not hole.fill.over.wait(_LOOK_S):
            if self._closed:
                return
        for offset, nbytes in hole.extents:
            if self._closed:
                return  # it goes with the file
            try:
                self.engine.drop(offset, nbytes)
            except DeviceTimeout as late:
                log.warning("%s; nothing more is copied there", late)
                return  # it would take with it what is filled meanwhile
            except (OSError, SpdkKvError) as refused:
                log.debug("%s: a range stays in the copy: %s", self.engine.where, refused)
        with self.lock:
            self._holes.remove(hole)

    def sweep(self, unit: TrackedUnit) -> None:
        """A read came to ``unit`` after its hole was punched, and left pages of zeros in memory:
        those go. What is dirty, filled anew meanwhile, stays."""
        for offset, nbytes in unit.extents:
            os.posix_fadvise(self.engine.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    # -- what is told ---------------------------------------------------------------------------

    def stats(self, cached: Iterable[TrackedUnit]) -> dict[str, Any]:
        """``cached``: the units on the page-cache path."""
        return {
            "page_cache_dir": self.engine.where,
            "copied_nbytes": sum(unit.served_nbytes for unit in cached),
            "written_nbytes": self.written_nbytes,
            "trouble": self.trouble,
        }

    def lacks(self, unit: TrackedUnit) -> str:
        """What is to be said of a unit on the page-cache path that is not all there."""
        if not unit.cached or unit.served_nbytes == unit.nbytes:
            return ""
        told = f"; {format_nbytes(unit.served_nbytes)} of it are there so far"
        return f"{told}: {self.trouble}" if self.trouble else told

    def close(self) -> None:
        """Nothing is filled from now on; the engine is closed by its owner."""
        self._closed = True


def _overlap(first: Extents, second: Extents) -> bool:
    return any(a < b + m and b < a + n for a, n in first for b, m in second)
