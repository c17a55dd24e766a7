"""Memory of a host on huge pages, whose drive then reaches it in a few large pieces.

A host's memory mostly lies on pages of 4 KiB. Each of them is a piece of its own to the drive and
to the kernel, which on some drives costs more than half of the speed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

NBYTES = 2 << 20
# Below this a page of KV cache is few pieces anyhow, and may lie on a heap among other things.
LEAST_NBYTES = 64 << 10
# In the kernel since 6.1, and in no header of ours.
_MADV_COLLAPSE = 25
# Memory that is pinned, or of another kind, cannot be moved; then nor can what lies beside it.
_MOST_REFUSALS = 8
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class HugePages:
    """Has the kernel move memory onto huge pages, each place once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: set[int] = set()
        self._refusals = 0
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._wanted = is_enabled()

    @property
    def moved(self) -> int:
        """How many bytes the kernel was asked for and did not refuse at once."""
        return len(self._asked) * NBYTES

    def back(self, arrays: Iterable[np.ndarray[Any, Any]]) -> None:
        """Moves the memory of ``arrays``, whose bytes stay the same and in use. Takes about a
        millisecond for 2 MiB, the first time; where the kernel cannot, nothing happens."""
        if not self._wanted:
            return
        for array in arrays:
            if array.nbytes >= LEAST_NBYTES:
                first = array.ctypes.data // NBYTES
                last = (array.ctypes.data + array.nbytes - 1) // NBYTES
                for place in range(first, last + 1):
                    if place not in self._asked:
                        self._ask(place)

    def _ask(self, place: int) -> None:
        with self._lock:
            if place in self._asked or not self._wanted:
                return
            self._asked.add(place)
        # Without the lock: the kernel may have to find room, and who reads elsewhere does not wait.
        refused = self._madvise(place * NBYTES, NBYTES, _MADV_COLLAPSE)
        with self._lock:
            self._refusals = self._refusals + 1 if refused else 0
            self._wanted = self._refusals < _MOST_REFUSALS


def is_enabled() -> bool:
    """Whether the system has transparent huge pages, and did not turn them off."""
    try:
        return "[never]" not in _ENABLED.read_text()
    except OSError:
        return False
