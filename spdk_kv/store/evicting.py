"""Eviction: which of the blobs and sequences that nobody uses make room for a request."""

from __future__ import annotations

from collections.abc import Sequence

from spdk_kv.engines import Engine
from spdk_kv.errors import CapacityError
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.records import Records
from spdk_kv.store.settings import Eviction
from spdk_kv.store.windows import Windows
from spdk_kv.units import align_up, format_nbytes

# Every eviction costs a commit, so more is evicted at once than the request needs, for requests to
# come: at most this share of what the store holds
_SHARE_AHEAD = 32
# and half of what was evicted before, so that a store that was just opened loses little to a few
# requests. Nothing for one that is so much larger than usual: its like will not come soon.
_SHARE_OF_EVICTED = 2
_UNUSUAL = 4
# How fast "usual" follows the requests: each counts for this share.
_USUAL_SHARE = 16


class Evictor:
    """Evicts from ``records``. The caller holds the records' lock."""

    def __init__(self, records: Records, eviction: Eviction, engine: Engine) -> None:
        self._records = records
        self._eviction = eviction
        self._engine = engine
        self._usual_nbytes = 0.0
        self._evicted_nbytes = 0

    def asked(self, nbytes: int) -> None:
        """There is a request for that much."""
        self._usual_nbytes += (nbytes - self._usual_nbytes) / _USUAL_SHARE

    def evict(
        self, sizes: Sequence[int], end: int | None, holes: bool, refusal: CapacityError
    ) -> CapacityError | None:
        """Evicts something for extents of ``sizes`` bytes below ``end``; or returns the error that
        says what is lacking, where there would be no room even without all that nobody uses.

        The blobs and sequences used longest ago go. ``holes``: whether what was given back to the
        filesystem counts as free. ``refusal``: what the allocator said.
        """
        if self._eviction == "none":
            return self._lacking(refusal, end, holes, "")
        records = self._records
        allocator = records.extents.allocator
        limit = allocator.end if end is None else end
        blocks = [align_up(nbytes, BLOCK_NBYTES) for nbytes in sizes]
        free = allocator.free_nbytes - (allocator.end - limit)
        if not holes:
            free = sum(end - start for start, end in allocator.gaps_below(limit, BLOCK_NBYTES))
        windows = Windows(records, limit)
        victims: list[int] | None = None
        if sum(blocks) <= free + records.blob_nbytes:
            victims = windows.choose(blocks, self._ahead_nbytes(sum(blocks)))
        residents = records.residents
        newest = (
            max((residents.used_at(at) or 0 for at in victims), default=None) if victims else None
        )
        names = records.uses.choose(blocks, limit, newest)
        if names is None and victims is None:
            # Only both together may be enough: the oldest sequence goes, and the next time another.
            together = records.uses.choose(blocks, limit, None, residents.offsets())
            names = together[:1] if together else None
        if names is not None:
            self._evicted_nbytes += records.evict_sequences(names)
        elif victims is not None:
            self._evicted_nbytes += records.evict(victims)
        else:
            most = free + records.blob_nbytes + records.uses.unused_nbytes()
            text = format_nbytes(max(0, most))
            if sum(blocks) <= most:
                text = f"{format_nbytes(windows.largest())} in one piece"
            return self._lacking(refusal, end, holes, text)
        return None

    def _ahead_nbytes(self, nbytes: int) -> int:
        """How much is evicted beyond a request for ``nbytes``."""
        if nbytes > _UNUSUAL * self._usual_nbytes:
            return 0
        share = self._records.extents.allocator.used_nbytes // _SHARE_AHEAD
        return min(share, self._evicted_nbytes // _SHARE_OF_EVICTED)

    def _lacking(
        self, refusal: CapacityError, end: int | None, holes: bool, most: str
    ) -> CapacityError:
        """``refusal``, what there would be without all that nobody uses (``most``; "" if nothing is
        evicted), and what would help."""
        records = self._records
        text = str(refusal)
        if end is not None:
            text += (
                f"; {self._engine.where} can grow to {format_nbytes(end)} and no further, because "
                "its filesystem is full"
            )
        elif not holes:
            text += (
                f"; some of it {self._engine.where} gave back to its filesystem, which is full now"
            )
        kept = records.extents.allocator.used_nbytes - records.blob_nbytes
        if most:
            text += (
                "; nothing was evicted, since without any blob and any sequence that nobody uses "
                f"there would be {most}"
            )
        elif records.blob_nbytes:
            text += (
                f"; {format_nbytes(records.blob_nbytes)} belong to blobs, which eviction='none' "
                "keeps until they are deleted: store.delete(key)"
            )
        if kept:
            text += (
                f"; {format_nbytes(kept)} belong to sequences"
                + (", of which those stay that are in use, temporary or pinned," if most else "")
                + " or to reads and writes under way. Close what is not needed, or delete it: "
                "store.sequences() lists them, store.sequence(name).delete() frees one"
            )
        return CapacityError(text)
