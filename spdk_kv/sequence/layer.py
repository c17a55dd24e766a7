"""One layer of a sequence: its K and V on the drive, the unfinished last chunk in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.transfer import Transfer
from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import ClosedError, ShapeMismatch
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.contents import Contents, State
from spdk_kv.sequence.order import RowOrder
from spdk_kv.sequence.reader import Reader
from spdk_kv.sequence.tail import Tail
from spdk_kv.sequence.writer import Writer
from spdk_kv.units import align_down

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerSnapshot:
    """What a layer held at one moment, apart from what is on the drive: the first ``stored_nbytes``
    of each extent, with their checksums. ``tail``: the bytes behind those, ``[extents, bytes]``."""

    tokens: int
    stored_nbytes: int
    tail: np.ndarray[Any, np.dtype[np.uint8]]
    checksums: tuple[bytes, ...]
    row_map: bytes


class Layer:
    """A writer, a reader and a tail over the same :class:`Contents`.

    The caller holds ``lock`` around every call. A call that is interrupted, or ends by its
    ``deadline``, has changed the layer as a whole or not at all.
    """

    def __init__(
        self, contents: Contents, paths: Orchestrator, staging: StagingPool, verify: bool
    ) -> None:
        self.lock = threading.RLock()
        self.name = contents.name
        self.contents = contents
        self.paths = paths
        self.verify = verify
        layout = contents.layout
        self.order = RowOrder(layout.batch, apart=layout.order == "token")
        self._tail = Tail(contents, paths.routes.writer, staging)
        self.writer = Writer(contents, self._tail, paths, staging)
        self.reader = Reader(
            contents, self.writer.pending, self._tail, self.order, paths, staging, verify
        )

        # The last snapshot, and of what.
        self._snapshot: tuple[State, int, LayerSnapshot] | None = None

    @property
    def tokens(self) -> int:
        """Tokens appended so far; may be read without the lock."""
        return self.contents.tokens

    @property
    def is_writing(self) -> bool:
        """Whether writes of it are pending."""
        return bool(self.writer.pending)

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        gpu: LinkedGpu | None = None,
        deadline: Deadline = NEVER,
    ) -> None:
        """Adds at least one token, ``[batch, kv_heads, tokens, head_dim]`` each; ``gpu``: where
        both are, if a link reaches it.

        Starts writes, and waits only while more than 64 MiB of this layer are pending. A long
        prompt is laid out in slices, so that it takes little memory and the drive writes one while
        the next is laid out.
        """
        self.contents.check()
        self.writer.drop_strays(deadline)
        self._tail.finish_write(deadline)
        count, contents = k.shape[2], self.contents
        if (
            contents.tail_nbytes + count * contents.layout.row_nbytes
            >= contents.layout.chunk_nbytes
        ):
            self.paths.backlog.add(self)
        step = count if gpu is not None else self.writer.slice_tokens
        self.order.append(self.tokens, count)
        state = contents.state
        for first in range(0, count, step):
            if first:
                self.writer.limit_pending(deadline)
            last = first + step
            state = self.writer.add(state, k[:, :, first:last], v[:, :, first:last], gpu)
        contents.grow(state)

    def settle(self, deadline: Deadline = NEVER, *, wait: bool = True) -> None:
        """See :meth:`Writer.settle`."""
        self.writer.settle(deadline, wait=wait)

    def prefetch(self, first: int, spare: int, gpu: LinkedGpu | None = None) -> None:
        """Starts to read all tokens from ``first`` on ahead, in place of what was prefetched from
        another token. Does not wait."""
        if self.reader.has_prefetched(first):
            return
        self.reader.prefetched.drop()
        if first < self.tokens and self.contents.failure is None:
            self.settle(wait=False)
            self.reader.prefetch(first, spare, gpu)

    def truncate(self, tokens: int, deadline: Deadline = NEVER) -> None:
        """Forgets all tokens from ``tokens`` on. Waits for the drive where the last chunk that
        stays has to come back into memory."""
        layout, state = self.contents.layout, self.contents.state
        keep = align_down(tokens * layout.row_nbytes, layout.chunk_nbytes)
        used = tokens * layout.row_nbytes - keep
        self.writer.settle(deadline, until=keep + 1 if used else keep)
        self.reader.prefetched.drop()
        if keep < state.stored_nbytes:
            chunk = self.reader.read_chunk(keep, deadline)[:, :used] if used else None
            state = State(tokens, keep, self._tail.begin(chunk, used))
        else:
            state.tail.written_nbytes = min(state.tail.written_nbytes, used)
            state = State(tokens, keep, state.tail)
        self.contents.shrink(state)
        self.writer.cancel_strays()

    def reorder(self, rows: np.ndarray[Any, Any]) -> None:
        """Row b of every token so far becomes what row ``rows[b]`` was. No I/O."""
        self.contents.check()
        self.order.change(self.tokens, rows)

    def has_room(self, tokens: int) -> bool:
        """Whether it can be written until it has ``tokens``."""
        layout = self.contents.layout
        return self.contents.has_room(layout.token_range(0, tokens)[1])

    def flush(self, deadline: Deadline = NEVER) -> list[bytes]:
        """Writes what is only in memory and returns the checksums of each extent. Waits. There is
        room for its tail."""
        self.settle(deadline)
        self._tail.flush(deadline)
        contents = self.contents
        return [
            contents.crcs(number, 0, contents.stored_nbytes) + tail
            for number, tail in enumerate(self._tail.checksums())
        ]

    def row_map(self) -> bytes:
        """The reordering, as little-endian int32 [tokens, batch]; empty if there was none."""
        return self.order.as_bytes(self.tokens)

    def restore(self, tokens: int, checksums: Sequence[bytes], row_map: bytes) -> None:
        """Takes up the recorded state; waits for the drive, to bring the tail back into memory."""
        self._tail.load(self.contents.restore(tokens, checksums), self.verify)
        self.order.restore(self.tokens, row_map)

    def begin_snapshot(
        self, tokens: int | None, deadline: Deadline = NEVER
    ) -> Callable[[], LayerSnapshot]:
        """What it holds of its first ``tokens`` (None: of all), once what is returned is called,
        with the lock still held. ShapeMismatch where it has fewer.

        Waits until everything is written; the call, for the last chunk where that is on the drive.
        """
        self.settle(deadline)
        contents, state, changes = self.contents, self.contents.state, self.order.changes
        tokens = state.tokens if tokens is None else tokens
        if not 0 <= tokens <= state.tokens:
            raise ShapeMismatch(f"{self.name} has {state.tokens} tokens, not {tokens}")
        if self._snapshot is not None:
            before, order, snapshot = self._snapshot
            if before is state and order == changes and snapshot.tokens == tokens:
                return lambda: snapshot
        nbytes = tokens * contents.layout.row_nbytes
        keep = align_down(nbytes, contents.layout.chunk_nbytes)
        if nbytes == keep or keep == state.stored_nbytes:
            snapshot = self._take_snapshot(tokens, keep, state.tail.rows)
            return lambda: snapshot
        finish = self.reader.begin_chunk(keep, deadline)
        return lambda: self._take_snapshot(tokens, keep, finish())

    def _take_snapshot(self, tokens: int, keep: int, tail: torch.Tensor) -> LayerSnapshot:
        """``tail``: the bytes of every extent from ``keep`` to the end of ``tokens``, or more."""
        contents, state, changes = self.contents, self.contents.state, self.order.changes
        used = tokens * contents.layout.row_nbytes - keep
        snapshot = LayerSnapshot(
            tokens,
            keep,
            np.array(tail.numpy()[:, :used]),
            tuple(contents.crcs(number, 0, keep) for number in contents.extents),
            self.order.as_bytes(tokens),
        )
        self._snapshot = state, changes, snapshot
        return snapshot

    def begin(self, snapshot: LayerSnapshot) -> None:
        """Takes up what another layer held, on ground that both have."""
        import torch

        for number, checksums in enumerate(snapshot.checksums):
            self.contents.set_crcs(number, 0, checksums)
        with torch.inference_mode(False):
            tail = self._tail.begin(torch.from_numpy(snapshot.tail))
        self.order.restore(snapshot.tokens, snapshot.row_map)
        self.contents.grow(State(snapshot.tokens, snapshot.stored_nbytes, tail))

    def close(self) -> list[Transfer]:
        """Makes every other method raise ClosedError. Cancels the writes and returns them: some
        may still be in flight."""
        self.contents.failure = ClosedError(f"{self.name}: the sequence was deleted")
        self.reader.prefetched.drop()
        transfers = self.unfinished
        for transfer in transfers:
            if transfer.in_flight:
                transfer.cancel()
        return transfers

    @property
    def unfinished(self) -> list[Transfer]:
        """The writes that may still be in flight."""
        return self.writer.unfinished + self._tail.unfinished
