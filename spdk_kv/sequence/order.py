"""The order of a batch's rows (beam search): changed by a map, never on the drive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv.sequence.buffer import ReadBuffer

if TYPE_CHECKING:
    import torch


class RowOrder:
    """For each token, which stored row of the batch is row b now; its own until that changes.

    ``apart``: whether each row of the batch has an extent of its own.
    """

    def __init__(self, batch: int, apart: bool = False) -> None:
        self._batch = batch
        self._apart = apart
        self.changes = 0
        """How often :meth:`change` was called."""
        # rows[t, b]: the stored row, for at least the tokens that there are; None while each is its
        # own.
        self._rows: np.ndarray[Any, np.dtype[np.int32]] | None = None

    def append(self, tokens: int, count: int) -> None:
        """``count`` tokens come after the first ``tokens``, stored as they are."""
        if self._rows is not None:
            if tokens + count > len(self._rows):
                more = np.empty((max(count, tokens), self._batch), np.int32)
                self._rows = np.concatenate([self._rows[:tokens], more])
            self._rows[tokens : tokens + count] = np.arange(self._batch)

    def change(self, tokens: int, rows: np.ndarray[Any, Any]) -> None:
        """Row b of each of the first ``tokens`` becomes what row ``rows[b]`` was."""
        if self._rows is None:
            own = np.arange(self._batch, dtype=np.int32)
            self._rows = np.tile(own, (max(1, tokens), 1))
        # No call comes between these two, so that no interrupt does.
        self._rows[:tokens] = self._rows[:tokens, rows]
        self.changes += 1

    def apply(
        self, stored: torch.Tensor, first: int, last: int, buffer: ReadBuffer
    ) -> torch.Tensor:
        """``stored`` (bytes in ``buffer``, ``[extents, nbytes]``, of tokens ``[first, last)``) with
        each token's rows in their present order. On bytes, since torch does not index every
        dtype."""
        if self._rows is None:
            return stored
        import torch

        rows = self._rows[first:last]
        tokens, batch = rows.shape
        if self._apart:
            index = (rows * tokens + np.arange(tokens)[:, None]).T
            flat = stored.reshape(1, batch * tokens, -1 if tokens else 1)
        else:
            index = np.arange(tokens)[:, None] * batch + rows
            flat = stored.reshape(stored.shape[0], tokens * batch, -1 if tokens else 1)
        picked = torch.index_select(flat, 1, buffer.local(torch.from_numpy(index.reshape(-1))))
        return picked.reshape(stored.shape)

    def stored_rows(
        self, groups: np.ndarray[Any, Any], group_tokens: int
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Of each of ``groups`` (row of the batch, number), the stored row: of all its tokens,
        ``[n, 1]``, or where rows have changed places of each of them, ``[n, group_tokens]``."""
        if self._rows is None:
            return groups[:, :1]
        tokens = groups[:, 1:] * group_tokens + np.arange(group_tokens)
        rows: np.ndarray[Any, np.dtype[np.int64]] = self._rows[tokens, groups[:, :1]].astype("i8")
        return rows

    def as_bytes(self, tokens: int) -> bytes:
        """The map of the first ``tokens``, as little-endian int32 ``[tokens, batch]``; empty if
        each row is its own."""
        return b"" if self._rows is None else self._rows[:tokens].astype("<i4").tobytes()

    def restore(self, tokens: int, row_map: bytes) -> None:
        """Takes up what :meth:`as_bytes` returned."""
        if row_map:
            self._rows = np.frombuffer(row_map, "<i4").reshape(tokens, self._batch).astype(np.int32)
