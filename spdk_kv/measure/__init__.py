"""Measuring kernels that the command line and `bench/` share."""

from __future__ import annotations

from spdk_kv.measure.decode.case import Case, Outcome, outcome_from, run_apart
from spdk_kv.measure.decode.load import HEAD_DIM, Bytes, Load, Noise
from spdk_kv.measure.decode.replay import Device, KVPath
from spdk_kv.measure.io import Measurement, Workload, fill, filled_memory, measure

__all__ = [
    "HEAD_DIM",
    "Bytes",
    "Case",
    "Device",
    "KVPath",
    "Load",
    "Measurement",
    "Noise",
    "Outcome",
    "Workload",
    "fill",
    "filled_memory",
    "measure",
    "outcome_from",
    "run_apart",
]
