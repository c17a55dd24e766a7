"""FlexLLMGen's disk, rebuilt: a NumPy file per unit, opened anew and mapped for every transfer.

Nothing is added to help it: page faults do the reading, with the kernel's own read-ahead; no
O_DIRECT, no fadvise, no madvise, no msync.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from spdk_kv.measure import HEAD_DIM, Load, SimulatedGpu


class NumpyFiles:
    """One ``.npy`` file per unit, fp16, [tokens, batch * heads, head_dim], so that a token is one
    contiguous row."""

    def __init__(self, folder: Path, load: Load) -> None:
        self._row_nbytes = load.row_nbytes
        self._files = [folder / f"unit-{unit}.npy" for unit in range(load.units)]
        for file in self._files:
            np.lib.format.open_memmap(
                file,
                mode="w+",
                dtype=np.float16,
                shape=(load.tokens + 1, load.batch * load.heads, HEAD_DIM),
            )

    def load(self, unit: int, nbytes: int, relay: torch.Tensor, gpu: SimulatedGpu) -> float:
        mapped = self._open(unit)[: nbytes // self._row_nbytes]
        relay.view(torch.float16).view(mapped.shape).copy_(mapped)
        return gpu.copy(nbytes)

    def store(self, unit: int, offset: int, data: torch.Tensor) -> None:
        first = offset // self._row_nbytes
        mapped = self._open(unit)[first : first + data.nbytes // self._row_nbytes]
        mapped.copy_(data.view(torch.float16).view(mapped.shape))

    def _open(self, unit: int) -> torch.Tensor:
        return torch.from_numpy(np.lib.format.open_memmap(self._files[unit]))

    def close(self) -> None:
        for file in self._files:
            file.unlink()
