"""Transfers over a link, for the tests and for the scripts that they run."""

from __future__ import annotations

import numpy as np

from spdk_kv._native.transfer import READ
from spdk_kv.testing import SMALL, address_of, memory

BLOCK = 4096
MIB = 1 << 20
SEGMENT = SMALL.segment_nbytes
FAST = 50e9


def noise(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def over(engine, link, op, offset, view, **options):
    """A transfer of ``view``, which stands for memory on a GPU."""
    transfer = engine.transfer(op, link=link, **options)
    transfer.keep(view)
    transfer.add(offset, address_of(view), len(view))
    return transfer


def without_a_slot(engine):
    """A read into memory that the device reaches by itself."""
    return over(engine, None, READ, 0, memory(BLOCK))
