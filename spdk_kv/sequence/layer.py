"""One layer of a sequence: its K and V on the device, the unfinished last chunk in memory."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.transfer import PREFETCH, READ, WRITE, Transfer
from spdk_kv.errors import ClosedError, CorruptionError, DeviceError, SpdkKvError
from spdk_kv.index import UnitRecord
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator, TrackedUnit
from spdk_kv.placement import SequenceLayout, StagingPool
from spdk_kv.sequence.order import RowOrder
from spdk_kv.sequence.prefetched import Prefetched
from spdk_kv.sequence.reading import CRC_NBYTES, Reading, Room, by_path
from spdk_kv.sequence.rows import Write, lay_out, whole_chunks
from spdk_kv.tensors import tensor_from
from spdk_kv.types import torch_dtypes
from spdk_kv.units import align_down, align_up

if TYPE_CHECKING:
    import torch

_CRC = struct.Struct("<I")

# Laid out and written at once: what a prompt's K and V are cut into.
_SLICE_NBYTES = 16 << 20
# On its way to the device within one append; beyond it that waits for the oldest.
_MOST_PENDING_NBYTES = 64 << 20


class LayerCache:
    """K and V of one layer: ``2 * extents_per_unit`` extents that grow together.

    ``tokens`` have been appended; of every extent the first ``stored`` bytes were given to the
    device (some may be in flight), and the rest is in ``tails``. Every method wants
    ``lock`` held; those that wait for the device say so.

    Where a signal handler raises (Ctrl-C) amid a change, nobody knows how much of it was made: the
    layer then fails from there on.
    """

    def __init__(
        self,
        name: str,
        paths: Orchestrator,
        staging: StagingPool,
        layout: SequenceLayout,
        offsets: Sequence[int],
        units: Sequence[TrackedUnit],
        verify: bool,
    ) -> None:
        self.lock = threading.RLock()
        self.name = name
        self.tokens = 0
        self._stored = 0
        self.offsets = list(offsets)
        self._paths = paths
        self._engine = paths.writer
        self._units = units
        self._staging = staging
        self._layout = layout
        self._verify = verify
        self._dtype = torch_dtypes()[layout.shape.dtype]
        self._itemsize = layout.shape.itemsize
        self._crcs = [bytearray() for _ in self.offsets]
        self._tail_lease = staging.lease(len(self.offsets) * layout.chunk_nbytes)
        self._tails = tensor_from(
            self._tail_lease, "uint8", (len(self.offsets), layout.chunk_nbytes)
        )
        # Bytes of the tails that are on the device as they are in memory.
        self._tail_written = 0
        self._tail_write: Transfer | None = None
        self._writes: deque[Write] = deque()
        self.pending_nbytes = 0
        """Bytes of writes not yet settled."""
        self._failure: SpdkKvError | None = None
        self._in_doubt = DeviceError(
            f"{name}: a change was interrupted half way; delete the sequence and compute it again"
        )
        self.prefetched = Prefetched(paths)
        self._order = RowOrder(layout.shape)

    @property
    def stored(self) -> int:
        """Bytes of every extent, whole chunks, that were given to the device."""
        return self._stored

    @stored.setter
    def stored(self, nbytes: int) -> None:
        self._stored = nbytes
        for unit in self._units:
            self._paths.resized(unit, nbytes)

    @property
    def _tail_nbytes(self) -> int:
        return self.tokens * self._layout.row_nbytes - self.stored

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    # -- appending ------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor, device: LinkedGpu | None = None) -> None:
        """Adds tokens, ``[batch, kv_heads, tokens, head_dim]`` each. Starts writes; waits only
        while more than 64 MiB of this layer wait to be written. ``device``: where both are, if that
        is reached over a link.

        Many tokens are laid out in slices, so that a long prompt takes little memory, the same
        again and again, and the device writes while the next slice is laid out.
        """
        self._check_usable()
        self._end_tail_write()
        count, first = k.shape[2], 0
        step = count if device is not None else self._slice_tokens
        while True:
            last = min(first + step, count)
            change = self._prepare(k[:, :, first:last], v[:, :, first:last], device)
            # From here on until all of them are there, whatever is raised leaves only a part.
            self._failure = self._in_doubt
            change()
            first = last
            if first == count:
                break
            self._limit_pending()
        self._failure = None

    @property
    def _slice_tokens(self) -> int:
        return max(1, _SLICE_NBYTES // (self._layout.row_nbytes * len(self.offsets)))

    def _limit_pending(self) -> None:
        while self.pending_nbytes > _MOST_PENDING_NBYTES:
            self._settle_oldest()

    def _prepare(
        self, k: torch.Tensor, v: torch.Tensor, device: LinkedGpu | None
    ) -> Callable[[], None]:
        """Returns what adds the tokens. Changes nothing but the tails beyond their used bytes."""
        layout, used = self._layout, self._tail_nbytes
        count = k.shape[2]
        total = used + count * layout.row_nbytes
        write: Callable[[], None] | None = None
        if total < layout.chunk_nbytes:
            lay_out(layout, self._tails, used, k, v)
        else:
            write = self._gather(used, total, k, v, device)

        def change() -> None:
            if write is not None:
                write()
            self._order.appended(self.tokens, count)
            self.tokens += count

        return change

    def _gather(
        self,
        used: int,
        total: int,
        k: torch.Tensor,
        v: torch.Tensor,
        device: LinkedGpu | None,
    ) -> Callable[[], None]:
        """The tail and the new tokens make whole chunks: returns what starts to write those and
        keeps the rest as tail. Nothing is changed before."""
        full = align_down(total, self._layout.chunk_nbytes)
        engine = self._engine if device else self._paths.writer_of(self._units, full)
        tails = self._tails[:, :used]
        chunks = whole_chunks(self._layout, self._staging, engine, tails, k, v, device)
        for number, offset in enumerate(self.offsets):
            chunks.transfer.add(offset + self.stored, chunks.address(number), full)
        transfer, rest = chunks.transfer, chunks.lines[:, full:total].cpu()

        def write() -> None:
            transfer.submit()
            self._writes.append(Write(chunks, self.stored, full))
            self.pending_nbytes += full * len(self.offsets)
            self._tails[:, : total - full] = rest
            self._tail_written = 0
            self.stored += full

        return write

    def settle(self, *, wait: bool = True) -> None:
        """Takes note of finished writes; with ``wait``, blocks until all of them are.

        Raises the error of one that failed, now and at every later call: the tokens are lost.
        """
        self._check_usable()
        while self._writes and (wait or self._writes[0].transfer.done):
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        chunks = self._writes[0].chunks
        transfer = chunks.transfer
        try:
            chunks.engine.wait(transfer)
        except SpdkKvError as failure:
            self._failure = failure
            raise
        before, self._failure = self._failure, self._in_doubt
        for number, crcs in enumerate(self._crcs):
            crcs += transfer.chunk_crcs(number)
        self.pending_nbytes -= self._writes.popleft().nbytes
        self._paths.was_written(self._units, chunks.engine)
        self._failure = before

    def _end_tail_write(self) -> None:
        """One that was interrupted may still be in flight: what follows it must not meet it."""
        if self._tail_write is not None:
            if self._tail_write.in_flight:
                self._tail_write.wait()
            self._tail_write = None

    def close(self) -> list[Transfer]:
        """ClosedError from every other method from now on. Stops the writes and returns them: some
        may be in flight still."""
        self._failure = ClosedError(f"{self.name}: the sequence was deleted")
        self.prefetched.drop()
        transfers = [write.transfer for write in self._writes]
        if self._tail_write is not None:
            transfers.append(self._tail_write)
        for transfer in transfers:
            if transfer.in_flight:
                transfer.cancel()
        return transfers

    # -- reading --------------------------------------------------------------------------------

    def plan(
        self,
        first: int,
        last: int,
        extents: range,
        spare: int,
        device: LinkedGpu | None = None,
    ) -> Reading:
        """Makes room for tokens ``[first, last)``, and ``spare`` more, of some extents: in staging
        memory, or on ``device``."""
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        start, end = self._layout.token_range(first, last)
        stride = max(end, align_up((last + spare) * row, chunk)) - start
        room = Room(self._staging, len(extents) * stride, device)
        return self._reading(extents, first, start, stride, room)

    def extend(self, reading: Reading, last: int, priority: int = 0) -> None:
        """Starts to read what is on the device of the bytes up to token ``last``, and is not yet
        asked for. Bytes still being written are not read: :meth:`finish` has them."""
        self._extend_to(reading, self._layout.token_range(0, last)[1], priority)

    def _extend_to(self, reading: Reading, end: int, priority: int = 0) -> None:
        end = min(self._writes[0].first if self._writes else self.stored, end)
        if end <= reading.until:
            return
        for unit, lines in by_path(self._units, reading.extents):
            ask = partial(reading.begin, unit, lines, priority)
            if unit is None:
                ask(self._paths.direct, reading.until, end)
            else:
                self._paths.route(unit, reading.until, end, ask)
        reading.until = end

    def _reading(self, extents: range, first: int, start: int, stride: int, room: Room) -> Reading:
        chunk = self._layout.chunk_nbytes
        return Reading(
            extents, first, start, stride, start, chunk, room, self.offsets, self._verify
        )

    def fits(self, reading: Reading, last: int) -> bool:
        """Whether the lease has room up to token ``last``."""
        end = max(self._layout.token_range(0, last)[1], reading.start)
        return end - reading.start <= reading.stride

    def finish(self, reading: Reading, last: int) -> torch.Tensor:
        """Waits for the reading, checks it, and returns ``[extents, tokens, *row_shape]``."""
        self._complete(reading)
        room = reading.room
        shape = (len(reading.extents), last - reading.first, *self._layout.row_shape)
        if last == reading.first:
            return room.place(tensor_from(None, self._layout.shape.dtype, shape))
        row = self._layout.row_nbytes
        begin, end = reading.first * row - reading.start, last * row - reading.start
        lines = room.lines(len(reading.extents), reading.stride)
        for write in self._writes:
            at = max(write.first, reading.start)
            until = min(write.first + write.line_nbytes, end + reading.start)
            if at < until:
                # Sooner than from the device, which has yet to write it.
                source = room.place(write.part(reading.extents, at, until))
                lines[:, at - reading.start : until - reading.start] = source
        if last * row > self.stored:
            at = max(self.stored, reading.start)
            selected = self._tails[reading.extents.start : reading.extents.stop]
            tail = selected[:, at - self.stored : last * row - self.stored]
            lines[:, at - reading.start : end] = room.place(tail)
        rows = self._order.applied(lines[:, begin:end], reading.first, last, room)
        return rows.view(self._dtype).view(shape)

    def _complete(self, reading: Reading) -> None:
        try:
            reading.complete(self._paths, self._crcs)
        except CorruptionError as damage:
            raise CorruptionError(f"{self.name}: {damage}") from None

    def prefetch(self, first: int, spare: int, device: LinkedGpu | None = None) -> None:
        """Starts to read all tokens from ``first`` on; :meth:`take_prefetched` hands them over.

        Takes the place of what was prefetched from elsewhere. Does not wait.
        """
        if self._is_prefetched(first):
            return
        self.prefetched.drop()
        if first < self.tokens and self._failure is None:
            self.settle(wait=False)
            reading = self.plan(first, self.tokens, range(len(self.offsets)), spare, device)
            self.prefetched.put(reading)
            self.extend(reading, self.tokens, PREFETCH)

    def _is_prefetched(self, first: int) -> bool:
        reading = self.prefetched.reading
        return reading is not None and reading.first == first

    def ahead_nbytes(self, first: int, spare: int) -> int:
        """Memory that a prefetch of all tokens from ``first`` on takes."""
        if self._is_prefetched(first):
            return 0
        start, end = self._layout.token_range(first, self.tokens + spare)
        return len(self.offsets) * (end - start)

    def take_prefetched(self, first: int) -> Reading | None:
        """What was prefetched, if it begins at ``first`` and still has room for all tokens.

        Not what is still on its way directly, though the layer has been promoted since: what is
        read through the page cache now need not be read once more in the next turn.
        """
        reading = self.prefetched.reading
        if reading is not None:
            fits = reading.first == first and self.fits(reading, self.tokens)
            if not fits or (self._paths.brings_in(self._units) and reading.passes_the_cache):
                self.prefetched.drop()
        return self.prefetched.take()

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on. Waits for the device where the last chunk that
        stays has to come back into memory."""
        self.settle()
        self.prefetched.drop()
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        keep = align_down(tokens * row, chunk)
        used = tokens * row - keep
        lines = self._read_chunk(keep) if keep < self.stored and used else None
        self._failure = self._in_doubt
        if keep < self.stored:
            if lines is not None:
                self._tails[:, :used] = lines[:, :used]
            for crcs in self._crcs:
                del crcs[keep // chunk * CRC_NBYTES :]
            self.stored = keep
            self._tail_written = used
        self._tail_written = min(self._tail_written, used)
        self.tokens = tokens
        self._failure = None

    def _read_chunk(self, start: int) -> torch.Tensor:
        """The stored chunk from byte ``start`` of every extent. Not into the tails themselves:
        they have to stay as they are if it fails."""
        chunk, every = self._layout.chunk_nbytes, range(len(self.offsets))
        room = Room(self._staging, len(every) * chunk, None)
        reading = self._reading(every, 0, start, chunk, room)
        self._extend_to(reading, start + chunk)
        self._complete(reading)
        return room.lines(len(every), chunk)

    def reorder(self, rows: np.ndarray[Any, Any]) -> None:
        """Row b of every token so far becomes what row ``rows[b]`` was. No I/O."""
        self._check_usable()
        self._order.change(self.tokens, rows)

    # -- lasting --------------------------------------------------------------------------------

    def write_tail(self) -> list[UnitRecord]:
        """Writes the unfinished chunk in its place and returns the records of all extents.

        Waits for the device. The chunk is written again when it is full; its first bytes are the
        same then, so a crash in between leaves this record true. What is there already is not
        written: after a truncation the record on the medium may still cover more of the chunk.
        """
        self.settle()
        self._end_tail_write()
        used, chunk = self._tail_nbytes, self._layout.chunk_nbytes
        if used > self._tail_written:
            transfer = self._engine.transfer(WRITE)
            transfer.keep(self._tail_lease)
            for number, offset in enumerate(self.offsets):
                address = self._tail_lease.address + number * chunk
                transfer.add(offset + self.stored, address, used, chunk)
            self._tail_write = transfer
            self._engine.run(transfer)
            self._tail_write = None
            self._tail_written = used
        lines = self._tails.numpy()
        tails = [_CRC.pack(crc32c(line[:used])) if used else b"" for line in lines]
        return [
            UnitRecord(offset, self.stored + used, bytes(crcs) + tail)
            for offset, crcs, tail in zip(self.offsets, self._crcs, tails, strict=True)
        ]

    def row_map(self) -> bytes:
        """The reordering, as little-endian int32 [tokens, batch]; empty if there was none."""
        return self._order.as_bytes(self.tokens)

    def restore(self, units: Sequence[UnitRecord], row_map: bytes) -> None:
        """Takes up recorded state; waits for the device, to bring the tail back into memory."""
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        nbytes = units[0].nbytes
        if any(unit.nbytes != nbytes for unit in units) or nbytes % row:
            raise CorruptionError(f"{self.name}: the index gives its extents unequal lengths")
        self.tokens, self.stored = nbytes // row, align_down(nbytes, chunk)
        whole = self.stored // chunk * CRC_NBYTES
        self._crcs = [bytearray(unit.checksums[:whole]) for unit in units]
        if nbytes > self.stored:
            transfer = self._engine.transfer(READ, checksum=True, chunk_nbytes=chunk)
            transfer.keep(self._tail_lease)
            for number, offset in enumerate(self.offsets):
                address = self._tail_lease.address + number * chunk
                transfer.add(offset + self.stored, address, nbytes - self.stored, chunk)
            self._engine.run(transfer)
            self._tail_written = nbytes - self.stored
            for number, unit in enumerate(units):
                if transfer.chunk_crcs(number) != unit.checksums[whole:] and self._verify:
                    raise CorruptionError(
                        f"{self.name}: the last chunk of the extent at {unit.offset} is not what "
                        "was appended (CRC32C differs)"
                    )
        self._order.restore(self.tokens, row_map)
