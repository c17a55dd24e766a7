"""Appended bytes of all layers of a sequence on their way to the drive, and their limit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from spdk_kv.errors import SpdkKvError
from spdk_kv.sequence.layer import Layer

# Bytes of all layers on their way to the drive; beyond that an append waits. Twice what one layer
# may have (writer.py), so that a prefill's next layer is laid out while the last one is written.
_MOST_PENDING_NBYTES = 128 << 20


class Backlog:
    """The layers that have pending writes, oldest first. The caller holds no lock."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._writing: deque[Layer] = deque()

    def add(self, layer: Layer) -> None:
        """Adds ``layer``; waits for the oldest writes while more than 128 MiB are pending."""
        self._writing.append(layer)
        pending = sum(each.writer.pending_nbytes for each in self._layers)
        # Another thread may empty it at the same time, and a layer that failed says so itself.
        with suppress(IndexError):
            while pending > _MOST_PENDING_NBYTES:
                oldest = self._writing.popleft()
                with oldest.lock, suppress(SpdkKvError):
                    pending -= oldest.writer.pending_nbytes
                    oldest.settle()
            while len(self._writing) > len(self._layers):
                self._writing.popleft()
