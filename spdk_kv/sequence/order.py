"""The order of the rows of a batch (beam search): changed by a map, never on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv.sequence.reading import Room
from spdk_kv.types import KVShape

if TYPE_CHECKING:
    import torch


class RowOrder:
    """Which stored row of the batch is row b of token t now; each its own until that changes."""

    def __init__(self, shape: KVShape) -> None:
        self._shape = shape
        # rows[t, b]: the stored row; None: each its own.
        self._rows: np.ndarray[Any, np.dtype[np.int32]] | None = None

    def appended(self, tokens: int, count: int) -> None:
        """``count`` tokens came after the first ``tokens``, stored as they are."""
        if self._rows is not None:
            self._rows[tokens : tokens + count] = np.arange(self._shape.batch)

    def change(self, tokens: int, rows: np.ndarray[Any, Any]) -> None:
        """Row b of each of the first ``tokens`` becomes what row ``rows[b]`` was."""
        if self._rows is None:
            own = np.arange(self._shape.batch, dtype=np.int32)
            self._rows = np.tile(own, (self._shape.max_tokens, 1))
        self._rows[:tokens] = self._rows[:tokens, rows]

    def applied(self, lines: torch.Tensor, first: int, last: int, room: Room) -> torch.Tensor:
        """``lines`` (bytes in ``room``, [extents, tokens * row], of tokens ``[first, last)``) with
        each token's rows in their order now. On bytes, for torch indexes not every dtype."""
        if self._rows is None:
            return lines
        import torch

        stored = self._rows[first:last]
        tokens, batch = stored.shape
        index = np.arange(tokens)[:, None] * batch + stored
        flat = lines.reshape(lines.shape[0], tokens * batch, -1 if tokens else 1)
        picked = torch.index_select(flat, 1, room.place(torch.from_numpy(index.reshape(-1))))
        return picked.reshape(lines.shape)

    def as_bytes(self, tokens: int) -> bytes:
        """The map of the first ``tokens``, as little-endian int32 [tokens, batch]; empty if each
        row is its own."""
        return b"" if self._rows is None else self._rows[:tokens].astype("<i4").tobytes()

    def restore(self, tokens: int, row_map: bytes) -> None:
        """Takes up what :meth:`as_bytes` gave."""
        if row_map:
            self._rows = np.empty((self._shape.max_tokens, self._shape.batch), np.int32)
            stored = np.frombuffer(row_map, "<i4").reshape(tokens, self._shape.batch)
            self._rows[:tokens] = stored
