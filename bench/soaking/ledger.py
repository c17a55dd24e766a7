"""What was begun, done and flushed, and the bytes that each version of a thing has."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

KEYS = 1500  # some 700 MiB: more than there is room for, so the store stays full
SLOTS = 12  # sequences
LAYERS, HEADS, DIM, MAX_TOKENS = 3, 2, 32, 4096


class Ledger:
    """What was begun, done and flushed, in a file that survives a kill."""

    def __init__(self, path: Path, create: bool = False) -> None:
        fields = np.dtype(
            [
                ("begun", np.int64, KEYS),
                ("done", np.int64, KEYS),
                ("flushed", np.int64, KEYS),
                # Of a sequence: the life that was created last, the one that is known to be
                # recorded (0: none), and the tokens that it had then.
                ("life", np.int64, SLOTS),
                ("flushed_life", np.int64, SLOTS),
                ("flushed_tokens", np.int64, (SLOTS, LAYERS)),
            ]
        )
        self.fields = np.memmap(path, fields, "w+" if create else "r+", shape=(1,))[0]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class Fault(Exception):
    """Something that must never happen."""


def blob_nbytes(key: int, version: int) -> int:
    """Between 4 KiB and 4 MiB, small ones more often; differs from version to version."""
    return int(4096 * 2 ** random.Random(f"{key} {version}").uniform(0, 10))


def blob_bytes(key: int, version: int) -> np.ndarray:
    nbytes = blob_nbytes(key, version) // 8 * 8
    words = np.random.Generator(np.random.SFC64([key, version])).integers(
        0, 1 << 63, nbytes // 8, dtype=np.int64
    )
    words[0], words[1] = key, version
    return words


def rows(slot: int, life: int, layer: int, value: int, begin: int, end: int) -> Any:
    """K (``value`` 0) or V (1) of tokens ``begin`` to ``end``: ``[1, HEADS, tokens, DIM]``."""
    import torch

    seed = (slot * 1_000_003 + life * 10_007 + layer * 101 + value * 13) & 0x7FFF
    tokens = np.arange(begin, end, dtype=np.int64)[None, :, None]
    heads = np.arange(HEADS, dtype=np.int64)[:, None, None]
    dims = np.arange(DIM, dtype=np.int64)[None, None, :]
    bits = (seed + tokens * 977 + heads * 331 + dims * 7 + life * 31) & 0xFFFF
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)[None].copy()).view(torch.bfloat16)


def same(left: Any, right: Any) -> bool:
    import torch

    return left.shape == right.shape and bool(
        torch.equal(left.contiguous().view(torch.int16), right.contiguous().view(torch.int16))
    )
