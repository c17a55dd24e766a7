"""One layer of a sequence: its K and V on the drive, the unfinished last chunk in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.transfer import Transfer
from spdk_kv.errors import ClosedError
from spdk_kv.index import UnitRecord
from spdk_kv.link import LinkedGpu
from spdk_kv.paths import Orchestrator
from spdk_kv.placement import StagingPool
from spdk_kv.sequence.condition import Condition
from spdk_kv.sequence.contents import Contents
from spdk_kv.sequence.order import RowOrder
from spdk_kv.sequence.reader import Reader
from spdk_kv.sequence.tail import Tail
from spdk_kv.sequence.writer import Writer
from spdk_kv.units import align_down

if TYPE_CHECKING:
    import torch


class Layer:
    """A writer, a reader and a tail over the same :class:`Contents`.

    The caller holds ``lock`` around every call. A change that is interrupted half way, by Ctrl-C
    for instance, leaves the layer unusable: see :class:`Condition`.
    """

    def __init__(
        self, contents: Contents, paths: Orchestrator, staging: StagingPool, verify: bool
    ) -> None:
        self.lock = threading.RLock()
        self.name = contents.name
        self.contents = contents
        self._verify = verify
        self._condition = Condition(contents.name)
        self._order = RowOrder(contents.layout.shape)
        self._tail = Tail(contents, paths.routes.writer, staging)
        self.writer = Writer(contents, self._tail, self._condition, paths, staging)
        self.reader = Reader(
            contents, self.writer.pending, self._tail, self._order, paths, staging, verify
        )

    @property
    def tokens(self) -> int:
        """Tokens appended so far; may be read without the lock."""
        return self.contents.tokens

    def append(self, k: torch.Tensor, v: torch.Tensor, gpu: LinkedGpu | None = None) -> None:
        """Adds at least one token, ``[batch, kv_heads, tokens, head_dim]`` each; ``gpu``: where
        both are, if a link reaches it.

        Starts writes, and waits only while more than 64 MiB of this layer are pending. A long
        prompt is laid out in slices, so that it takes little memory and the drive writes one while
        the next is laid out.
        """
        self._condition.check()
        self._tail.finish_write()
        count = k.shape[2]
        step = count if gpu is not None else self.writer.slice_tokens
        add = self.writer.prepare(k[:, :, :step], v[:, :, :step], gpu)
        with self._condition.change():
            self._order.append(self.tokens, count)
            add()
            for first in range(step, count, step):
                self.writer.limit_pending()
                last = first + step
                self.writer.prepare(k[:, :, first:last], v[:, :, first:last], gpu)()

    def settle(self, *, wait: bool = True) -> None:
        """See :meth:`Writer.settle`."""
        self.writer.settle(wait=wait)

    def prefetch(self, first: int, spare: int, gpu: LinkedGpu | None = None) -> None:
        """Starts to read all tokens from ``first`` on ahead, in place of what was prefetched from
        another token. Does not wait."""
        if self.reader.has_prefetched(first):
            return
        self.reader.prefetched.drop()
        if first < self.tokens and self._condition.failure is None:
            self.settle(wait=False)
            self.reader.prefetch(first, spare, gpu)

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from ``tokens`` on. Waits for the drive where the last chunk that
        stays has to come back into memory."""
        self.settle()
        self.reader.prefetched.drop()
        layout = self.contents.layout
        keep = align_down(tokens * layout.row_nbytes, layout.chunk_nbytes)
        used = tokens * layout.row_nbytes - keep
        into_stored = keep < self.contents.stored_nbytes
        # Not read into the tail itself, which has to stay as it is if this fails.
        chunk = self.reader.read_chunk(keep) if into_stored and used else None
        with self._condition.change():
            if into_stored:
                self._tail.take_back(chunk, used)
                self.contents.truncate(keep)
            self._tail.shorten(used)
            self.contents.tokens = tokens

    def reorder(self, rows: np.ndarray[Any, Any]) -> None:
        """Row b of every token so far becomes what row ``rows[b]`` was. No I/O."""
        self._condition.check()
        self._order.change(self.tokens, rows)

    def flush(self) -> list[UnitRecord]:
        """Writes what is only in memory and returns the records of all extents. Waits."""
        self.settle()
        self._tail.flush()
        contents = self.contents
        nbytes = contents.tokens * contents.layout.row_nbytes
        return [
            UnitRecord(offset, nbytes, bytes(crcs) + tail)
            for offset, crcs, tail in zip(
                contents.offsets, contents.crcs, self._tail.checksums(), strict=True
            )
        ]

    def row_map(self) -> bytes:
        """The reordering, as little-endian int32 [tokens, batch]; empty if there was none."""
        return self._order.as_bytes(self.tokens)

    def restore(self, records: Sequence[UnitRecord], row_map: bytes) -> None:
        """Takes up the recorded state; waits for the drive, to bring the tail back into memory."""
        self._tail.load(self.contents.restore(records), self._verify)
        self._order.restore(self.tokens, row_map)

    def close(self) -> list[Transfer]:
        """Makes every other method raise ClosedError. Cancels the writes and returns them: some
        may still be in flight."""
        self._condition.failure = ClosedError(f"{self.name}: the sequence was deleted")
        self.reader.prefetched.drop()
        transfers = self.writer.unfinished + self._tail.unfinished
        for transfer in transfers:
            if transfer.in_flight:
                transfer.cancel()
        return transfers
