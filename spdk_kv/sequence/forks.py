"""A fork: a sequence that begins with the tokens of another one, on the ground of both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from spdk_kv.deadline import Deadline
from spdk_kv.sequence.growth import Growth, HeldPiece
from spdk_kv.sequence.host import Records
from spdk_kv.sequence.layer import Layer, LayerSnapshot


def share(
    growth: Growth,
    layers: Sequence[Layer],
    tokens: int | None,
    records: Records,
    deadline: Deadline,
) -> tuple[list[HeldPiece], list[LayerSnapshot]]:
    """The first ``tokens`` of ``layers`` (None: all of each), for another sequence: the pieces that
    they lie in, which that one holds from now on, and what is not on the drive.

    Waits for writes; ShapeMismatch where a layer has fewer tokens, and the drive's errors.
    """
    with ExitStack() as locks:
        locks.enter_context(deadline.hold(growth.lock))
        # First, so that nothing gives them up in between.
        shared = growth.share()
        try:
            begun = []
            for layer in layers:  # in this order; nobody else holds two of them
                locks.enter_context(deadline.hold(layer.lock))
                begun.append(layer.begin_snapshot(tokens, deadline))
            snapshots = []
            for number, layer in enumerate(layers):
                snapshot = begun[number]()
                chunks = snapshot.stored_nbytes // layer.contents.layout.chunk_nbytes
                growth.freeze(layer, number, chunks)
                snapshots.append((snapshot, chunks))
        except BaseException:
            records.abandon([run for held in shared for run in held.piece.runs])
            raise
        kept = growth.keep(shared, [chunks for _, chunks in snapshots])
    return kept, [snapshot for snapshot, _ in snapshots]
