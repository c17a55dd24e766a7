"""What the drive and the memory can do: fio on the same filesystem, and the speed of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import fio
from spdk_kv.engines import open_engine, parse_location
from spdk_kv.measure import fill
from spdk_kv.units import GIB, MIB

_REQUEST_NBYTES, _DEPTH = MIB, 16


@contextmanager
def fio_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file that was written before, as fio's reads need it."""
    path = folder / "fio.data"
    try:
        with path.open("wb") as file:
            file.truncate(nbytes)
        engine = open_engine(parse_location(f"file://{folder}"), str(path), capacity_nbytes=nbytes)
        try:
            fill(engine, nbytes)
        finally:
            engine.close()
        yield path
    finally:
        path.unlink(missing_ok=True)


def drive(path: Path, seconds: float) -> dict[str, float]:
    """GiB/s of fio, sequential, 1 MiB x 16; reads with and without hugepages, the better counts."""
    reads = [
        fio.run_fio(path, "read", _REQUEST_NBYTES, _DEPTH, seconds, huge=huge).gib_s
        for huge in (False, True)
    ]
    write = fio.run_fio(path, "write", _REQUEST_NBYTES, _DEPTH, seconds, huge=True).gib_s
    return {"read_gib_s": max(reads), "write_gib_s": write}


def memory_copy_gib_s(nbytes: int = 512 * MIB) -> float:
    """One thread copying memory that is in no processor cache: the median of five passes."""
    source = np.ones(nbytes, np.uint8)
    target = np.ones(64 * MIB, np.uint8)
    seen = []
    for _ in range(5):
        began = time.perf_counter()
        for start in range(0, nbytes, target.nbytes):
            target[:] = source[start : start + target.nbytes]
        seen.append(nbytes / GIB / (time.perf_counter() - began))
    return statistics.median(seen)
