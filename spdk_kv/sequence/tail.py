"""The tail of a layer: the unfinished last chunk of every extent, in memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.transfer import READ, WRITE, Transfer
from spdk_kv.engines import Engine
from spdk_kv.errors import CorruptionError
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.contents import Contents
from spdk_kv.tensors import tensor_from

if TYPE_CHECKING:
    import torch

_CRC = struct.Struct("<I")


class Tail:
    """``buffer`` holds the tails' bytes, ``[extents, chunk]``; the first
    :attr:`Contents.tail_nbytes` of each are in use.

    A flush writes them to their place on the drive, and they stay here, since the chunk is written
    once more when it is full.
    """

    def __init__(self, contents: Contents, engine: Engine, staging: StagingPool) -> None:
        extents, chunk = len(contents.offsets), contents.layout.chunk_nbytes
        self._contents = contents
        self._engine = engine
        self._lease = staging.lease(extents * chunk)
        self.buffer: torch.Tensor = tensor_from(self._lease, "uint8", (extents, chunk))
        # Leading bytes that are the same on the drive.
        self._written_nbytes = 0
        # Kept while it may be in flight: set for good only where the wait for it was interrupted.
        self._write: Transfer | None = None

    def part(self, extents: range, start: int, end: int) -> torch.Tensor:
        """Bytes ``[start, end)`` of ``extents``, counted from the extents' beginning."""
        stored = self._contents.stored_nbytes
        return self.buffer[extents.start : extents.stop, start - stored : end - stored]

    def begin(self, start: torch.Tensor) -> None:
        """A new chunk begins with ``start``, ``[extents, bytes]``."""
        self.buffer[:, : start.shape[1]] = start
        self._written_nbytes = 0

    def shorten(self, nbytes: int) -> None:
        """Only the first ``nbytes`` stay in use."""
        self._written_nbytes = min(self._written_nbytes, nbytes)

    def take_back(self, chunk: torch.Tensor | None, nbytes: int) -> None:
        """The first ``nbytes`` of a stored ``chunk``, ``[extents, chunk]``, are the tail now. None
        for 0 bytes."""
        if chunk is not None:
            self.buffer[:, :nbytes] = chunk[:, :nbytes]
        self._written_nbytes = nbytes

    def flush(self) -> None:
        """Writes what is in use to its place, unless it is there already. Waits for the drive.

        The first bytes of the full chunk will be the same, so that a crash between the two writes
        leaves the record of this one true. Bytes that are there already are left alone: after a
        truncation the record on the medium may still cover more of the chunk.
        """
        self.finish_write()
        nbytes = self._contents.tail_nbytes
        if nbytes > self._written_nbytes:
            transfer = self._engine.transfer(WRITE)
            self._add_segments(transfer, nbytes)
            self._write = transfer
            self._engine.run(transfer)
            self._write = None
            self._written_nbytes = nbytes

    def finish_write(self) -> None:
        """Waits for a write whose :meth:`flush` was interrupted: the next one must not meet it."""
        if self._write is not None:
            if self._write.in_flight:
                self._write.wait()
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
        self._written_nbytes = nbytes
        for number, (offset, checksum) in enumerate(
            zip(self._contents.offsets, checksums, strict=True)
        ):
            if verify and transfer.chunk_crcs(number) != checksum:
                raise CorruptionError(
                    f"{self._contents.name}: the last chunk of the extent at {offset} is not what "
                    "was appended (CRC32C differs)"
                )

    def _add_segments(self, transfer: Transfer, nbytes: int) -> None:
        transfer.keep(self._lease)
        chunk = self._contents.layout.chunk_nbytes
        for number, offset in enumerate(self._contents.offsets):
            address = self._lease.address + number * chunk
            transfer.add(offset + self._contents.stored_nbytes, address, nbytes, chunk)

    def checksums(self) -> list[bytes]:
        """One for each extent, as the index keeps them; b"" where nothing is in use."""
        nbytes = self._contents.tail_nbytes
        chunks = self.buffer.numpy()
        return [_CRC.pack(crc32c(chunk[:nbytes])) if nbytes else b"" for chunk in chunks]

    @property
    def unfinished(self) -> list[Transfer]:
        """The write that may still be in flight, if there is one."""
        return [] if self._write is None else [self._write]
