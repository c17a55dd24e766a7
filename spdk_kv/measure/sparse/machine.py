"""All that a choice of settings needs to know of a drive and a processor, measured in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spdk_kv.measure.sparse.groups import GroupReads, filled_sequence, read_groups, read_whole
from spdk_kv.measure.sparse.scoring import time_selection
from spdk_kv.measure.sparse.weights import weights_nbytes_per_s
from spdk_kv.sparse.tuning import Decoding, Machine, ReadTimes
from spdk_kv.store import KVStore
from spdk_kv.types import LayerShape

GROUP_TOKENS = (4, 8, 16, 32, 64)
"""Sizes of groups that are measured."""

COUNTS = (1, 8, 32, 128, 512)
"""Groups of one transfer."""

# Reads of a layer from beginning to end are of these.
_WHOLE_GROUP = 4

Said = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What would be decoded, and for how long each thing is measured.

    Attributes:
        layer: the shape of a layer's K and V.
        layers: layers that attend to all tokens.
        heads: query heads of each.
        tokens: context, per batch row.
        batch: batch rows.
        weights_nbytes: of the model.
        compute_s: seconds of a step with K and V in memory; None: estimated from the weights.
        seconds: for everything.
    """

    layer: LayerShape
    layers: int
    heads: int
    tokens: int
    batch: int
    weights_nbytes: int
    compute_s: float | None
    seconds: float

    @property
    def token_nbytes(self) -> int:
        """K and V of a token of one layer."""
        return self.layer.key_nbytes + self.layer.value_nbytes


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        machine: for the model of a decode step.
        decoding: likewise.
        whole_nbytes_per_s: of a layer that is read from beginning to end.
    """

    machine: Machine
    decoding: Decoding
    whole_nbytes_per_s: float


def measure_machine(store: KVStore, subject: Subject, nbytes: int, said: Said) -> Measured:
    """Measures the drive of ``store``, scoring, and the speed of weights. Blocks.

    Args:
        store: an open store. A sequence is written to it, and deleted at the end.
        subject: what would be decoded.
        nbytes: K and V to write, of the whole context of a layer at most for each layer.
        said: called with a few words on what comes next.

    Raises:
        SpdkKvError: what the store raises.
    """
    each_s = subject.seconds / (len(GROUP_TOKENS) * (len(COUNTS) + 1) + 2)
    tokens = max(min(subject.tokens, nbytes // subject.token_nbytes), GROUP_TOKENS[-1])
    layers = min(subject.layers, max(1, nbytes // (subject.token_nbytes * tokens)))
    said("writing K and V to read from")
    with filled_sequence(store, subject.layer, tokens, layers) as sequence:
        reads = {}
        for size in GROUP_TOKENS:
            said(f"reading groups of {size} tokens")
            counts = _counts(tokens // size)
            reads[size] = _times([read_groups(sequence, size, n, each_s) for n in counts])
        said("reading whole layers")
        whole = read_whole(sequence, _WHOLE_GROUP, each_s)
    said("scoring")
    scoring = time_selection(subject.layer, subject.heads, subject.tokens, each_s)
    said("multiplying")
    compute_s = subject.compute_s
    if compute_s is None:
        rate = weights_nbytes_per_s(subject.layer.dtype, subject.batch, each_s)
        compute_s = subject.weights_nbytes / rate
    machine = Machine(
        reads=reads,
        whole_token_s=whole.seconds / (whole.groups * _WHOLE_GROUP),
        score_s=scoring.seconds,
        compute_s=compute_s,
    )
    decoding = Decoding(
        layers=subject.layers,
        token_nbytes=subject.token_nbytes,
        metadata_nbytes=scoring.token_nbytes,
        tokens=subject.tokens,
        batch=subject.batch,
    )
    return Measured(machine, decoding, whole.nbytes / whole.seconds)


def _counts(groups: int) -> Sequence[int]:
    """Those of COUNTS that can be scattered over ``groups`` groups: not all, which lie together."""
    return [count for count in COUNTS if count <= groups // 2] or [1]


def _times(found: Sequence[GroupReads]) -> ReadTimes:
    return ReadTimes(
        tuple(each.groups for each in found),
        tuple(each.seconds for each in found),
        tuple(each.nbytes for each in found),
    )
