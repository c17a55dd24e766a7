"""What a decode step takes that reads a part: time, bytes, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spdk_kv.sparse.settings import Settings
from spdk_kv.sparse.tuning.reuse import miss_rate

Bound = Literal["reading", "computing", "scoring"]


@dataclass(frozen=True)
class Decoding:
    """What is decoded.

    Attributes:
        layers: layers that select; those with a sliding window do not count.
        token_nbytes: K and V of one token of such a layer, per batch row.
        metadata_nbytes: what is kept of its keys to score them.
        tokens: context, per batch row.
        batch: batch rows.
    """

    layers: int
    token_nbytes: int
    metadata_nbytes: float
    tokens: int
    batch: int = 1


@dataclass(frozen=True)
class ReadTimes:
    """One transfer of scattered groups of one size.

    Attributes:
        groups: how many, ascending.
        seconds: what such a transfer takes until K and V are in memory.
        nbytes: what it asks of the drive.
    """

    groups: tuple[int, ...]
    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]

    def time_of(self, groups: float) -> float:
        """Interpolated; beyond the largest transfer it grows as between the last two."""
        return _extended(groups, self.groups, self.seconds)

    def nbytes_of(self, groups: float) -> float:
        """Likewise for the bytes."""
        return _extended(groups, self.groups, self.nbytes)


@dataclass(frozen=True)
class Machine:
    """What was measured of the drive and the processor.

    Attributes:
        reads: by tokens of a group.
        whole_token_s: seconds per token of one layer and row where a layer is read from its
            beginning to its end.
        score_s: seconds to select for one layer and row in this context.
        compute_s: seconds (above 0) that a step takes with K and V in memory, all layers and rows.
    """

    reads: Mapping[int, ReadTimes]
    whole_token_s: float
    score_s: float
    compute_s: float


@dataclass(frozen=True)
class Cost:
    """Of one decode step.

    Attributes:
        step_s: seconds.
        tokens_per_s: of all rows together.
        read_nbytes_per_token: bytes asked of the drive, all layers, per row.
        read_s, score_s, compute_s: seconds of each, if it were alone.
        memory_nbytes: of resident groups, newest tokens and what groups are scored by.
        bound: what most of the step is spent on.
    """

    step_s: float
    tokens_per_s: float
    read_nbytes_per_token: float
    read_s: float
    score_s: float
    compute_s: float
    memory_nbytes: int
    bound: Bound


def cost(settings: Settings, machine: Machine, decoding: Decoding) -> Cost:
    """A step that reads a part. A layer is read while the one before it is computed; it is scored
    between the two. Attention itself and what Python adds are left out."""
    missing = decoding.batch * missing_groups(settings, decoding)
    times = machine.reads[settings.group_tokens]
    read_s, nbytes = (times.time_of(missing), times.nbytes_of(missing)) if missing else (0.0, 0.0)
    score_s = decoding.batch * machine.score_s
    memory = memory_nbytes(settings, decoding)
    return _step(machine, decoding, read_s, nbytes, score_s, memory)


def whole_cost(machine: Machine, decoding: Decoding) -> Cost:
    """A step that reads every token from the drive, one layer ahead."""
    tokens = decoding.tokens * decoding.batch
    nbytes = tokens * decoding.token_nbytes
    read_s = tokens * machine.whole_token_s
    return _step(machine, decoding, read_s, nbytes, 0.0, 2 * nbytes)


def missing_groups(settings: Settings, decoding: Decoding) -> float:
    """Groups of a layer and row that a step has to read; none where all of them are resident."""
    if holds_everything(settings, decoding):
        return 0.0
    return settings.count * miss_rate(settings.slots / settings.count)


def holds_everything(settings: Settings, decoding: Decoding) -> bool:
    """Whether the pool has room for the whole context, so that K and V are in memory after all."""
    return settings.slots >= settings.whole_groups(decoding.tokens)


def memory_nbytes(settings: Settings, decoding: Decoding) -> int:
    """Bytes of host memory, all layers and rows."""
    group = settings.group_tokens
    held = min(decoding.tokens, settings.slots * group + settings.recent + group)
    token = held * decoding.token_nbytes + decoding.tokens * decoding.metadata_nbytes
    return round(decoding.layers * decoding.batch * token)


def _step(
    machine: Machine,
    decoding: Decoding,
    layer_read_s: float,
    layer_nbytes: float,
    layer_score_s: float,
    memory: int,
) -> Cost:
    layers, compute_s = decoding.layers, machine.compute_s
    waited_s = max(layer_read_s, compute_s / layers)
    step_s = layers * (layer_score_s + waited_s)
    bound: Bound = "reading" if layer_read_s > compute_s / layers else "computing"
    if layer_score_s > waited_s:
        bound = "scoring"
    return Cost(
        step_s=step_s,
        tokens_per_s=decoding.batch / step_s,
        read_nbytes_per_token=layers * layer_nbytes / decoding.batch,
        read_s=layers * layer_read_s,
        score_s=layers * layer_score_s,
        compute_s=compute_s,
        memory_nbytes=memory,
        bound=bound,
    )


def _extended(at: float, xs: tuple[int, ...], ys: tuple[float, ...]) -> float:
    if at <= xs[-1] or len(xs) == 1:
        scale = at / xs[-1] if len(xs) == 1 and at > xs[-1] else 1.0
        return float(np.interp(at, xs, ys)) * scale
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return ys[-1] + max(slope, 0.0) * (at - xs[-1])
