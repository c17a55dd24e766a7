"""The load of a decode measurement: a KV cache's shape, and bytes to fill it with.

The bytes are noise, different for every unit, so that a read of the wrong bytes is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spdk_kv._native.checksum import crc32c
from spdk_kv.types import KVShape

HEAD_DIM = 128
_ITEM_NBYTES = 2  # float16
# Each unit begins this much further into the noise than the unit before it.
_STEP_NBYTES = 4096

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Load:
    """One batch: a prompt whose KV cache is written, then tokens that each read all of it.

    Attributes:
        hidden: elements of K (or V) per layer, token and batch row.
        batch: rows of the batch.
        prompt: tokens of the prompt.
        generate: new tokens; the prompt yields the first, so ``generate - 1`` are decode steps.
    """

    layers: int = 16
    hidden: int = 2048
    batch: int = 16
    prompt: int = 1024
    generate: int = 32

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "batch", "prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.generate < 2:
            raise ValueError(f"generate is at least 2 (one decode step), not {self.generate}")
        if self.hidden % HEAD_DIM:
            raise ValueError(f"hidden is a multiple of {HEAD_DIM}, not {self.hidden}")

    @property
    def steps(self) -> int:
        """Decode steps."""
        return self.generate - 1

    @property
    def tokens(self) -> int:
        """Tokens in the cache at the end."""
        return self.prompt + self.steps

    @property
    def units(self) -> int:
        """K and V of every layer."""
        return 2 * self.layers

    @property
    def row_nbytes(self) -> int:
        """One token in one unit."""
        return self.batch * self.hidden * _ITEM_NBYTES

    @property
    def unit_nbytes(self) -> int:
        """One unit after the prompt."""
        return self.prompt * self.row_nbytes

    @property
    def nbytes(self) -> int:
        """The whole KV cache after the prompt: what memory limits are expressed as shares of."""
        return self.units * self.unit_nbytes

    @property
    def capacity_nbytes(self) -> int:
        """The whole KV cache at the end."""
        return self.units * self.tokens * self.row_nbytes

    def step_nbytes(self, step: int) -> int:
        """Bytes that decode step ``step`` (from 0) reads: all tokens so far."""
        return self.units * (self.prompt + step) * self.row_nbytes

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def shape(self) -> KVShape:
        return KVShape(
            layers=self.layers,
            kv_heads=self.heads,
            head_dim=HEAD_DIM,
            dtype="float16",
            max_tokens=self.tokens,
            batch=self.batch,
        )


class Noise:
    """The content of every unit. Unit ``2 * layer`` is K, ``2 * layer + 1`` is V.

    Holds little more than one unit's bytes in memory, in place of what a GPU would hold.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        size = load.unit_nbytes + load.units * _STEP_NBYTES
        words = np.random.default_rng(0).integers(0, 1 << 64, -(-size // 8), np.uint64)
        self._noise = words.view(np.uint8)

    def prompt(self, unit: int) -> Bytes:
        """The rows of the prompt's tokens, [tokens * row]; a view."""
        start = unit * _STEP_NBYTES
        return self._noise[start : start + self._load.unit_nbytes]

    def token(self, unit: int, step: int) -> Bytes:
        """The row that decode step ``step`` appends; a view."""
        most = self._noise.nbytes - self._load.row_nbytes
        start = ((unit * self._load.steps + step) * 64) % (most + 1)
        return self._noise[start : start + self._load.row_nbytes]

    def checksum(self, unit: int, steps: int) -> int:
        """CRC32C of the unit after the prompt and ``steps`` decode steps."""
        crc = crc32c(self.prompt(unit).data)
        for step in range(steps):
            crc = crc32c(self.token(unit, step).data, crc)
        return crc
