"""Where on the drive a sequence's extents lie: in pieces, which sequences may share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spdk_kv.placement.layout import SequenceLayout


@dataclass(frozen=True, slots=True)
class Piece:
    """Room for a part of every extent of a sequence.

    Of an extent of layer ``l`` it has the chunks from ``origins[l]`` to before ``ends[l]``; a
    single number stands for all layers. ``runs``: the drive's offsets of all extents' parts, or
    only of the first, where they are neighbours in the order of the extents.
    """

    origins: tuple[int, ...]
    ends: tuple[int, ...]
    runs: tuple[int, ...]

    def origin(self, layer: int) -> int:
        """The first chunk of the layer's extents that it has."""
        return self.origins[layer if len(self.origins) > 1 else 0]

    def end(self, layer: int) -> int:
        """The chunk behind the last one that it has of the layer's extents."""
        return self.ends[layer if len(self.ends) > 1 else 0]

    def sizes(self, layout: SequenceLayout) -> list[int]:
        """Bytes of the part of each extent."""
        layers = range(max(len(self.origins), len(self.ends)))
        return layout.extent_sizes([self.end(n) - self.origin(n) for n in layers])

    def allocated(self, layout: SequenceLayout) -> list[tuple[int, int]]:
        """(offset, nbytes) of what was allocated for it."""
        sizes = self.sizes(layout)
        if len(self.runs) == 1:
            return [(self.runs[0], sum(sizes))]
        # An extent of a layer that needed no more has no part in it.
        return list(zip(self.runs, [nbytes for nbytes in sizes if nbytes], strict=True))

    def offsets(self, layout: SequenceLayout) -> list[tuple[int, ...]]:
        """The drive's offsets of the parts of each layer's extents; of a layer that has none in it,
        nothing."""
        sizes = self.sizes(layout)
        if len(self.runs) == 1:
            places, at = [], self.runs[0]
            for nbytes in sizes:
                places.append(at)
                at += nbytes
        else:
            runs = iter(self.runs)
            places = [next(runs) if nbytes else 0 for nbytes in sizes]
        found, first = [], 0
        for number, layer in enumerate(layout.layers):
            is_in = self.end(number) > self.origin(number)
            found.append(tuple(places[first : first + layer.extents]) if is_in else ())
            first += layer.extents
        return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes ``[start, end)`` of some extents, and where on the drive byte ``start`` of each of them
    lies."""

    start: int
    end: int
    offsets: tuple[int, ...]

    def of(self, extents: slice) -> Stretch:
        """The same bytes of some of its extents."""
        return Stretch(self.start, self.end, self.offsets[extents])


Ground = tuple[Stretch, ...]
"""Where extents that grow together lie, from byte 0 on, without gaps."""


def grounds(layout: SequenceLayout, pieces: Sequence[Piece]) -> list[Ground]:
    """The ground of each layer. A chunk lies in the last of the ``pieces`` that has it or begins
    before it."""
    chunk = layout.chunk_nbytes
    found: list[list[Stretch]] = [[] for _ in layout.layers]
    for piece in pieces:
        for number, offsets in enumerate(piece.offsets(layout)):
            if not offsets:
                continue
            start, end = piece.origin(number) * chunk, piece.end(number) * chunk
            kept = _cut(found[number], start)
            kept.append(Stretch(start, end, offsets))
            found[number] = kept
    return [tuple(stretches) for stretches in found]


def _cut(stretches: list[Stretch], end: int) -> list[Stretch]:
    """``stretches`` as far as they lie before byte ``end``."""
    before = [each for each in stretches if each.start < end]
    if before and before[-1].end > end:
        last = before[-1]
        before[-1] = Stretch(last.start, end, last.offsets)
    return before


def locate(ground: Ground, number: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, nbytes) on the drive of bytes ``[start, end)`` of extent ``number``."""
    for stretch in ground:
        first, last = max(start, stretch.start), min(end, stretch.end)
        if first < last:
            yield stretch.offsets[number] + first - stretch.start, last - first
