"""Measurements that the command line and `bench/` share: engines under load, and decoding.

`io.py` keeps one engine busy; `decode/` replays a decode with real I/O and a simulated GPU.
"""

from __future__ import annotations

from spdk_kv.measure.decode.case import (
    Case,
    Outcome,
    cached_share,
    limits,
    outcome_from,
    run_in_subprocess,
)
from spdk_kv.measure.decode.load import HEAD_DIM, Bytes, Load, Noise
from spdk_kv.measure.decode.replay import KVPath, SimulatedGpu
from spdk_kv.measure.io import Measurement, Workload, fill, filled_memory, measure

__all__ = [
    "HEAD_DIM",
    "Bytes",
    "Case",
    "KVPath",
    "Load",
    "Measurement",
    "Noise",
    "Outcome",
    "SimulatedGpu",
    "Workload",
    "cached_share",
    "fill",
    "filled_memory",
    "limits",
    "measure",
    "outcome_from",
    "run_in_subprocess",
]
