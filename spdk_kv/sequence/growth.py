"""The pieces of the drive that a sequence has, and how it comes by more of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from spdk_kv.deadline import NEVER, Deadline
from spdk_kv.errors import CapacityError
from spdk_kv.placement import Ground, Piece, SequenceLayout, grounds
from spdk_kv.sequence.host import Records
from spdk_kv.sequence.layer import Layer


@dataclass(eq=False)
class HeldPiece:
    """A piece, as all sequences of this process that have it in common see it.

    ``owner``: who may write to it although others have it as well; None if nobody. Of layer ``l``
    the owner leaves chunks before ``frozen[l]`` alone, because others have them.
    """

    piece: Piece
    owner: object
    frozen: list[int]


class Growth:
    """The pieces of one sequence.

    With ``max_tokens`` it has room for all of them from the beginning, in one piece; otherwise each
    piece is as large as all before it. ``lock`` is taken before any layer's lock.
    """

    def __init__(
        self,
        records: Records,
        layout: SequenceLayout,
        pieces: Sequence[HeldPiece] = (),
    ) -> None:
        self.lock = threading.RLock()
        self.pieces = list(pieces)
        self._records = records
        self._layout = layout
        self._owner = object()
        for held in self.pieces:
            if held.owner is None and records.holders(held.piece.runs[0]) == 1:
                held.owner = self._owner
        # No layer has ground in them any more, but the last record may name them.
        self._left: list[HeldPiece] = []

    def reserve(self, tokens: int) -> None:
        """The first piece, with room for ``tokens``. CapacityError; may block on the drive."""
        self._add(self._allocate([0] * self._layout.shape.layers, tokens, NEVER))

    def begin(self, tokens: Sequence[int], deadline: Deadline) -> None:
        """Room for the unfinished chunks of a sequence that was just forked, with so many
        ``tokens`` in each layer. CapacityError; may block on the drive."""
        counts = list(zip(self._layout.layers, tokens, strict=True))
        origins = [layer.whole_chunks(count) for layer, count in counts]
        if any(layer.chunks(count) > layer.whole_chunks(count) for layer, count in counts):
            self._add(self._allocate(origins, tokens, deadline))

    def grounds(self) -> list[Ground]:
        """The ground of each layer."""
        return grounds(self._layout, [held.piece for held in self.pieces])

    def writable(self, layer: int) -> tuple[int, int]:
        """The bytes of the layer's extents that this sequence may write: those at the end of its
        ground that nobody else has."""
        first = last = -1
        before = 1 << 62
        for held in reversed(self.pieces):
            piece = held.piece
            origin, end = piece.origin(layer), min(piece.end(layer), before)
            if origin >= end:
                continue
            last = end if last < 0 else last
            is_own = held.owner is self._owner
            frozen = held.frozen[layer] if is_own else end
            if frozen > origin and self._records.holders(piece.runs[0]) == 1:
                frozen = origin
            if frozen >= end:
                first = end if first < 0 else first
                break
            first = max(frozen, origin)
            if first > origin:
                break
            before = origin
        chunk = self._layout.chunk_nbytes
        return max(first, 0) * chunk, max(last, 0) * chunk

    def extend(
        self,
        layers: Sequence[Layer],
        number: int,
        tokens: int,
        deadline: Deadline = NEVER,
        *,
        may_stage: bool = True,
    ) -> None:
        """Gives layer ``number`` room for ``tokens``, and with it all others.

        The tokens that there are stay where they are; what lies on ground that others have as well
        is continued on another piece. May block on the drive, with no lock held. CapacityError
        leaves everything as it was. ``may_stage``: whether other sequences may be recorded for it,
        which who holds one's lock must not wait for.
        """
        while True:
            with deadline.hold(self.lock):
                self._refresh(layers, deadline)
                with deadline.hold(layers[number].lock):
                    layers[number].contents.check()
                    if layers[number].has_room(tokens):
                        return
                before, origins = self.pieces, self._origins(layers, deadline)
                wanted = self._wanted(number, origins[number], tokens)
            try:
                piece = self._allocate(origins, wanted, deadline, may_stage)
            except CapacityError:
                if wanted <= tokens:
                    raise
                piece = self._allocate(origins, tokens, deadline, may_stage)
            try:
                with deadline.hold(self.lock):
                    if self.pieces is before:
                        self._add(piece)
                        self._refresh(layers, deadline)
                        return
            except BaseException:
                if self.pieces is before:
                    self._records.abandon(piece.runs)
                raise
            self._records.abandon(piece.runs)  # another thread was sooner

    def _wanted(self, number: int, origin: int, tokens: int) -> int:
        """How many tokens there is to be room for, when ``tokens`` are needed."""
        own = sum(
            held.piece.end(number) - held.piece.origin(number)
            for held in self.pieces
            if held.owner is self._owner
        )
        layout = self._layout.layers[number]
        wanted = max(tokens, (origin + own) * layout.chunk_nbytes // layout.row_nbytes)
        return min(wanted, max(tokens, self._layout.shape.max_tokens or wanted))

    def _origins(self, layers: Sequence[Layer], deadline: Deadline) -> list[int]:
        """Where a new piece begins in each layer: behind the ground that it has, or where its
        tokens end, if that is ground that others have as well."""
        chunk, found = self._layout.chunk_nbytes, []
        for layer in layers:
            with deadline.hold(layer.lock):
                first, last = layer.contents.writable
                stored = layer.contents.stored_nbytes
                found.append((last if first <= stored <= last else stored) // chunk)
        return found

    def _allocate(
        self,
        origins: Sequence[int],
        tokens: int | Sequence[int],
        deadline: Deadline,
        may_stage: bool = True,
    ) -> Piece:
        """A piece that begins at ``origins`` and has room for ``tokens`` in every layer, or as many
        in each."""
        counts = [tokens] * len(origins) if isinstance(tokens, int) else tokens
        each = zip(origins, self._layout.layers, counts, strict=True)
        ends = [max(origin, layout.chunks(count)) for origin, layout, count in each]
        sizes = self._layout.extent_sizes([e - o for o, e in zip(origins, ends, strict=True)])
        parts = [nbytes for nbytes in sizes if nbytes]
        runs = self._records.allocate_joined(parts, deadline, may_stage)
        return Piece(_even(origins), _even(ends), tuple(runs))

    def _add(self, piece: Piece) -> None:
        held = HeldPiece(piece, self._owner, [0] * len(self._layout.layers))
        self.pieces = [*self.pieces, held]

    def _refresh(self, layers: Sequence[Layer], deadline: Deadline) -> None:
        """Tells the layers of their ground. Done again, it does what an interrupt left."""
        for number, (layer, ground) in enumerate(zip(layers, self.grounds(), strict=True)):
            with deadline.hold(layer.lock):
                layer.contents.move(ground, self.writable(number))
        self._leave()

    def _leave(self) -> None:
        """Sets aside the pieces in which no layer has ground any more."""
        kept: list[HeldPiece] = []
        left: list[HeldPiece] = []
        nearest = [1 << 62] * len(self._layout.layers)
        for held in reversed(self.pieces):
            is_used = False
            for number, before in enumerate(nearest):
                origin, end = held.piece.origin(number), held.piece.end(number)
                if origin < end:
                    is_used |= origin < before
                    nearest[number] = min(origin, before)
            (kept if is_used else left).append(held)
        if left:
            self._left += left
            self.pieces = kept[::-1]

    def recordable(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Origins, ends and runs of each piece."""
        return [(each.piece.origins, each.piece.ends, each.piece.runs) for each in self.pieces]

    @property
    def is_shared(self) -> bool:
        """Whether others have some of its pieces as well."""
        return any(self._records.holders(held.piece.runs[0]) > 1 for held in self.pieces)

    def take_left(self) -> list[int]:
        """The runs of pieces that were set aside, which no record names any more."""
        left, self._left = self._left, []
        return [run for held in left for run in held.piece.runs]

    def take_all(self) -> list[int]:
        """The runs of all pieces, which this sequence has none of from now on."""
        with self.lock:
            pieces, self.pieces = self.pieces, []
            return [*self.take_left(), *(run for held in pieces for run in held.piece.runs)]

    # -- sharing --------------------------------------------------------------------------------

    def share(self) -> list[HeldPiece]:
        """All its pieces, for another sequence, which holds them from now on. With ``lock``
        held."""
        shared = list(self.pieces)
        self._records.share([run for held in shared for run in held.piece.runs])
        return shared

    def freeze(self, layer: Layer, number: int, chunks: int) -> None:
        """Another sequence has the first ``chunks`` of the layer's extents as well. With ``lock``
        and the layer's lock held, behind :meth:`share`."""
        for held in self.pieces:
            held.frozen[number] = max(held.frozen[number], chunks)
        layer.contents.writable = self.writable(number)

    def keep(self, shared: Sequence[HeldPiece], chunks: Sequence[int]) -> list[HeldPiece]:
        """Those of the ``shared`` pieces that have some of the first ``chunks`` of a layer's
        extents; gives up the others. None are needed where all ``chunks`` are 0."""
        kept: list[HeldPiece] = []
        others: list[HeldPiece] = []
        for held in shared:
            is_used = any(
                held.piece.origin(number) < min(count, held.piece.end(number))
                for number, count in enumerate(chunks)
            )
            (kept if is_used else others).append(held)
        self._records.abandon([run for held in others for run in held.piece.runs])
        return kept


def restored(pieces: Sequence[Piece], layers: int) -> list[HeldPiece]:
    """Pieces that a record names. Nobody owns one that other records name as well."""
    return [HeldPiece(piece, None, [0] * layers) for piece in pieces]


def _even(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(numbers[:1] if len(set(numbers)) == 1 else numbers)
