"""One reading of a layer's tokens: what is under way, by which path, and whether it is right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError, DeviceError, DeviceTimeout, SpdkKvError
from spdk_kv.paths import Orchestrator, TrackedUnit
from spdk_kv.sequence.buffer import ReadBuffer
from spdk_kv.sequence.contents import Contents, chunk_crcs

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Bytes ``[start, end)`` of some of a reading's extents, on their way by one path.

    ``each``: in how many pieces every extent is read. ``unit``: the unit that they belong to, if it
    is on the page-cache path; ``warm_epoch`` and ``copy_epoch`` are its own at the time of the
    request.
    """

    transfer: Transfer
    engine: Engine
    unit: TrackedUnit | None
    warm_epoch: int
    copy_epoch: int
    extents: range
    start: int
    end: int
    each: int


class Reading:
    """Tokens of some extents of a layer, on their way into one buffer.

    ``extents``: their numbers. ``first``: the first token. ``start``: the byte of the extents at
    which the buffer begins. ``per_extent``: bytes of the buffer for each. ``requested``: the byte
    up to which they have been requested.
    """

    def __init__(
        self,
        contents: Contents,
        paths: Orchestrator,
        buffer: ReadBuffer,
        extents: range,
        first: int,
        start: int,
        per_extent: int,
        verify: bool,
    ) -> None:
        self.buffer = buffer
        self.extents = extents
        self.first = first
        self.start = start
        self.per_extent = per_extent
        self.requested = start
        self.parts: list[Part] = []
        self._contents = contents
        self._paths = paths
        self._chunk_nbytes = contents.layout.chunk_nbytes
        self._verify = verify

    def request(
        self,
        unit: TrackedUnit | None,
        extents: range,
        priority: int,
        engine: Engine,
        start: int,
        end: int,
    ) -> None:
        """Starts to read bytes ``[start, end)`` of ``extents``; :meth:`complete` waits for it."""
        self.parts.append(self._begin(engine, unit, extents, start, end, priority))

    def _begin(
        self,
        engine: Engine,
        unit: TrackedUnit | None,
        extents: range,
        start: int,
        end: int,
        priority: int = 0,
    ) -> Part:
        warm_epoch, copy_epoch = (unit.warm_epoch, unit.copy_epoch) if unit else (0, 0)
        transfer = self.buffer.transfer(
            engine,
            len(extents) * (end - start),
            checksum=self._verify,
            chunk_nbytes=self._chunk_nbytes,
        )
        address = self.buffer.address + start - self.start
        for number in extents:
            at = address + (number - self.extents.start) * self.per_extent
            places = list(self._contents.ranges(number, start, end))
            for offset, nbytes in places:
                transfer.add(offset, at, nbytes)
                at += nbytes
        transfer.submit(None, priority)
        return Part(
            transfer, engine, unit, warm_epoch, copy_epoch, extents, start, end, len(places)
        )

    def complete(self, deadline: Deadline = NEVER) -> None:
        """Waits until all of it is there. What one path cannot deliver, the other one may. Whoever
        gives up waiting gives up the reading.

        Raises CorruptionError where a chunk's checksum differs, and the drive's errors.
        """
        try:
            for part in self.parts:
                self._receive(part, deadline)
        except BaseException:
            self.cancel()
            raise

    @property
    def bypasses_cache(self) -> bool:
        """Whether some of it is still on its way directly."""
        return any(part.unit is None and part.transfer.in_flight for part in self.parts)

    def cancel(self) -> None:
        """Stops reading. The drive may touch the buffer a little longer; it is kept until then."""
        for part in self.parts:
            if part.transfer.in_flight:
                part.transfer.cancel()

    def _receive(self, part: Part, deadline: Deadline) -> None:
        paths, unit = self._paths, part.unit
        through_cache = part.engine is not paths.routes.direct
        failure = self._failure_of(part, deadline)
        try:
            if through_cache and unit is not None and unit.copy_epoch != part.copy_epoch:
                # The copy was forgotten meanwhile: what was found there may be another unit's now.
                if failure is not None and self._may_still_land(part):
                    raise failure
                part = self._begin(paths.routes.direct, None, part.extents, part.start, part.end)
                self._complete(part, deadline)
                if paths.routes.copy is not None:
                    paths.routes.copy.sweep(unit)
                through_cache, unit = False, None
            elif failure is not None:
                if not self._take_over(part, failure, deadline):
                    raise failure
            elif unit is not None and not through_cache:
                delivered = partial(self._bytes_of, part)
                paths.fill_copy(unit, part.start, delivered, self._chunk_nbytes)
        finally:
            failure = None  # its frames have this one, and so the buffer
        transfer = part.transfer
        cached = unit if through_cache else None
        group = self._contents.units[0].group
        paths.record_read(group, cached, transfer.nbytes, transfer.cold_nbytes, part.warm_epoch)

    def _failure_of(self, part: Part, deadline: Deadline) -> SpdkKvError | None:
        """What a part failed by, once it is over; None where all is well."""
        try:
            self._complete(part, deadline)
        except DeviceTimeout:
            raise  # the drive may still write into the buffer
        except (DeviceError, CorruptionError) as failed:
            # Without its frames, which would keep the buffer until the garbage collector comes.
            return failed.with_traceback(None)
        return None

    def _may_still_land(self, part: Part) -> bool:
        """Whether a part that failed may still write over what is read in its place. Into host
        memory it may. Over a link it does not: copies arrive in the order in which they began, and
        after a failure none begins."""
        return part.transfer.in_flight and self.buffer.gpu is None

    def _bytes_of(self, part: Part) -> torch.Tensor:
        """What a part delivered, ``[extents, bytes]``."""
        first = self.extents.start
        rows = self.buffer.as_bytes(len(self.extents), self.per_extent)
        rows = rows[part.extents.start - first : part.extents.stop - first]
        return rows[:, part.start - self.start : part.end - self.start]

    def _complete(self, part: Part, deadline: Deadline) -> None:
        part.engine.wait(part.transfer, deadline)
        if not self._verify:
            return
        for segment, number in enumerate(part.extents):
            if chunk_crcs(part.transfer, segment, part.each) != self._contents.crcs(
                number, part.start, part.end
            ):
                raise CorruptionError(
                    f"{self._contents.name}: stored bytes between {part.start} and {part.end} of "
                    f"extent {number} are not those that were appended (CRC32C differs)"
                )

    def _take_over(self, part: Part, failure: SpdkKvError, deadline: Deadline) -> bool:
        """Reads what failed by the other path; returns whether that delivered it."""
        paths = self._paths
        engine = paths.routes.fallback(part.engine, part.unit, part.end)
        # Without checksums nobody could say whether the other path's bytes are the right ones.
        if engine is None or not self._verify or self._may_still_land(part):
            return False
        try:
            other = self._begin(engine, None, part.extents, part.start, part.end)
            self._complete(other, deadline)
        except SpdkKvError:
            return False
        log.warning("%s; the engine %s delivered it", failure, engine.name)
        lost = part.unit if engine is paths.routes.direct else None
        paths.record_takeover(lost, part.transfer.nbytes, failure)
        return True


def by_path(units: Sequence[TrackedUnit], extents: range) -> list[tuple[TrackedUnit | None, range]]:
    """Splits ``extents`` of a layer, whose ``units`` they are of, by path: those of each unit on
    the page-cache path with that unit, and those that are read directly with None."""
    if not any(unit.cached for unit in units):
        return [(None, extents)]
    parts: list[tuple[TrackedUnit | None, range]] = []
    first = 0
    for unit in units:
        part = range(max(extents.start, first), min(extents.stop, first + unit.count))
        if part:
            parts.append((unit if unit.cached else None, part))
        first += unit.count
    return parts
