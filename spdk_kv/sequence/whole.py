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
        # Held while a reordering is begun and done. Taken before any layer's lock.
        self._lock = threading.RLock()
        # What is left of a reordering: how often a layer was reordered before, and the rows.
        # Replaced by the next one, so that who still finishes this one cannot touch that.
        self._unfinished: dict[Layer, tuple[int, np.ndarray[Any, Any]]] = {}

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
        # No record has the note from before this, and the rows from after it.
        with deadline.hold(self._recorder.lock), deadline.hold(self._lock):
            self.finish(deadline)
            self._unfinished = {layer: (layer.order.changes, rows) for layer in layers}
            self.finish(deadline)

    def finish(self, deadline: Deadline, only: Layer | None = None) -> None:
        """Does what is left of a reordering that was interrupted; with ``only``, in that layer: a
        call on it has no business waiting for another one."""
        unfinished = self._unfinished
        for layer in reversed(list(unfinished)) if only is None else (only,):
            if layer not in unfinished:
                continue
            with deadline.hold(layer.lock):
                begun = unfinished.get(layer)
                if begun is not None and layer.contents.failure is None:
                    changes, rows = begun
                    if layer.order.changes == changes:
                        self._recorder.mark_dirty()
                        layer.reorder(rows)
                unfinished.pop(layer, None)
