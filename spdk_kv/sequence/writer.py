"""The writing half of a layer: appended tokens become chunks, chunks become writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from spdk_kv._native.transfer import Transfer
from spdk_kv.errors import SpdkKvError
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.chunks import ChunkWrite, whole_chunks
from spdk_kv.sequence.condition import Condition
from spdk_kv.sequence.contents import Contents
from spdk_kv.sequence.rows import lay_out
from spdk_kv.sequence.tail import Tail
from spdk_kv.units import align_down

if TYPE_CHECKING:
    import torch

# A prompt's K and V are laid out and written in slices of this size: large enough for the drive's
# full speed, and small enough that the same staging memory serves again and again.
_SLICE_NBYTES = 16 << 20
# Bytes of one layer on their way to the drive; beyond that an append waits for the oldest write.
# Four slices keep the drive busy while the next one is laid out.
_MOST_PENDING_NBYTES = 64 << 20


class Writer:
    """Writes whole chunks of a layer in the background. The layer's lock guards it."""

    def __init__(
        self,
        contents: Contents,
        tail: Tail,
        condition: Condition,
        paths: Orchestrator,
        staging: StagingPool,
    ) -> None:
        self.pending: deque[ChunkWrite] = deque()
        """Writes that are not settled, oldest first. Other halves only look at it."""
        self.pending_nbytes = 0
        self._contents = contents
        self._tail = tail
        self._condition = condition
        self._paths = paths
        self._staging = staging

    @property
    def slice_tokens(self) -> int:
        """Tokens that are laid out at once."""
        row_nbytes = self._contents.layout.row_nbytes * len(self._contents.offsets)
        return max(1, _SLICE_NBYTES // row_nbytes)

    def prepare(
        self, k: torch.Tensor, v: torch.Tensor, gpu: LinkedGpu | None
    ) -> Callable[[], None]:
        """Returns what adds the tokens; so far only unused bytes of the tail are touched."""
        contents, count = self._contents, k.shape[2]
        total = contents.tail_nbytes + count * contents.layout.row_nbytes
        write: Callable[[], None] | None = None
        if total < contents.layout.chunk_nbytes:
            lay_out(contents.layout, self._tail.buffer, contents.tail_nbytes, k, v)
        else:
            write = self._prepare_write(total, k, v, gpu)

        def add() -> None:
            if write is not None:
                write()
            contents.tokens += count

        return add

    def _prepare_write(
        self, total: int, k: torch.Tensor, v: torch.Tensor, gpu: LinkedGpu | None
    ) -> Callable[[], None]:
        """Tail and new tokens, ``total`` bytes per extent, make whole chunks: returns what starts
        to write those and keeps the rest as the tail."""
        contents, tail = self._contents, self._tail
        full = align_down(total, contents.layout.chunk_nbytes)
        engine = (
            self._paths.routes.writer if gpu else self._paths.routes.writer_of(contents.units, full)
        )
        write = whole_chunks(
            contents.layout,
            self._staging,
            engine,
            contents.stored_nbytes,
            tail.buffer[:, : contents.tail_nbytes],
            k,
            v,
            gpu,
        )
        write.add_segments(contents.offsets)
        rest = write.rest

        def start() -> None:
            write.transfer.submit()
            self.pending.append(write)
            self.pending_nbytes += write.nbytes
            tail.begin(rest)
            contents.resize(write.end)

        return start

    def limit_pending(self) -> None:
        """Waits for the oldest writes while more than 64 MiB are pending."""
        while self.pending_nbytes > _MOST_PENDING_NBYTES:
            self._settle_oldest()

    def settle(self, *, wait: bool = True) -> None:
        """Takes note of finished writes; with ``wait``, blocks until all of them are.

        Raises the error of a write that failed, now and at every later call: the tokens are lost.
        """
        self._condition.check()
        while self.pending and (wait or self.pending[0].transfer.done):
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        write = self.pending[0]
        try:
            write.engine.wait(write.transfer)
        except SpdkKvError as failure:
            self._condition.failure = failure
            raise
        with self._condition.change():
            for number, crcs in enumerate(self._contents.crcs):
                crcs += write.transfer.chunk_crcs(number)
            self.pending_nbytes -= self.pending.popleft().nbytes
            self._paths.after_write(self._contents.units, write.engine)

    @property
    def unfinished(self) -> list[Transfer]:
        """The writes that may still be in flight."""
        return [write.transfer for write in self.pending]
