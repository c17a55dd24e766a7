"""An array that grows by tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)

_GRAIN = 64  # tokens


class Growing(Generic[Scalar]):
    """[batch, ..., tokens, width] with room for more tokens: appending copies what is held only
    now and then, and the tokens of one batch row and head stay contiguous."""

    def __init__(self, values: npt.NDArray[Scalar]) -> None:
        """Begins with a copy of ``values``, [batch, ..., tokens, width]."""
        self.tokens = 0
        self._room = np.empty((*values.shape[:-2], 0, values.shape[-1]), values.dtype)
        self.append(values)

    @property
    def held(self) -> npt.NDArray[Scalar]:
        """[batch, ..., tokens, width], a view."""
        return self._room[..., : self.tokens, :]

    @property
    def nbytes(self) -> int:
        return self._room.nbytes

    @property
    def token_nbytes(self) -> float:
        """Of one batch row."""
        shape = self._room.shape
        return float(self._room.itemsize * math.prod(shape[1:-2]) * shape[-1])

    def append(self, values: npt.NDArray[Scalar]) -> None:
        added = self.more(values.shape[-2])
        added[...] = values

    def more(self, tokens: int) -> npt.NDArray[Scalar]:
        """A view of ``tokens`` further tokens, to be filled by the caller."""
        begin, end = self.tokens, self.tokens + tokens
        capacity = self._room.shape[-2]
        if end > capacity:
            # An eighth more: what is copied per token stays bounded, and little memory idles.
            wanted = -(-max(end, capacity + capacity // 8) // _GRAIN) * _GRAIN
            shape = self._room.shape
            room = np.empty((*shape[:-2], wanted, shape[-1]), self._room.dtype)
            room[..., :begin, :] = self.held
            self._room = room
        self.tokens = end
        return self._room[..., begin:end, :]

    def truncate(self, tokens: int) -> None:
        self.tokens = min(self.tokens, tokens)

    def reorder(self, rows: Sequence[int]) -> None:
        self._room = self._room[np.asarray(rows, np.int64)]

    def copy(self, tokens: int | None = None) -> Growing[Scalar]:
        return Growing(self.held if tokens is None else self.held[..., :tokens, :])
