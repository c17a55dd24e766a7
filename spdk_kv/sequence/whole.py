"""Changes of several layers that belong together, so that an interrupt leaves no half of one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from spdk_kv.deadline import Deadline
from spdk_kv.errors import ShapeMismatch
from spdk_kv.sequence.layer import Layer
from spdk_kv.sequence.recorder import Recorder


class Whole:
    """The layers of a sequence, as one. The caller holds no lock."""

    def __init__(self, layers: Sequence[Layer], recorder: Recorder) -> None:
        self._layers = layers
        self._recorder = recorder
        # Held while a reordering is done, or begun. Taken before any layer's lock.
        self._lock = threading.RLock()
        # What is left of a reordering: layer, how often it was reordered before, and the rows.
        self.unfinished: list[tuple[Layer, int, np.ndarray[Any, Any]]] = []

    def truncate(self, numbers: Sequence[int], tokens: int, deadline: Deadline) -> None:
        """Forgets all tokens of these layers from ``tokens`` on, in the last layer first. Done
        again after an interrupt, it does the rest."""
        recorder = self._recorder
        with deadline.hold(recorder.lock):
            for number in numbers:
                layer = self._layers[number]
                layer.contents.check()
                if not 0 <= tokens <= layer.tokens:
                    raise ShapeMismatch(f"{layer.name} has {layer.tokens} tokens, not {tokens}")
            for number in reversed(numbers):
                layer = self._layers[number]
                with deadline.hold(layer.lock):
                    if tokens < layer.tokens:
                        recorder.mark_dirty()
                        with recorder.forgetting(number, tokens):
                            layer.truncate(tokens, deadline)
            recorder.commit_if_due(deadline)

    def reorder(
        self, numbers: Sequence[int], rows: np.ndarray[Any, Any], deadline: Deadline
    ) -> None:
        """Row b of every token of these layers becomes what row ``rows[b]`` was. Once it has begun
        it is done in all of them, by the next call if an interrupt or the deadline ends this one.
        """
        layers = [self._layers[number] for number in numbers]
        for layer in layers:
            layer.contents.check()
        with deadline.hold(self._lock):
            self.finish(deadline)
            self.unfinished = [(layer, layer.order.changes, rows) for layer in layers]
            self.finish(deadline)

    def finish(self, deadline: Deadline) -> None:
        """Does what is left of a reordering that was interrupted."""
        while self.unfinished:
            with deadline.hold(self._lock):
                if not self.unfinished:
                    return
                layer, changes, rows = self.unfinished[-1]
                with deadline.hold(layer.lock):
                    if layer.order.changes == changes and layer.contents.failure is None:
                        self._recorder.mark_dirty()
                        layer.reorder(rows)
                self.unfinished.pop()
