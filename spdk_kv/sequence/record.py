"""What the index keeps of a sequence: made from its layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spdk_kv.index import SequenceRecord
from spdk_kv.placement import SequenceLayout
from spdk_kv.sequence.layer import LayerCache


def make_record(
    layout: SequenceLayout, layers: Sequence[LayerCache]
) -> tuple[SequenceRecord, list[int]]:
    """The record, and how many tokens of each layer it covers. Writes what is only in memory, so
    it blocks on the device. Raises the errors of writes."""
    units, maps, recorded = [], [], []
    for cache in layers:
        with cache.lock:
            units += cache.write_tail()
            maps.append(cache.row_map())
            recorded.append(cache.tokens)
    if any(maps):
        identity = np.arange(layout.shape.batch, dtype="<i4")
        maps = [
            found or np.tile(identity, (tokens, 1)).tobytes()
            for found, tokens in zip(maps, recorded, strict=True)
        ]
    record = SequenceRecord(
        layout.shape,
        layout.granularity,
        layout.chunk_nbytes,
        layout.extent_nbytes,
        tuple(units),
        b"".join(maps),
    )
    return record, recorded
