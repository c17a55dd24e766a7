"""What a layer holds and where it lies: the facts that its writer, reader and tail share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spdk_kv._native.memory import Lease
from spdk_kv.errors import CorruptionError
from spdk_kv.index import UnitRecord
from spdk_kv.paths import Orchestrator, TrackedUnit
from spdk_kv.placement import SequenceLayout
from spdk_kv.units import align_down

if TYPE_CHECKING:
    import torch

CRC_NBYTES = 4
"""Size of a chunk's checksum, as the index keeps it."""


@dataclass(eq=False, slots=True)
class TailBuffer:
    """Memory for the unfinished last chunk of each extent.

    ``rows``: its bytes, ``[extents, chunk]``. ``written_nbytes``: leading bytes of each that are
    the same on the drive.
    """

    lease: Lease
    rows: torch.Tensor
    written_nbytes: int


@dataclass(frozen=True, slots=True)
class State:
    """What a layer holds at one moment.

    The first ``stored_nbytes`` of every extent, whole chunks, were handed to the drive (some may
    still be in flight). The rest of the ``tokens`` is in ``tail``.
    """

    tokens: int
    stored_nbytes: int
    tail: TailBuffer


class Contents:
    """K and V of one layer: ``2 * extents_per_unit`` extents that grow together.

    ``state`` is replaced as a whole, by one assignment, when everything that the new one tells of
    is there. So an interrupt, wherever it comes, leaves the layer as it was or as it was to be:
    bytes behind those of ``state`` mean nothing, whether in memory, on the drive or in ``crcs``.
    """

    state: State
    """Set by the layer's tail."""

    def __init__(
        self,
        name: str,
        layout: SequenceLayout,
        offsets: Sequence[int],
        units: Sequence[TrackedUnit],
        paths: Orchestrator,
    ) -> None:
        self.name = name
        self.layout = layout
        self.offsets = list(offsets)
        self.units = units
        self.failure: Exception | None = None
        """Why the layer cannot be used any more: a write failed, or the sequence was deleted."""
        # The checksums of each extent's chunks, as far as their writes are settled.
        self._crcs = [bytearray() for _ in self.offsets]
        self._paths = paths

    def check(self) -> None:
        """Raises what made the layer unusable, if anything did."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    @property
    def extents(self) -> range:
        """The numbers of all extents: those of K, then those of V."""
        return range(len(self.offsets))

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return self.state.tokens

    @property
    def stored_nbytes(self) -> int:
        """Bytes of every extent that were handed to the drive."""
        return self.state.stored_nbytes

    @property
    def tail_nbytes(self) -> int:
        """Bytes of every extent that are in the tail."""
        return self.tail_nbytes_of(self.state)

    def tail_nbytes_of(self, state: State) -> int:
        """As :attr:`tail_nbytes`, when ``state`` will be the layer's."""
        return state.tokens * self.layout.row_nbytes - state.stored_nbytes

    def grow(self, state: State) -> None:
        """``state`` is the layer's from here on, with more in it than before."""
        is_longer = state.stored_nbytes > self.state.stored_nbytes
        self.state = state
        if is_longer:
            self._resize(state.stored_nbytes)

    def shrink(self, state: State) -> None:
        """``state`` is the layer's from here on, with less in it than before."""
        # First, so that nothing serves bytes of which others may take the place.
        self._resize(state.stored_nbytes)
        self.state = state

    def _resize(self, stored_nbytes: int) -> None:
        for unit in self.units:
            self._paths.resize(unit, stored_nbytes)

    # -- checksums ------------------------------------------------------------------------------

    def set_crcs(self, number: int, start: int, crcs: bytes) -> None:
        """Keeps the checksums of the chunks from byte ``start`` of extent ``number`` on. May be
        done again, with the same ones."""
        at = self._place_of_crc(start)
        self._crcs[number][at : at + len(crcs)] = crcs

    def crcs(self, number: int, start: int, end: int) -> bytes:
        """The checksums of bytes ``[start, end)`` of extent ``number``, whole chunks."""
        return bytes(self._crcs[number][self._place_of_crc(start) : self._place_of_crc(end)])

    def _place_of_crc(self, at: int) -> int:
        return at // self.layout.chunk_nbytes * CRC_NBYTES

    # -- records --------------------------------------------------------------------------------

    def restore(self, records: Sequence[UnitRecord]) -> list[bytes]:
        """Takes up the recorded state; returns the checksum of each extent's tail, or b"".

        Raises CorruptionError where the extents' lengths differ.
        """
        row, chunk = self.layout.row_nbytes, self.layout.chunk_nbytes
        nbytes = records[0].nbytes
        if any(record.nbytes != nbytes for record in records) or nbytes % row:
            raise CorruptionError(f"{self.name}: the index gives its extents unequal lengths")
        stored = align_down(nbytes, chunk)
        whole = self._place_of_crc(stored)
        self._crcs = [bytearray(record.checksums[:whole]) for record in records]
        self.grow(State(nbytes // row, stored, self.state.tail))
        return [record.checksums[whole:] for record in records]
