"""The process that replays one case: spdk_kv's variants, and the baselines."""

from __future__ import annotations

from pathlib import Path

from copy_threads import ScheduledPath
from flexllmgen import NumpyFiles
from strong import OneFile

from spdk_kv.measure import Case, KVPath, Load, Noise, SimulatedGpu
from spdk_kv.measure.decode import case as decode_case


def _flexllmgen(case: Case, noise: Noise, gpu: SimulatedGpu, folder: Path) -> KVPath:
    load = Load(**case.load)
    return ScheduledPath(load, noise, gpu, NumpyFiles(folder, load), case.relay_nbytes)


def _strong(case: Case, noise: Noise, gpu: SimulatedGpu, folder: Path) -> KVPath:
    load = Load(**case.load)
    return ScheduledPath(load, noise, gpu, OneFile(folder, load), case.relay_nbytes)


if __name__ == "__main__":
    decode_case.main({"flexllmgen": _flexllmgen, "strong": _strong})
