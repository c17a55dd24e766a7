"""Where a sequence's tokens lie in its extents: arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spdk_kv.errors import ShapeMismatch
from spdk_kv.types import Granularity, KVShape
from spdk_kv.units import align_down, align_up

CHUNK_NBYTES = 16 << 10
"""Bytes that share one checksum, and the least that a verified read moves. Part of the on-disk
format: a sequence's record keeps the size that it was made with."""


@dataclass(frozen=True)
class SequenceLayout:
    """Where the tokens of a sequence lie.

    A layer's K is one unit, its V another. A unit is one extent (granularity ``layer``) or one per
    KV head (``head``). An extent holds the tokens in order, each with these elements:

    - ``layer``: ``[batch, kv_heads, head_dim]``;
    - ``head``: ``[batch, head_dim]``.

    An append is contiguous that way, and a layer is one sequential read.
    """

    shape: KVShape
    granularity: Granularity
    chunk_nbytes: int = CHUNK_NBYTES

    def __post_init__(self) -> None:
        if self.granularity not in ("layer", "head"):
            raise ShapeMismatch(f"granularity is 'layer' or 'head', not {self.granularity!r}")
        if self.chunk_nbytes < 4096 or self.chunk_nbytes & (self.chunk_nbytes - 1):
            raise ShapeMismatch(
                f"chunk_nbytes is a power of two from 4096 on, not {self.chunk_nbytes}"
            )

    @property
    def extents_per_unit(self) -> int:
        """Extents of one layer's K, or of its V."""
        return self.shape.kv_heads if self.granularity == "head" else 1

    @property
    def extents_per_layer(self) -> int:
        """Extents of one layer's K and V together."""
        return 2 * self.extents_per_unit

    @property
    def extents(self) -> int:
        """Extents of the whole sequence."""
        return self.shape.layers * self.extents_per_layer

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token in one extent."""
        return self.shape.token_nbytes // self.extents_per_unit

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Elements of one token in one extent."""
        shape = self.shape
        if self.granularity == "head":
            return (shape.batch, shape.head_dim)
        return (shape.batch, shape.kv_heads, shape.head_dim)

    @property
    def extent_nbytes(self) -> int:
        """Bytes of one extent: all tokens, whole chunks."""
        return align_up(self.shape.max_tokens * self.row_nbytes, self.chunk_nbytes)

    def unit_extents(self, offsets: Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
        """(offset, nbytes) of the extents of each unit: K, then V of each layer in turn. The
        extents lie at ``offsets``."""
        step, nbytes = self.extents_per_unit, self.extent_nbytes
        return [
            tuple((offset, nbytes) for offset in offsets[at : at + step])
            for at in range(0, len(offsets), step)
        ]

    def token_range(self, first: int, last: int) -> tuple[int, int]:
        """The bytes of an extent, whole chunks, that cover tokens ``[first, last)``."""
        return (
            align_down(first * self.row_nbytes, self.chunk_nbytes),
            align_up(last * self.row_nbytes, self.chunk_nbytes),
        )
