"""Token ids, row by row: the text that a cache holds the K/V of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.uint32]]
"""Token ids, ``[tokens, rows]``, little-endian."""

PADDING = 0xFFFFFFFF
"""Stands for a token that is masked out, in front of a row's text."""

_LEAST_TOKENS = 256


class Text:
    """The tokens of a batch, as far as they are known: the first ``len(text)`` of each row.

    What comes after a token that is not known cannot be used either, since it was computed from
    it. Pure: no I/O.
    """

    def __init__(self, ids: Ids) -> None:
        self._buffer = np.array(ids, "<u4", order="C", ndmin=2)
        self._tokens = len(self._buffer)
        self._crc = zlib.crc32(self._buffer.data)

    @classmethod
    def empty(cls, rows: int = 1) -> Text:
        return cls(np.empty((0, rows), "<u4"))

    def __len__(self) -> int:
        return self._tokens

    @property
    def rows(self) -> int:
        return int(self._buffer.shape[1])

    @property
    def ids(self) -> Ids:
        """The tokens. Later changes of the text do not change them."""
        return self._buffer[: self._tokens]

    @property
    def crc(self) -> int:
        """CRC-32 of the bytes of :attr:`ids`."""
        return self._crc

    @property
    def padding(self) -> Ids:
        """For each row, how many of its tokens are masked out."""
        return np.asarray((self.ids == PADDING).sum(axis=0), "<u4")

    def extend(self, ids: Ids) -> None:
        """Adds tokens."""
        end = self._tokens + len(ids)
        if end > len(self._buffer):
            grown = np.empty((max(2 * end, _LEAST_TOKENS), self.rows), "<u4")
            grown[: self._tokens] = self.ids
            self._buffer = grown
        self._buffer[self._tokens : end] = ids
        self._crc = zlib.crc32(self._buffer[self._tokens : end].data, self._crc)
        self._tokens = end

    def cut(self, tokens: int) -> bool:
        """Forgets all tokens from ``tokens`` on. Returns whether there were any."""
        if tokens >= self._tokens:
            return False
        self._renew(self.ids[:tokens])
        return True

    def select(self, rows: Sequence[int]) -> None:
        """Row ``b`` becomes what row ``rows[b]`` was."""
        self._renew(self.ids[:, list(rows)])

    def _renew(self, ids: Ids) -> None:
        # A copy: who was given `ids` keeps them.
        self.__init__(ids)  # type: ignore[misc]


def common_tokens(some: Ids, others: Ids) -> int:
    """How many tokens are the same in all rows, from the first one on; 0 where the numbers of rows
    differ."""
    if some.shape[1] != others.shape[1]:
        return 0
    count = min(len(some), len(others))
    differ = (some[:count] != others[:count]).any(axis=1)
    return int(differ.argmax()) if differ.any() else count
