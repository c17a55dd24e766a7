"""What an index records, and the allocator that has its extents in use."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spdk_kv._native.table import BlobTable
from spdk_kv.errors import CapacityError, CorruptionError, ShapeMismatch
from spdk_kv.index import BlobRecord, Index, IndexSnapshot, SequenceRecord
from spdk_kv.placement import (
    DATA_START,
    Allocator,
    Piece,
    SequenceLayout,
    Superblock,
    damaged_extents,
)
from spdk_kv.store.extents import BLOCK_NBYTES
from spdk_kv.store.records import blob_table, shown
from spdk_kv.units import align_up, format_nbytes

log = logging.getLogger(__name__)


@dataclass
class Recorded:
    """The entries of an index whose extents can be theirs, and the names of the others.

    Where two extents overlap, bytes of at least one were written over, and nothing shows which:
    neither is given to anyone.
    """

    blobs: BlobTable[BlobRecord]
    sequences: dict[str, SequenceRecord]
    damaged_blobs: list[str]
    damaged_sequences: list[str]

    @property
    def damaged(self) -> int:
        """How many entries are left out."""
        return len(self.damaged_blobs) + len(self.damaged_sequences)

    def forget_damaged(self, index: Index) -> None:
        """Commits that they are gone, before their extents are used again. Says so in the log."""
        if not self.damaged:
            return
        index.commit(dict.fromkeys(self.damaged_blobs), dict.fromkeys(self.damaged_sequences))
        names = [f"blob {shown(key)}" for key in self.damaged_blobs]
        names += [f"sequence {shown(name)}" for name in self.damaged_sequences]
        log.error(
            "the index %s recorded extents that overlap or cannot be; dropped, because other "
            "bytes may lie there: %s%s",
            index.path,
            ", ".join(names[:10]),
            f" and {len(names) - 10} more" if len(names) > 10 else "",
        )

    def allocator(self, current: Superblock | None, capacity: int) -> Allocator:
        """An allocator of ``capacity`` bytes that has all extents. CapacityError if a smaller
        store was asked for than those reach."""
        places = {place for each in self.sequences.values() for place in extents_of(each)}
        end = max((offset + nbytes for offset, nbytes in places), default=DATA_START)
        reached = max(end, self.blobs.end) - DATA_START
        if current is not None and capacity < reached <= current.capacity_nbytes:
            raise CapacityError(
                f"what is stored reaches to {format_nbytes(align_up(reached, BLOCK_NBYTES))} "
                f"({reached} bytes); a capacity of {format_nbytes(capacity)} would cut it off"
            )
        allocator = Allocator(capacity, BLOCK_NBYTES, DATA_START)
        if not allocator.reserve_blobs(self.blobs, places):
            blobs = self.blobs.values()  # whose error says which
            allocator.reserve_all([*places, *((b.offset, b.nbytes) for b in blobs if b.nbytes)])
        return allocator


def extents_of(sequence: SequenceRecord) -> list[tuple[int, int]]:
    """(offset, nbytes) of what was allocated for a recorded sequence."""
    layout = SequenceLayout(sequence.shape, sequence.granularity, sequence.chunk_nbytes)
    try:
        return [place for each in sequence.pieces for place in Piece(*each).allocated(layout)]
    except (ValueError, ShapeMismatch) as error:
        raise CorruptionError(f"its pieces are not those of its shape: {error}") from error


def count_holders(sequences: Iterable[SequenceRecord]) -> Counter[int]:
    """How many of the recorded ``sequences`` have each run."""
    return Counter(run for each in sequences for piece in each.pieces for run in piece.runs)


def load_recorded(index: Index | IndexSnapshot, capacity: int) -> Recorded:
    """Reads all entries of ``index``. ``capacity``: how far their extents may reach."""
    blobs = index.take_blobs(blob_table)
    sequences = {name: sequence.lean() for name, sequence in index.load_sequences()}
    # What sequences have in common is the same for all of them, or it is damaged.
    owners: dict[tuple[int, int], list[str]] = {}
    bad_names = set()
    for name, sequence in sequences.items():
        try:
            for place in extents_of(sequence):
                owners.setdefault(place, []).append(name)
        except CorruptionError:
            bad_names.add(name)
    bad_keys: list[str] = []
    if not Allocator(capacity, BLOCK_NBYTES, DATA_START).reserve_blobs(blobs, owners):
        bad_keys = _overlapping(blobs, owners, capacity, bad_names)
    for key in bad_keys:
        blobs.pop(key)
    for name in bad_names:
        del sequences[name]
    return Recorded(blobs, sequences, bad_keys, sorted(bad_names))


def _overlapping(
    blobs: BlobTable[BlobRecord],
    owners: Mapping[tuple[int, int], list[str]],
    capacity: int,
    bad_names: set[str],
) -> list[str]:
    """The keys of blobs whose extents cannot be theirs; adds the names of sequences like that."""
    held = [(key, blob) for key, blob in blobs.items() if blob.nbytes]
    extents = [(blob.offset, blob.nbytes) for _, blob in held]
    extents += owners
    names = list(owners.values())
    damaged = damaged_extents(extents, BLOCK_NBYTES, DATA_START, DATA_START + capacity)
    # Whose they are: the extents of blobs come first.
    bad_names |= {
        name for at, each in enumerate(names, len(held)) if at in damaged for name in each
    }
    return [key for position, (key, _) in enumerate(held) if position in damaged]
