"""The writing half of a layer: appended tokens become chunks, chunks become writes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.chunks import ChunkWrite, whole_chunks
from spdk_kv.sequence.contents import Contents, State
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
    """Writes whole chunks of a layer in the background. The layer's lock guards it.

    A write may be of tokens that were truncated since, or of an append that an interrupt kept from
    its end. Such a *stray* lies behind what the layer's state tells of, and must be over before
    anything else is written there.
    """

    def __init__(
        self, contents: Contents, tail: Tail, paths: Orchestrator, staging: StagingPool
    ) -> None:
        self.pending: deque[ChunkWrite] = deque()
        """Writes that are not settled, oldest first, strays last. Other halves only look at it."""
        self._contents = contents
        self._tail = tail
        self._paths = paths
        self._staging = staging

    @property
    def pending_nbytes(self) -> int:
        """Bytes of the pending writes."""
        return sum(write.nbytes for write in self.pending)

    @property
    def slice_tokens(self) -> int:
        """Tokens that are laid out at once."""
        row_nbytes = self._contents.layout.row_nbytes * self._contents.layout.extents
        return max(1, _SLICE_NBYTES // row_nbytes)

    def add(self, state: State, k: torch.Tensor, v: torch.Tensor, gpu: LinkedGpu | None) -> State:
        """What the layer will hold with the tokens behind those of ``state``. Starts to write the
        chunks that they fill; everything else goes to unused memory."""
        contents, count = self._contents, k.shape[2]
        used = contents.tail_nbytes_of(state)
        total = used + count * contents.layout.row_nbytes
        if total < contents.layout.chunk_nbytes:
            lay_out(contents.layout, state.tail.rows, used, k, v)
            return State(state.tokens + count, state.stored_nbytes, state.tail)
        full = align_down(total, contents.layout.chunk_nbytes)
        routes = self._paths.routes
        engine = routes.writer if gpu else routes.writer_of(contents.units, full)
        write = whole_chunks(
            contents.layout,
            self._staging,
            engine,
            state.stored_nbytes,
            state.tail.rows[:, :used],
            k,
            v,
            gpu,
        )
        write.add_segments(contents)
        tail = self._tail.begin(write.rest)
        write.transfer.keep(self._paths.backlog.account.hold(write.nbytes))
        # Known before it begins: nothing that was begun may be lost sight of.
        self.pending.append(write)
        write.transfer.submit()
        return State(state.tokens + count, write.end, tail)

    def limit_pending(self, deadline: Deadline) -> None:
        """Waits for the oldest writes while more than 64 MiB are pending."""
        while self.pending_nbytes > _MOST_PENDING_NBYTES:
            self._settle_oldest(deadline)

    def settle(
        self, deadline: Deadline = NEVER, *, wait: bool = True, until: int | None = None
    ) -> None:
        """Takes note of finished writes; with ``wait``, blocks until all of them are (of the first
        ``until`` bytes of each extent, if that is given).

        Raises the error of a write that failed, now and at every later call: the tokens are lost.
        """
        self._contents.check()
        stored = self._contents.stored_nbytes
        end = stored if until is None else min(until, stored)
        while self.pending and self.pending[0].start < end:
            if not wait and not self.pending[0].transfer.done:
                return
            self._settle_oldest(deadline)
        if until is None:
            self.drop_strays(deadline, wait=wait)

    def cancel_strays(self) -> None:
        """Stops what is not under way yet of the strays. Does not wait."""
        stored = self._contents.stored_nbytes
        for write in self.pending:
            if write.start >= stored and write.transfer.in_flight:
                write.transfer.cancel()

    def drop_strays(self, deadline: Deadline, *, wait: bool = True) -> None:
        """Drops the strays; with ``wait``, cancels those that are not over, and blocks until they
        are."""
        stored = self._contents.stored_nbytes
        while self.pending and self.pending[-1].start >= stored:
            stray = self.pending[-1]
            if stray.transfer.in_flight:
                if not wait:
                    return
                stray.transfer.cancel()
                # Whether it failed does not matter; it may touch the drive no more.
                if stray.transfer.wait(deadline.left_s()) is None:
                    raise deadline.error(f"what was being written of {self._contents.name}")
                if stray.transfer.in_flight:
                    raise stray.engine.error(stray.transfer)
            self.pending.pop()

    def _settle_oldest(self, deadline: Deadline) -> None:
        """Each step of it may be done again, after an interrupt."""
        write = self.pending[0]
        status = write.transfer.wait(deadline.left_s())
        if status is None:
            raise deadline.error(f"writing {self._contents.name}")
        if status:
            failure = write.engine.error(write.transfer)
            self._contents.failure = failure
            raise failure
        for number in self._contents.extents:
            self._contents.set_crcs(number, write.start, write.crcs(number))
        self._paths.after_write(self._contents.units, write.engine, write.nbytes)
        self.pending.popleft()

    @property
    def unfinished(self) -> list[Transfer]:
        """The writes that may still be in flight."""
        return [write.transfer for write in self.pending]
