"""The tail of a layer: the unfinished last chunk of every extent, in memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.deadline import Deadline
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError, SpdkKvError
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.contents import Contents, State, TailBuffer
from spdk_kv.tensors import tensor_from

if TYPE_CHECKING:
    import torch

_CRC = struct.Struct("<I")


class Tail:
    """Writes the tail of ``contents`` and reads it; the layer is empty until then.

    A flush writes the tails to their place on the drive, and they stay in memory, since the chunk
    is written once more when it is full.
    """

    def __init__(self, contents: Contents, engine: Engine, staging: StagingPool) -> None:
        self._contents = contents
        self._engine = engine
        self._staging = staging
        # Kept while it may be in flight: for longer than a flush where that was interrupted.
        self._write: Transfer | None = None
        contents.state = State(0, 0, self.begin())

    def begin(self, start: torch.Tensor | None = None, written_nbytes: int = 0) -> TailBuffer:
        """A new chunk that begins with ``start``, ``[extents, bytes]``, of which the drive has the
        first ``written_nbytes``.

        In memory of its own: the old one stays what it was until the layer's state is replaced.
        """
        import torch

        extents, chunk = self._contents.layout.extents, self._contents.layout.chunk_nbytes
        lease = self._staging.lease(extents * chunk)
        # A tensor made in inference mode cannot be changed outside it, and this one lives longer
        # than one call of the model.
        with torch.inference_mode(False):
            rows = tensor_from(lease, "uint8", (extents, chunk))
        if start is not None:
            rows[:, : start.shape[1]] = start
        return TailBuffer(lease, rows, written_nbytes)

    def part(self, extents: range, start: int, end: int) -> torch.Tensor:
        """Bytes ``[start, end)`` of ``extents``, counted from the extents' beginning."""
        state = self._contents.state
        stored = state.stored_nbytes
        return state.tail.rows[extents.start : extents.stop, start - stored : end - stored]

    def flush(self, deadline: Deadline) -> None:
        """Writes what is in use to its place, unless it is there already. Waits for the drive.

        The first bytes of the full chunk will be the same, so that a crash between the two writes
        leaves the record of this one true. Bytes that are there already are left alone: after a
        truncation the record on the medium may still cover more of the chunk.
        """
        self.finish_write(deadline)
        nbytes, tail = self._contents.tail_nbytes, self._contents.state.tail
        if nbytes > tail.written_nbytes:
            transfer = self._engine.transfer(WRITE)
            self._add_segments(transfer, nbytes)
            self._write = transfer
            transfer.submit()
            try:
                self._engine.wait(transfer, deadline)
            finally:
                if not transfer.in_flight:
                    self._write = None
            tail.written_nbytes = nbytes

    def finish_write(self, deadline: Deadline) -> None:
        """Waits for the write of a :meth:`flush` that did not: the next one must not meet it."""
        write = self._write
        if write is None:
            return
        if write.in_flight:
            try:
                self._engine.wait(write, deadline)
            except SpdkKvError:
                if write.in_flight:
                    raise
                # It is written again by the next flush, whose error it then is.
        self._write = None

    def load(self, checksums: Sequence[bytes], verify: bool) -> None:
        """Reads the tail from the drive. Waits for it.

        Raises CorruptionError where one of ``checksums`` (per extent) differs, if ``verify``.
        """
        nbytes = self._contents.tail_nbytes
        if not nbytes:
            return
        chunk = self._contents.layout.chunk_nbytes
        transfer = self._engine.transfer(READ, checksum=True, chunk_nbytes=chunk)
        self._add_segments(transfer, nbytes)
        self._engine.run(transfer)
        self._contents.state.tail.written_nbytes = nbytes
        for number, checksum in enumerate(checksums):
            if verify and transfer.chunk_crcs(number) != checksum:
                raise CorruptionError(
                    f"{self._contents.name}: the last chunk of extent {number} is not what was "
                    "appended (CRC32C differs)"
                )

    def _add_segments(self, transfer: Transfer, nbytes: int) -> None:
        state, chunk = self._contents.state, self._contents.layout.chunk_nbytes
        lease = state.tail.lease
        transfer.keep(lease)
        stored = state.stored_nbytes
        for number in self._contents.extents:
            # One chunk always lies in one piece.
            ((offset, _),) = self._contents.ranges(number, stored, stored + chunk)
            transfer.add(offset, lease.address + number * chunk, nbytes, chunk)

    def checksums(self) -> list[bytes]:
        """One for each extent, as the index keeps them; b"" where nothing is in use."""
        nbytes = self._contents.tail_nbytes
        chunks = self._contents.state.tail.rows.numpy()
        return [_CRC.pack(crc32c(chunk[:nbytes])) if nbytes else b"" for chunk in chunks]

    @property
    def unfinished(self) -> list[Transfer]:
        """The write that may still be in flight, if there is one."""
        return [] if self._write is None else [self._write]
