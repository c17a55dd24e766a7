"""The reading half of a layer: starts readings and joins them with what is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from spdk_kv._native.transfer import PREFETCH
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.buffer import ReadBuffer
from spdk_kv.sequence.chunks import ChunkWrite
from spdk_kv.sequence.contents import Contents
from spdk_kv.sequence.order import RowOrder
from spdk_kv.sequence.prefetched import Prefetched
from spdk_kv.sequence.reading import Reading, by_path
from spdk_kv.sequence.tail import Tail
from spdk_kv.tensors import tensor_from
from spdk_kv.units import align_up

if TYPE_CHECKING:
    import torch


class Reader:
    """Reads a layer's tokens. Its lock guards it.

    What the drive does not have yet comes from memory: from the ``pending`` writes and the
    ``tail``, which both belong to the writer.
    """

    def __init__(
        self,
        contents: Contents,
        pending: deque[ChunkWrite],
        tail: Tail,
        order: RowOrder,
        paths: Orchestrator,
        staging: StagingPool,
        verify: bool,
    ) -> None:
        self.prefetched = Prefetched(paths.ahead)
        self._contents = contents
        self._layout = contents.layout
        self._pending = pending
        self._tail = tail
        self._order = order
        self._paths = paths
        self._staging = staging
        self._verify = verify

    # -- reading --------------------------------------------------------------------------------

    def plan(
        self, first: int, last: int, extents: range, spare: int, gpu: LinkedGpu | None = None
    ) -> Reading:
        """A reading with a buffer for tokens ``[first, last)``, and ``spare`` more, of ``extents``:
        on ``gpu``, or in staging memory."""
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        start, end = self._layout.token_range(first, last)
        per_extent = max(end, align_up((last + spare) * row, chunk)) - start
        buffer = ReadBuffer(self._staging, len(extents) * per_extent, gpu)
        return self._reading(buffer, extents, first, start, per_extent)

    def _reading(
        self, buffer: ReadBuffer, extents: range, first: int, start: int, per_extent: int
    ) -> Reading:
        return Reading(
            self._contents, self._paths, buffer, extents, first, start, per_extent, self._verify
        )

    def extend(self, reading: Reading, last: int, priority: int = 0) -> None:
        """Starts to read what is on the drive of the tokens up to ``last``, and was not requested
        yet. Bytes that are still being written are left to :meth:`finish`."""
        self._extend_to(reading, self._layout.token_range(0, last)[1], priority)

    def _extend_to(self, reading: Reading, end: int, priority: int = 0) -> None:
        end = min(self.on_drive_nbytes, end)
        if end <= reading.requested:
            return
        for unit, extents in by_path(self._contents.units, reading.extents):
            request = partial(reading.request, unit, extents, priority)
            if unit is None:
                request(self._paths.routes.direct, reading.requested, end)
            else:
                self._paths.routes.route(unit, reading.requested, end, request)
        reading.requested = end

    @property
    def on_drive_nbytes(self) -> int:
        """Bytes of every extent that the drive has; the rest is in memory."""
        stored = self._contents.stored_nbytes
        return min(self._pending[0].start, stored) if self._pending else stored

    def in_memory(self, extents: range, start: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What is in memory of bytes ``[start, end)`` of ``extents``: where a part of it begins,
        and that, ``[extents, bytes]``."""
        stored = self._contents.stored_nbytes
        for write in self._pending:
            at, until = max(write.start, start), min(write.end, end, stored)
            if at < until:
                # Sooner than from the drive, which has yet to write it.
                yield at, write.part(extents, at, until)
        if end > stored:
            at = max(stored, start)
            yield at, self._tail.part(extents, at, end)

    def has_room(self, reading: Reading, last: int) -> bool:
        """Whether the buffer has room up to token ``last``."""
        end = max(self._layout.token_range(0, last)[1], reading.start)
        return end - reading.start <= reading.per_extent

    def finish(self, reading: Reading, last: int, deadline: Deadline = NEVER) -> torch.Tensor:
        """Waits for the reading, checks it, and returns the tokens as bytes,
        ``[extents, nbytes]``."""
        reading.complete(deadline)
        buffer, extents, start = reading.buffer, reading.extents, reading.start
        if last == reading.first:
            return buffer.local(tensor_from(None, "uint8", (len(extents), 0)))
        row = self._layout.row_nbytes
        begin, end = reading.first * row, last * row
        rows = buffer.as_bytes(len(extents), reading.per_extent)
        for at, part in self.in_memory(extents, start, end):
            rows[:, at - start : at - start + part.shape[1]] = buffer.local(part)
        return self._order.apply(rows[:, begin - start : end - start], reading.first, last, buffer)

    def read_chunk(self, start: int, deadline: Deadline) -> torch.Tensor:
        """The stored chunk from byte ``start`` of every extent, in memory of its own. Waits."""
        return self.begin_chunk(start, deadline)()

    def begin_chunk(self, start: int, deadline: Deadline) -> Callable[[], torch.Tensor]:
        """Starts what :meth:`read_chunk` does; the call that is returned does the rest."""
        every = self._contents.extents
        return self._begin_range(every, start, start + self._layout.chunk_nbytes, deadline)

    def read_range(self, number: int, start: int, end: int, deadline: Deadline) -> torch.Tensor:
        """Bytes ``[start, end)`` of extent ``number``, whole chunks that the drive has. Waits."""
        return self._begin_range(range(number, number + 1), start, end, deadline)()[0]

    def _begin_range(
        self, extents: range, start: int, end: int, deadline: Deadline
    ) -> Callable[[], torch.Tensor]:
        buffer = self.buffer(len(extents) * (end - start))
        reading = self._reading(buffer, extents, 0, start, end - start)
        self._extend_to(reading, end)

        def finish() -> torch.Tensor:
            reading.complete(deadline)
            return buffer.as_bytes(len(extents), end - start)

        return finish

    def buffer(self, nbytes: int) -> ReadBuffer:
        """Staging memory to read into."""
        return ReadBuffer(self._staging, nbytes, None)

    # -- reading ahead --------------------------------------------------------------------------

    def prefetch(self, first: int, spare: int, gpu: LinkedGpu | None = None) -> None:
        """Starts to read all tokens from ``first`` on, with room for ``spare`` more;
        :meth:`take_prefetched` hands them over. Does not wait."""
        tokens = self._contents.tokens
        reading = self.plan(first, tokens, self._contents.extents, spare, gpu)
        self.prefetched.put(reading)
        self.extend(reading, tokens, PREFETCH)

    def has_prefetched(self, first: int) -> bool:
        """Whether a prefetch from token ``first`` on is held."""
        reading = self.prefetched.reading
        return reading is not None and reading.first == first

    def prefetch_nbytes(self, first: int, spare: int) -> int:
        """Memory that a prefetch of all tokens from ``first`` on would take."""
        if self.has_prefetched(first):
            return 0
        start, end = self._layout.token_range(first, self._contents.tokens + spare)
        return self._layout.extents * (end - start)

    def take_prefetched(self, first: int) -> Reading | None:
        """What was prefetched, if it begins at ``first`` and has room for all tokens.

        Not if it is still on its way directly while the layer has been promoted: read through the
        page cache now, the layer need not be read from the drive in the next scan.
        """
        reading = self.prefetched.reading
        if reading is not None:
            fits = reading.first == first and self.has_room(reading, self._contents.tokens)
            units = self._contents.units
            if not fits or (self._paths.routes.reads_fill_cache(units) and reading.bypasses_cache):
                self.prefetched.drop()
        return self.prefetched.take()
