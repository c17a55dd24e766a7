"""How a sequence's tokens lie in its extents: arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from spdk_kv.errors import ShapeMismatch
from spdk_kv.types import Granularity, KVShape, LayerShape
from spdk_kv.units import align_down, align_up

CHUNK_NBYTES = 16 << 10
"""Bytes that share one checksum, and the least that a verified read moves. Part of the on-disk
format: a sequence's record keeps the size that it was made with."""

# A block of most drives.
_LEAST_CHUNK_NBYTES = 4096
# As many as are read together at least where single tokens are chosen (arXiv 2511.11907).
_FEW_TOKENS = 4
# Where the values of a joint row begin, and a whole row: any element may begin there.
_JOINT_ALIGNMENT = 16


@dataclass(frozen=True)
class LayerLayout:
    """How the tokens of one layer lie.

    Its K is one unit, its V another. A unit is one extent (``layer``) or one per KV head
    (``head``). Where K and V are unlike, both are one unit of one extent (``joint``), so that all
    extents of a layer grow alike. With ``token`` both are one unit as well, of one extent per batch
    row: K and V of a few tokens of one row are one read. An extent holds the tokens in order, each
    with these elements:

    - ``layer``: ``[batch, kv_heads, head_dim]``;
    - ``head``: ``[batch, head_dim]``;
    - ``joint``: ``[batch, keys and values]``, each ``[kv_heads, head_dim]``;
    - ``token``: ``[keys and values]``, likewise.

    An append is contiguous that way, and a layer is one sequential read.
    """

    shape: LayerShape
    batch: int
    order: Literal["layer", "head", "joint", "token"]
    chunk_nbytes: int

    @cached_property
    def unit_extents(self) -> tuple[int, ...]:
        """How many extents each of its units has."""
        if self.order == "joint":
            return (1,)
        if self.order == "token":
            return (self.batch,)
        return (self.shape.kv_heads,) * 2 if self.order == "head" else (1, 1)

    @cached_property
    def extents(self) -> int:
        """How many extents it has: first those of K, then those of V."""
        return sum(self.unit_extents)

    @cached_property
    def values_at(self) -> int:
        """Where in one batch row of a token that has K and V together the values begin."""
        return align_up(self.shape.key_nbytes, _JOINT_ALIGNMENT)

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of one token in one extent."""
        if self.order in ("joint", "token"):
            own = align_up(self.values_at + self.shape.value_nbytes, _JOINT_ALIGNMENT)
            return self.batch * own // self.extents
        return self.batch * self.shape.key_nbytes // self.unit_extents[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Elements of one token in one extent, where those are K's or V's."""
        if self.order == "head":
            return (self.batch, self.shape.head_dim)
        return (self.batch, self.shape.kv_heads, self.shape.head_dim)

    @property
    def token_nbytes(self) -> int:
        """Payload bytes of one token: its K and V."""
        return self.batch * (self.shape.key_nbytes + self.shape.value_nbytes)

    def whole_chunks(self, tokens: int) -> int:
        """How many chunks of an extent ``tokens`` fill."""
        return tokens * self.row_nbytes // self.chunk_nbytes

    def chunks(self, tokens: int) -> int:
        """How many chunks of an extent hold ``tokens``, the unfinished one included."""
        return align_up(tokens * self.row_nbytes, self.chunk_nbytes) // self.chunk_nbytes

    def token_range(self, first: int, last: int) -> tuple[int, int]:
        """The bytes of an extent, whole chunks, that cover tokens ``[first, last)``."""
        return (
            align_down(first * self.row_nbytes, self.chunk_nbytes),
            align_up(last * self.row_nbytes, self.chunk_nbytes),
        )


@dataclass(frozen=True)
class SequenceLayout:
    """How the tokens of a sequence lie: its layers one after the other (:class:`LayerLayout`)."""

    shape: KVShape
    granularity: Granularity
    chunk_nbytes: int = CHUNK_NBYTES

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ShapeMismatch(
                f"granularity is 'layer', 'head' or 'token', not {self.granularity!r}"
            )
        least = _LEAST_CHUNK_NBYTES
        if self.chunk_nbytes < least or self.chunk_nbytes & (self.chunk_nbytes - 1):
            raise ShapeMismatch(
                f"chunk_nbytes is a power of two from {least} on, not {self.chunk_nbytes}"
            )

    @cached_property
    def layers(self) -> tuple[LayerLayout, ...]:
        """One for each layer."""
        made: dict[LayerShape, LayerLayout] = {}
        for number in range(self.shape.layers if self.shape.per_layer else 1):
            shape = self.shape.layer(number)
            if shape not in made:
                together = self.granularity == "token" or shape.is_even
                order = self.granularity if together else "joint"
                made[shape] = LayerLayout(shape, self.shape.batch, order, self.chunk_nbytes)
        if not self.shape.per_layer:
            return tuple(made.values()) * self.shape.layers
        return tuple(made[shape] for shape in self.shape.per_layer)

    @cached_property
    def extents(self) -> int:
        """Extents of the whole sequence."""
        return sum(layer.extents for layer in self.layers)

    @cached_property
    def is_even(self) -> bool:
        """Whether all layers are alike."""
        return not self.shape.per_layer or len(set(self.layers)) == 1

    def extent_sizes(self, chunks: Sequence[int]) -> list[int]:
        """Bytes of each extent of the sequence, where those of a layer have so many ``chunks``
        each. One number stands for all layers."""
        each = tuple(chunks) * self.shape.layers if len(chunks) == 1 else chunks
        return [
            count * self.chunk_nbytes
            for layer, count in zip(self.layers, each, strict=True)
            for _ in range(layer.extents)
        ]


def with_small_chunks(layout: SequenceLayout) -> SequenceLayout:
    """``layout`` with chunks for reads of four tokens: the largest that divide four of every
    layer."""
    chunk = layout.chunk_nbytes
    fours = [_FEW_TOKENS * layer.row_nbytes for layer in layout.layers]
    while chunk > _LEAST_CHUNK_NBYTES and any(nbytes % chunk for nbytes in fours):
        chunk //= 2
    return replace(layout, chunk_nbytes=chunk)
