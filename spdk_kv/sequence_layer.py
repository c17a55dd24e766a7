"""One layer of a sequence: its K and V on the device, the unfinished last chunk in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.transfer import PREFETCH, READ, WRITE, Transfer
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError, SpdkKvError
from spdk_kv.index import UnitRecord
from spdk_kv.layout import SequenceLayout
from spdk_kv.staging import StagingPool
from spdk_kv.tensors import tensor_from
from spdk_kv.types import torch_dtypes
from spdk_kv.units import align_down, align_up

if TYPE_CHECKING:
    import torch

_CRC_NBYTES = 4


@dataclass(frozen=True)
class Write:
    """Chunks on their way to the device: from byte ``first`` of every extent of the layer."""

    transfer: Transfer
    first: int
    nbytes: int


@dataclass
class Reading:
    """Tokens ``[first, ...)`` of some extents on their way into one lease.

    ``start``: byte of the extents at which the lease begins; ``stride``: bytes of the lease per
    extent; ``until``: byte up to which the transfers asked for so far cover them.
    """

    extents: range
    first: int
    start: int
    stride: int
    until: int
    lease: Any
    transfers: list[tuple[Transfer, int, int]]


class LayerCache:
    """K and V of one layer: ``2 * extents_per_unit`` extents that grow together.

    ``tokens`` have been appended; of every extent the first ``stored`` bytes, whole chunks, were
    given to the device (some may be in flight), and the rest is in ``tails``. Every method wants
    ``lock`` held; those that wait for the device say so.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        staging: StagingPool,
        layout: SequenceLayout,
        offsets: Sequence[int],
        verify: bool,
    ) -> None:
        self.lock = threading.RLock()
        self.name = name
        self.tokens = 0
        self.stored = 0
        self.offsets = list(offsets)
        self._engine = engine
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
        self._writes: deque[Write] = deque()
        self._failure: SpdkKvError | None = None
        self.prefetched: Reading | None = None
        # rows[t, b]: the stored row that is row b of token t now; None: each its own.
        self._rows: np.ndarray[Any, np.dtype[np.int32]] | None = None

    @property
    def _tail_nbytes(self) -> int:
        return self.tokens * self._layout.row_nbytes - self.stored

    @property
    def pending_nbytes(self) -> int:
        """Bytes of writes not yet settled."""
        return sum(write.nbytes for write in self._writes)

    # -- appending ------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Adds tokens, ``[batch, kv_heads, tokens, head_dim]`` each. Starts writes, waits for
        none."""
        if self._failure is not None:
            raise self._failure
        layout, used = self._layout, self._tail_nbytes
        count = k.shape[2]
        total = used + count * layout.row_nbytes
        if total < layout.chunk_nbytes:
            self._copy_rows(self._tails, used, k, v)
        else:
            self._write(used, total, k, v)
        if self._rows is not None:
            self._rows[self.tokens : self.tokens + count] = np.arange(layout.shape.batch)
        self.tokens += count

    def _copy_rows(self, into: torch.Tensor, at: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Lays tokens out as rows from byte ``at`` of every extent's line of ``into``."""
        layout, count = self._layout, k.shape[2]
        lines = into[:, at : at + count * layout.row_nbytes].view(self._dtype)
        rows = lines.view(len(self.offsets), count, *layout.row_shape)
        if layout.granularity == "head":
            heads = layout.extents_per_unit
            rows[:heads].copy_(k.permute(1, 2, 0, 3))
            rows[heads:].copy_(v.permute(1, 2, 0, 3))
        else:
            rows[0].copy_(k.permute(2, 0, 1, 3))
            rows[1].copy_(v.permute(2, 0, 1, 3))

    def _write(self, used: int, total: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The tail and the new tokens make whole chunks: writes those, keeps the rest as tail."""
        chunk = self._layout.chunk_nbytes
        full, line = align_down(total, chunk), align_up(total, chunk)
        lease = self._staging.lease(len(self.offsets) * line)
        lines = tensor_from(lease, "uint8", (len(self.offsets), line))
        lines[:, :used] = self._tails[:, :used]
        self._copy_rows(lines, used, k, v)
        transfer = self._engine.transfer(WRITE, checksum=True, chunk_nbytes=chunk)
        transfer.keep(lease)
        for number, offset in enumerate(self.offsets):
            transfer.add(offset + self.stored, lease.address + number * line, full)
        transfer.submit()
        self._writes.append(Write(transfer, self.stored, full * len(self.offsets)))
        self._tails[:, : total - full] = lines[:, full:total]
        self.stored += full

    def settle(self, *, wait: bool = True) -> None:
        """Takes note of finished writes; with ``wait``, blocks until all of them are.

        Raises the error of one that failed, now and at every later call: the tokens are lost.
        """
        if self._failure is not None:
            raise self._failure
        while self._writes and (wait or self._writes[0].transfer.done):
            transfer = self._writes[0].transfer
            try:
                self._engine.wait(transfer)
            except SpdkKvError as failure:
                self._failure = failure
                raise
            for number, crcs in enumerate(self._crcs):
                crcs += transfer.chunk_crcs(number)
            self._writes.popleft()

    def abandon(self) -> None:
        """Waits until no write is in flight, whatever becomes of it."""
        self.prefetched = None
        for write in self._writes:
            write.transfer.cancel()
        for write in self._writes:
            write.transfer.wait()
        self._writes.clear()

    # -- reading --------------------------------------------------------------------------------

    def plan(self, first: int, last: int, extents: range, spare: int) -> Reading:
        """Leases room for tokens ``[first, last)``, and ``spare`` more, of some extents."""
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        start, end = self._layout.token_range(first, last)
        stride = max(end, align_up((last + spare) * row, chunk)) - start
        lease = self._staging.lease(max(1, len(extents) * stride))
        return Reading(extents, first, start, stride, start, lease, [])

    def extend(self, reading: Reading, last: int, priority: int = 0) -> None:
        """Starts to read what is on the device of the bytes up to token ``last``, and is not yet
        asked for. Bytes still being written are left for a later call."""
        end = min(self._writes[0].first if self._writes else self.stored, self._end(last))
        if end <= reading.until:
            return
        chunk = self._layout.chunk_nbytes
        transfer = self._engine.transfer(READ, checksum=self._verify, chunk_nbytes=chunk)
        transfer.keep(reading.lease)
        for line, number in enumerate(reading.extents):
            address = reading.lease.address + line * reading.stride + reading.until - reading.start
            transfer.add(self.offsets[number] + reading.until, address, end - reading.until)
        transfer.submit(None, priority)
        reading.transfers.append((transfer, reading.until, end))
        reading.until = end

    def _end(self, last: int) -> int:
        return align_up(last * self._layout.row_nbytes, self._layout.chunk_nbytes)

    def fits(self, reading: Reading, last: int) -> bool:
        """Whether the lease has room up to token ``last``."""
        end = max(self._end(last), reading.start)
        return end - reading.start <= reading.stride

    def finish(self, reading: Reading, last: int) -> torch.Tensor:
        """Waits for the reading, checks it, and returns ``[extents, tokens, *row_shape]``."""
        for transfer, start, end in reading.transfers:
            self._engine.wait(transfer)
            if self._verify:
                self._check(reading, transfer, start, end)
        row = self._layout.row_nbytes
        begin, end = reading.first * row - reading.start, last * row - reading.start
        lines = tensor_from(reading.lease, "uint8", (len(reading.extents), reading.stride))
        if last * row > self.stored:
            at = max(self.stored, reading.start)
            selected = self._tails[reading.extents.start : reading.extents.stop]
            lines[:, at - reading.start : end] = selected[
                :, at - self.stored : last * row - self.stored
            ]
        rows = lines[:, begin:end].view(self._dtype)
        rows = rows.view(len(reading.extents), last - reading.first, *self._layout.row_shape)
        return rows if self._rows is None else self._reordered(rows, reading.first, last)

    def _reordered(self, rows: torch.Tensor, first: int, last: int) -> torch.Tensor:
        import torch

        assert self._rows is not None
        batch = self._layout.shape.batch
        index = np.arange(last - first)[:, None] * batch + self._rows[first:last]
        flat = rows.reshape(rows.shape[0], (last - first) * batch, -1)
        picked = torch.index_select(flat, 1, torch.from_numpy(index.reshape(-1)))
        return picked.view(rows.shape)

    def _check(self, reading: Reading, transfer: Transfer, start: int, end: int) -> None:
        chunk = self._layout.chunk_nbytes
        wanted = slice(start // chunk * _CRC_NBYTES, end // chunk * _CRC_NBYTES)
        for line, number in enumerate(reading.extents):
            if transfer.chunk_crcs(line) != self._crcs[number][wanted]:
                raise CorruptionError(
                    f"{self.name}: stored bytes between {start} and {end} of the extent at "
                    f"{self.offsets[number]} are not those that were appended (CRC32C differs)"
                )

    def prefetch(self, spare: int) -> None:
        """Starts to read all tokens; :meth:`take_prefetched` hands them over. Does not wait."""
        if self.prefetched is None and self.tokens and self._failure is None:
            self.settle(wait=False)
            self.prefetched = self.plan(0, self.tokens, range(len(self.offsets)), spare)
            self.extend(self.prefetched, self.tokens, PREFETCH)

    def take_prefetched(self) -> Reading | None:
        """What was prefetched, if it still has room for all tokens."""
        reading, self.prefetched = self.prefetched, None
        return reading if reading is not None and self.fits(reading, self.tokens) else None

    # -- changing -------------------------------------------------------------------------------

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on. Waits for the device where the last chunk that
        stays has to come back into memory."""
        self.settle()
        self.prefetched = None
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        keep = align_down(tokens * row, chunk)
        if keep < self.stored:
            if tokens * row > keep:
                # Read with the chunk's own checksum, as a reading of that one chunk.
                every = range(len(self.offsets))
                reading = Reading(every, 0, keep, chunk, keep, self._tail_lease, [])
                self.extend(reading, -(-(keep + chunk) // row))
                for transfer, start, end in reading.transfers:
                    self._engine.wait(transfer)
                    if self._verify:
                        self._check(reading, transfer, start, end)
            for crcs in self._crcs:
                del crcs[keep // chunk * _CRC_NBYTES :]
            self.stored = keep
        self.tokens = tokens

    def reorder(self, rows: np.ndarray[Any, Any]) -> None:
        """Row b of every token so far becomes what row ``rows[b]`` was. No I/O."""
        if self._rows is None:
            shape = self._layout.shape
            self._rows = np.empty((shape.max_tokens, shape.batch), np.int32)
            self._rows[: self.tokens] = np.arange(shape.batch)
        self._rows[: self.tokens] = self._rows[: self.tokens, rows]

    # -- lasting --------------------------------------------------------------------------------

    def write_tail(self) -> list[UnitRecord]:
        """Writes the unfinished chunk in its place and returns the records of all extents.

        Waits for the device. The chunk is written again when it is full; its first bytes are the
        same then, so a crash in between leaves this record true.
        """
        self.settle()
        used, chunk = self._tail_nbytes, self._layout.chunk_nbytes
        tails = [b""] * len(self.offsets)
        if used:
            transfer = self._engine.transfer(WRITE, checksum=True, chunk_nbytes=chunk)
            transfer.keep(self._tail_lease)
            for number, offset in enumerate(self.offsets):
                address = self._tail_lease.address + number * chunk
                transfer.add(offset + self.stored, address, used, chunk)
            self._engine.run(transfer)
            tails = [transfer.chunk_crcs(number) for number in range(len(self.offsets))]
        return [
            UnitRecord(offset, self.stored + used, bytes(crcs) + tail)
            for offset, crcs, tail in zip(self.offsets, self._crcs, tails, strict=True)
        ]

    def row_map(self) -> bytes:
        """The reordering, as little-endian int32 [tokens, batch]; empty if there was none."""
        if self._rows is None:
            return b""
        return self._rows[: self.tokens].astype("<i4").tobytes()

    def restore(self, units: Sequence[UnitRecord], row_map: bytes) -> None:
        """Takes up recorded state; waits for the device, to bring the tail back into memory."""
        row, chunk = self._layout.row_nbytes, self._layout.chunk_nbytes
        nbytes = units[0].nbytes
        if any(unit.nbytes != nbytes for unit in units) or nbytes % row:
            raise CorruptionError(f"{self.name}: the index gives its extents unequal lengths")
        self.tokens, self.stored = nbytes // row, align_down(nbytes, chunk)
        whole = self.stored // chunk * _CRC_NBYTES
        self._crcs = [bytearray(unit.checksums[:whole]) for unit in units]
        if nbytes > self.stored:
            transfer = self._engine.transfer(READ, checksum=True, chunk_nbytes=chunk)
            transfer.keep(self._tail_lease)
            for number, offset in enumerate(self.offsets):
                address = self._tail_lease.address + number * chunk
                transfer.add(offset + self.stored, address, nbytes - self.stored, chunk)
            self._engine.run(transfer)
            for number, unit in enumerate(units):
                if transfer.chunk_crcs(number) != unit.checksums[whole:] and self._verify:
                    raise CorruptionError(
                        f"{self.name}: the last chunk of the extent at {unit.offset} is not what "
                        "was appended (CRC32C differs)"
                    )
        if row_map:
            shape = self._layout.shape
            self._rows = np.empty((shape.max_tokens, shape.batch), np.int32)
            self._rows[: self.tokens] = np.frombuffer(row_map, "<i4").reshape(
                self.tokens, shape.batch
            )
