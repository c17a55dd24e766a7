"""What a layer holds and where it lies: the facts that its writer, reader and tail share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spdk_kv._native.memory import Lease
from spdk_kv._native.transfer import Transfer
from spdk_kv.errors import CorruptionError
from spdk_kv.paths import Orchestrator, TrackedUnit
from spdk_kv.placement import Ground, LayerLayout, locate
from spdk_kv.units import align_down

if TYPE_CHECKING:
    import torch

CRC_NBYTES = 4
"""Size of a chunk's checksum, as the index keeps it."""


def chunk_crcs(transfer: Transfer, number: int, each: int) -> bytes:
    """The checksums of the chunks of the ``number``-th extent in ``transfer``, where every extent
    is in ``each`` pieces."""
    if each == 1:
        return transfer.chunk_crcs(number)
    return b"".join(transfer.chunk_crcs(number * each + part) for part in range(each))


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
    """K and V of one layer: extents that grow together, on a ``ground`` that grows as well.

    ``state`` is replaced as a whole, by one assignment, when everything that the new one tells of
    is there. So an interrupt, wherever it comes, leaves the layer as it was or as it was to be:
    bytes behind those of ``state`` mean nothing, whether in memory, on the drive or in ``crcs``.
    """

    state: State
    """Set by the layer's tail."""

    def __init__(
        self,
        name: str,
        layout: LayerLayout,
        ground: Ground,
        writable: tuple[int, int],
        units: Sequence[TrackedUnit],
        paths: Orchestrator,
    ) -> None:
        self.name = name
        self.layout = layout
        self.ground = ground
        self.writable = writable
        """Bytes of every extent that may be written: the end of the ground, as far as this
        sequence has it for itself."""
        self.units = units
        self.failure: Exception | None = None
        """Why the layer cannot be used any more: a write failed, or the sequence was deleted."""
        self.shrinks = 0
        """How often it had less from one moment to the next."""
        # The checksums of each extent's chunks, as far as their writes are settled.
        self._crcs = [bytearray() for _ in range(layout.extents)]
        self._paths = paths

    def check(self) -> None:
        """Raises what made the layer unusable, if anything did."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    @property
    def extents(self) -> range:
        """The numbers of all extents: those of K, then those of V."""
        return range(self.layout.extents)

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return self.state.tokens

    @property
    def stored_nbytes(self) -> int:
        """Bytes of every extent that were handed to the drive."""
        return self.state.stored_nbytes

    @property
    def end_nbytes(self) -> int:
        """Bytes of every extent that its tokens take."""
        return self.state.tokens * self.layout.row_nbytes

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
        self.shrinks += 1
        # First, so that nothing serves bytes of which others may take the place.
        self._resize(state.stored_nbytes)
        self.state = state

    def _resize(self, stored_nbytes: int) -> None:
        for unit in self.units:
            self._paths.resize(unit, stored_nbytes)

    # -- ground ---------------------------------------------------------------------------------

    def ranges(self, number: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, nbytes) on the drive of bytes ``[start, end)`` of extent ``number``."""
        return locate(self.ground, number, start, end)

    def pieces(
        self,
        numbers: np.ndarray[Any, Any],
        starts: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
        addresses: np.ndarray[Any, Any],
    ) -> list[np.ndarray[Any, np.dtype[np.uint64]]]:
        """Offsets on the drive, addresses and sizes of what bytes ``[starts[i], ends[i])`` of
        extents ``numbers[i]``, from ``addresses[i]`` on, are in; in their order."""
        found = []
        for stretch in self.ground:
            first, last = np.maximum(starts, stretch.start), np.minimum(ends, stretch.end)
            some = np.flatnonzero(first < last)
            first, last = first[some], last[some]
            offsets = np.asarray(stretch.offsets)[numbers[some]] + first - stretch.start
            found.append((some, offsets, addresses[some] + first - starts[some], last - first))
        which, *parts = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.argsort(which, kind="stable")
        return [part[order].astype(np.uint64) for part in parts]

    def has_room(self, end: int) -> bool:
        """Whether every extent may be written from the end of what is stored to byte ``end``."""
        first, last = self.writable
        stored = self.state.stored_nbytes
        return end <= stored or (first <= stored and end <= last)

    def move(self, ground: Ground, writable: tuple[int, int]) -> None:
        """What is written from now on lies on ``ground``."""
        if ground != self.ground:
            if self._place(ground) != self._place(self.ground):
                self.state.tail.written_nbytes = 0  # the drive has it elsewhere
            self.ground = ground
            first = 0
            for unit in self.units:
                part = slice(first, first + unit.count)
                self._paths.move(unit, tuple(stretch.of(part) for stretch in ground))
                first += unit.count
        self.writable = writable

    def _place(self, ground: Ground) -> list[tuple[int, int]]:
        """Where the tail of the first extent belongs."""
        stored = self.state.stored_nbytes
        return list(locate(ground, 0, stored, stored + self.layout.chunk_nbytes))

    # -- checksums ------------------------------------------------------------------------------

    def set_crcs(self, number: int, start: int, crcs: bytes) -> None:
        """Keeps the checksums of the chunks from byte ``start`` of extent ``number`` on. May be
        done again, with the same ones."""
        at = self._place_of_crc(start)
        self._crcs[number][at : at + len(crcs)] = crcs

    def crcs(self, number: int, start: int, end: int) -> bytes:
        """The checksums of bytes ``[start, end)`` of extent ``number``, whole chunks."""
        return bytes(self._crcs[number][self._place_of_crc(start) : self._place_of_crc(end)])

    def crcs_of(
        self,
        numbers: np.ndarray[Any, Any],
        starts: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
    ) -> bytes:
        """The checksums of bytes ``[starts[i], ends[i])`` of extents ``numbers[i]``, whole chunks,
        one after the other."""
        chunk = self.layout.chunk_nbytes
        counts = (ends - starts) // chunk
        firsts = np.repeat(starts // chunk - np.cumsum(counts) + counts, counts)
        at, extents = firsts + np.arange(len(firsts)), np.repeat(numbers, counts)
        found = np.empty(len(at), "<u4")
        for number in np.unique(numbers):
            mine = extents == number
            # Of a copy: a bytearray that numpy looks at could not grow.
            found[mine] = np.frombuffer(bytes(self._crcs[number]), "<u4")[at[mine]]
        return found.tobytes()

    def _place_of_crc(self, at: int) -> int:
        return at // self.layout.chunk_nbytes * CRC_NBYTES

    # -- records --------------------------------------------------------------------------------

    def restore(self, tokens: int, checksums: Sequence[bytes]) -> list[bytes]:
        """Takes up a recorded state, with the ``checksums`` of each extent; returns those of their
        tails, or b"".

        Raises CorruptionError where there are too many tokens, or not as many checksums.
        """
        nbytes = tokens * self.layout.row_nbytes
        stored = align_down(nbytes, self.layout.chunk_nbytes)
        whole = self._place_of_crc(stored)
        count = whole + CRC_NBYTES * (nbytes > stored)
        reach = self.ground[-1].end if self.ground else 0
        if nbytes > reach or any(len(each) != count for each in checksums):
            raise CorruptionError(f"{self.name}: the index gives its extents wrong lengths")
        self._crcs = [bytearray(each[:whole]) for each in checksums]
        self.grow(State(tokens, stored, self.state.tail))
        return [each[whole:] for each in checksums]
