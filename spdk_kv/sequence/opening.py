"""How a sequence comes to be: created on new extents, or restored from its record."""

from __future__ import annotations

from spdk_kv.errors import CorruptionError, ShapeMismatch, SpdkKvError, is_unreadable
from spdk_kv.index import SequenceRecord
from spdk_kv.placement import CHUNK_NBYTES, Piece, SequenceLayout, with_small_chunks
from spdk_kv.sequence.growth import Growth, restored
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.sequence import Sequence
from spdk_kv.types import Granularity, KVShape


def create_sequence(
    host: Host, name: str, shape: KVShape, granularity: Granularity, temporary: bool
) -> Sequence:
    """A new, empty sequence, with extents for all its tokens if their number is known.
    CapacityError."""
    chunk = CHUNK_NBYTES
    while host.paths.routes.direct.segment_nbytes % chunk:
        chunk //= 2
    layout = SequenceLayout(shape, granularity, chunk)
    if granularity == "token":
        layout = with_small_chunks(layout)
    growth = Growth(host.catalog, layout)
    if shape.max_tokens is not None:
        growth.reserve(shape.max_tokens)
    sequence = Sequence(host, name, layout, growth, temporary)
    try:
        sequence.make_layers()
        sequence.mark_new()
        return sequence
    except BaseException:
        sequence.release_units()
        host.catalog.abandon(growth.take_all())
        raise


def restore_sequence(host: Host, name: str, record: SequenceRecord) -> Sequence:
    """A recorded sequence, as it was at its last flush. Blocks on the drive.

    Raises ShapeMismatch where the store's segments do not fit it, and CorruptionError where its
    last chunk is damaged, in which case the sequence is dropped.
    """
    layout = SequenceLayout(record.shape, record.granularity, record.chunk_nbytes)
    segment_nbytes = host.paths.routes.direct.segment_nbytes
    if segment_nbytes % layout.chunk_nbytes:
        raise ShapeMismatch(
            f"sequence {name!r} has checksums per {layout.chunk_nbytes} bytes; open the store "
            f"with segments that are a multiple of it, not {segment_nbytes}"
        )
    if len(record.checksums) != layout.extents:
        raise CorruptionError(f"the index gives sequence {name!r} a wrong number of extents")
    pieces = restored([Piece(*each) for each in record.pieces], record.shape.layers)
    growth = Growth(host.catalog, layout, pieces)
    sequence = Sequence(host, name, layout, growth, False, record.life)
    try:
        sequence.restore(record)
    except SpdkKvError as failure:
        sequence.release_units()
        if is_unreadable(failure):
            host.catalog.count_corruption()
            if host.catalog.drop_sequence(name, record.life):
                host.catalog.retire(growth.take_all())
        raise
    except BaseException:
        sequence.release_units()
        raise
    return sequence
