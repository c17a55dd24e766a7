"""What a layer holds and where it lies: the facts that its writer, reader and tail share."""

from __future__ import annotations

from collections.abc import Sequence

from spdk_kv.errors import CorruptionError
from spdk_kv.index import UnitRecord
from spdk_kv.paths import Orchestrator, TrackedUnit
from spdk_kv.placement import SequenceLayout
from spdk_kv.units import align_down

CRC_NBYTES = 4
"""Size of a chunk's checksum, as the index keeps it."""


class Contents:
    """K and V of one layer: ``2 * extents_per_unit`` extents that grow together.

    The first ``stored_nbytes`` of every extent, whole chunks, were handed to the drive (some may
    still be in flight). The rest is the tail, in memory.
    """

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
        self.tokens = 0
        self.stored_nbytes = 0
        self.crcs = [bytearray() for _ in self.offsets]
        """The checksums of each extent's chunks, as far as their writes are settled."""
        self._paths = paths

    @property
    def extents(self) -> range:
        """The numbers of all extents: those of K, then those of V."""
        return range(len(self.offsets))

    @property
    def tail_nbytes(self) -> int:
        """Bytes of every extent that are in the tail."""
        return self.tokens * self.layout.row_nbytes - self.stored_nbytes

    def resize(self, stored_nbytes: int) -> None:
        """Sets ``stored_nbytes``, and the size that a residency policy sees."""
        self.stored_nbytes = stored_nbytes
        for unit in self.units:
            self._paths.resize(unit, stored_nbytes)

    def truncate(self, stored_nbytes: int) -> None:
        """Forgets the chunks behind the first ``stored_nbytes``."""
        for crcs in self.crcs:
            del crcs[stored_nbytes // self.layout.chunk_nbytes * CRC_NBYTES :]
        self.resize(stored_nbytes)

    def restore(self, records: Sequence[UnitRecord]) -> list[bytes]:
        """Takes up the recorded state; returns the checksum of each extent's tail, or b"".

        Raises CorruptionError where the extents' lengths differ.
        """
        row, chunk = self.layout.row_nbytes, self.layout.chunk_nbytes
        nbytes = records[0].nbytes
        if any(record.nbytes != nbytes for record in records) or nbytes % row:
            raise CorruptionError(f"{self.name}: the index gives its extents unequal lengths")
        self.tokens = nbytes // row
        self.resize(align_down(nbytes, chunk))
        whole = self.stored_nbytes // chunk * CRC_NBYTES
        self.crcs = [bytearray(record.checksums[:whole]) for record in records]
        return [record.checksums[whole:] for record in records]
