"""A strong baseline: what FlexLLMGen's disk could be without leaving the page cache.

One file, one descriptor for good, every unit at its place in it, and large preads straight into
the relay buffer. The schedule is the same.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from spdk_kv.measure import Load, SimulatedGpu

_REQUEST_NBYTES = 8 << 20


class OneFile:
    """All units in one preallocated file."""

    def __init__(self, folder: Path, load: Load) -> None:
        self._path = folder / "units"
        self._stride = (load.tokens + 1) * load.row_nbytes
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._fd, 0, load.units * self._stride)

    def load(self, unit: int, nbytes: int, relay: torch.Tensor, gpu: SimulatedGpu) -> float:
        memory = memoryview(relay.numpy())
        done, arrived = 0, 0.0
        while done < nbytes:
            piece = memory[done : min(done + _REQUEST_NBYTES, nbytes)]
            got = os.preadv(self._fd, [piece], unit * self._stride + done)
            if not got:
                raise OSError(f"{self._path} ends in unit {unit}")
            # The link takes a piece while the next one is read.
            arrived = gpu.copy(got)
            done += got
        return arrived

    def store(self, unit: int, offset: int, data: torch.Tensor) -> None:
        memory, done = memoryview(data.numpy()), 0
        while done < len(memory):
            piece = memory[done : done + _REQUEST_NBYTES]
            done += os.pwritev(self._fd, [piece], unit * self._stride + offset + done)

    def close(self) -> None:
        os.close(self._fd)
        self._path.unlink()
