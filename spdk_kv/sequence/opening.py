"""How a sequence comes to be: created on new extents, or restored from its record."""

from __future__ import annotations

from collections.abc import Sequence as Sequential

from spdk_kv.errors import CorruptionError, ShapeMismatch, SpdkKvError, is_unreadable
from spdk_kv.index import SequenceRecord
from spdk_kv.paths import UnitGroup
from spdk_kv.placement import CHUNK_NBYTES, SequenceLayout
from spdk_kv.sequence.contents import Contents
from spdk_kv.sequence.host import Host
from spdk_kv.sequence.layer import Layer
from spdk_kv.sequence.recorder import Recorder
from spdk_kv.sequence.sequence import Sequence
from spdk_kv.types import Granularity, KVShape


def create_sequence(
    host: Host, name: str, shape: KVShape, granularity: Granularity, temporary: bool
) -> Sequence:
    """A new, empty sequence with extents for all its tokens. CapacityError."""
    chunk = CHUNK_NBYTES
    while host.paths.routes.direct.segment_nbytes % chunk:
        chunk //= 2
    layout = SequenceLayout(shape, granularity, chunk)
    offsets = host.catalog.allocate([layout.extent_nbytes] * layout.extents)
    try:
        group = host.paths.adopt(f"sequence {name!r}", layout.unit_extents(offsets))
        try:
            layers = _layers(host, name, layout, offsets, group)
            recorder = Recorder(host.catalog, name, layout, layers, temporary)
            recorder.mark_dirty()
            return Sequence(host, name, layout, offsets, group, layers, recorder)
        except BaseException:
            host.paths.release(group)
            raise
    except BaseException:
        host.catalog.abandon(offsets)
        raise


def restore_sequence(host: Host, name: str, record: SequenceRecord) -> Sequence:
    """A recorded sequence, as it was at its last flush. Blocks on the drive.

    Raises ShapeMismatch where the store's segments do not fit it, and CorruptionError where its
    last chunk is damaged, in which case the sequence is dropped.
    """
    granularity: Granularity = "head" if record.granularity == "head" else "layer"
    layout = SequenceLayout(record.shape, granularity, record.chunk_nbytes)
    segment_nbytes = host.paths.routes.direct.segment_nbytes
    if segment_nbytes % layout.chunk_nbytes:
        raise ShapeMismatch(
            f"sequence {name!r} has checksums per {layout.chunk_nbytes} bytes; open the store "
            f"with segments that are a multiple of it, not {segment_nbytes}"
        )
    if len(record.units) != layout.extents:
        raise CorruptionError(f"the index gives sequence {name!r} a wrong number of extents")
    offsets = [unit.offset for unit in record.units]
    try:
        group = host.paths.adopt(f"sequence {name!r}", layout.unit_extents(offsets))
        try:
            layers = _layers(host, name, layout, offsets, group)
            _restore(layers, record)
            recorder = Recorder(host.catalog, name, layout, layers, False, record.life)
            recorder.mark_recorded()
            return Sequence(host, name, layout, offsets, group, layers, recorder)
        except BaseException:
            host.paths.release(group)
            raise
    except SpdkKvError as failure:
        if is_unreadable(failure):
            host.catalog.count_corruption()
            if host.catalog.drop_sequence(name, record.life):
                host.catalog.retire(offsets)
        raise


def _layers(
    host: Host, name: str, layout: SequenceLayout, offsets: list[int], group: UnitGroup
) -> list[Layer]:
    step = layout.extents_per_layer
    return [
        Layer(
            Contents(
                f"sequence {name!r}, layer {number}",
                layout,
                offsets[number * step : (number + 1) * step],
                group.units[2 * number : 2 * number + 2],
                host.paths,
            ),
            host.paths,
            host.staging,
            host.verify,
        )
        for number in range(layout.shape.layers)
    ]


def _restore(layers: Sequential[Layer], record: SequenceRecord) -> None:
    at = 0
    for number, layer in enumerate(layers):
        layout = layer.contents.layout
        step = layout.extents_per_layer
        units = record.units[number * step : (number + 1) * step]
        map_nbytes = units[0].nbytes // layout.row_nbytes * record.shape.batch * 4
        layer.restore(units, record.row_map[at : at + map_nbytes] if record.row_map else b"")
        at += map_nbytes
