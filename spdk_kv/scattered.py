"""Bytes that lie in several places of memory, and are one blob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spdk_kv.errors import ShapeMismatch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Scattered:
    """A value for ``put``, or an ``out`` for ``get``: ``pieces``, one behind the other, as the blob
    of uint8 that they are together.

    The drive reads and writes each where it lies if all but the last are whole blocks of its
    (:meth:`is_whole`); otherwise they go through memory of the store's, by a copy.
    """

    __slots__ = ("nbytes", "pieces")

    def __init__(self, pieces: Sequence[Bytes]) -> None:
        """
        Args:
            pieces: Contiguous arrays of uint8 [n], writable for ``get``.

        Raises:
            ShapeMismatch: One is something else.
        """
        for piece in pieces:
            if piece.dtype != np.uint8 or piece.ndim != 1 or not piece.flags.c_contiguous:
                raise ShapeMismatch("a piece is a contiguous array of uint8 of one dimension")
        self.pieces = tuple(piece for piece in pieces if piece.nbytes)
        self.nbytes = sum(piece.nbytes for piece in self.pieces)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.nbytes,)

    @property
    def writable(self) -> bool:
        return all(piece.flags.writeable for piece in self.pieces)

    def is_whole(self, block_nbytes: int) -> bool:
        """Whether each piece but the last is whole blocks of ``block_nbytes``."""
        return all(piece.nbytes % block_nbytes == 0 for piece in self.pieces[:-1])

    def gather(self, into: Bytes) -> None:
        """Copies the pieces to the beginning of ``into``."""
        at = 0
        for piece in self.pieces:
            into[at : at + piece.nbytes] = piece
            at += piece.nbytes

    def scatter(self, source: Bytes) -> None:
        """Copies what :meth:`gather` made back to the pieces."""
        at = 0
        for piece in self.pieces:
            piece[:] = source[at : at + piece.nbytes]
            at += piece.nbytes
