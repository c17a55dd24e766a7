"""What a cache keeps in memory beside K/V: convolutional and recurrent states, indexers' keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from spdk_kv.errors import CapacityError, ShapeMismatch, SpdkKvError

HALF_WAY = (
    "the states of {} are not at the same token as its K/V: an earlier forward pass or change "
    "ended half-way, and such states cannot go back; reset() forgets all"
)


OWN = {"_stream", "_number"}
"""What a layer of a cache has for itself, whatever another one holds."""


def type_of(config: Any) -> str:
    """A model's name, for messages."""
    return str(getattr(config, "model_type", type(config).__name__))


def check_stateless(templates: list[Any], config: Any) -> None:
    """Raises ShapeMismatch where the prompts of a PromptCache would lack states."""
    if LayerStates(templates, type_of(config)):
        raise ShapeMismatch(
            f"{type_of(config)} has layers with states beside K/V, which cannot go back to where "
            "two texts part: make an OffloadedKVCache with name= for each text"
        )


class LayerStates:
    """The states of a cache's layers, changed together with the K/V on the drive.

    A state has no length: nothing in it tells how many tokens it has seen. So this keeps count of
    how far each forward pass went, and refuses to go on from one that ended half-way.
    """

    def __init__(self, layers: list[Any], name: str) -> None:
        self._name = name
        self._states = [state for state in map(_state_of, layers) if state is not None]
        used = [number for number, layer in enumerate(layers) if not _is_dummy(layer)]
        self._first, self._final = used[0], used[-1]
        self._last = self._final
        self._calls: tuple[str, ...] = ()  # of this pass to the layer `_last`
        self._changing = False

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._states)

    def begin(self, layer: int, call: str) -> None:
        """Before each ``call`` of a forward pass to ``layer``. Raises SpdkKvError where the pass
        before, or a change, ended half-way."""
        if not self._states:
            return
        if layer < self._last or (layer == self._last and call in self._calls) or self._changing:
            self.check_whole()

    def end(self, layer: int, call: str) -> None:
        """After it."""
        if not self._states:
            return
        repeated = call in self._calls
        self._calls = (*self._calls, call) if layer == self._last and not repeated else (call,)
        self._last = layer
        self._changing = False

    def read(self, layer: int, call: str) -> None:
        """Before a state is handed out: a forward pass may change it in place. A look between two
        passes is none, but for the first layer's."""
        starts = self._last == self._final and layer == self._first
        if layer >= self._last or starts:
            self.begin(layer, call)
            self.end(layer, call)
        else:
            self.check_whole()

    @property
    def is_whole(self) -> bool:
        """Whether all states are at the same token."""
        return not self._changing and self._last == self._final

    @property
    def attributes(self) -> list[dict[str, Any]]:
        """For each layer with states, everything that it keeps of them."""
        return [
            {name: value for name, value in list(vars(state).items()) if name not in OWN}
            for state in self._states
        ]

    @attributes.setter
    def attributes(self, layers: list[dict[str, Any]]) -> None:
        for state, values in zip(self._states, layers, strict=True):
            for name, value in values.items():
                setattr(state, name, value)

    def spoil(self) -> None:
        """Before what changes states: until its end, nothing else may."""
        self._changing = True

    def check_whole(self) -> None:
        """Raises SpdkKvError unless all states are at the same token."""
        if self._states and (self._changing or self._last != self._final):
            raise SpdkKvError(HALF_WAY.format(self._name))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around every change of the rows or the length of all layers: what ends in between is
        noticed later."""
        self.check_whole()
        self.spoil()
        try:
            yield
        except (CapacityError, ShapeMismatch):  # they come before anything is changed
            self._changing = False
            raise
        self._changing = False

    def select(self, rows: list[int]) -> None:
        """The batch becomes the ``rows`` of what it was."""
        for state in self._states:
            state.reorder_cache(torch.tensor(rows))

    def crop(self, count: int) -> None:
        """Forgets the newest ``count`` tokens, once :meth:`check_croppable` let them pass."""
        for state in self._states:
            if isinstance(state, LinearAttentionCacheLayerMixin) and not state.record_past:
                continue  # checked: nothing is to be cropped
            state.crop(-count)

    def check_croppable(self, count: int, tokens: int) -> None:
        """Raises SpdkKvError, before anything is changed, where the newest ``count`` of ``tokens``
        tokens cannot be forgotten."""
        self.check_whole()
        if count == 0:
            return
        for state in self._states:
            if not isinstance(state, LinearAttentionCacheLayerMixin):
                continue
            if any(state.is_recurrent_states_initialized.values()):
                raise SpdkKvError(
                    f"{self._name} has recurrent states, which cannot go back: crop() of a cache "
                    "for it is impossible, with DynamicCache too; reset() forgets all"
                )
            for number, columns in state.conv_states.items():
                kernel = state.conv_kernel_size[number]
                recorded = 0 if columns is None else columns.shape[-1]
                # All tokens are there until the first crop().
                reaches = recorded - count >= (kernel or 0) or recorded == tokens
                if not state.record_past or not reaches:
                    raise SpdkKvError(
                        f"{self._name} has convolutional states that reach back no further: call "
                        "activate_past_recording() before the tokens that are to be cropped"
                    )


def _state_of(layer: Any) -> Any:
    """What of ``layer`` is in memory, with ``crop`` and ``reorder_cache``; None if nothing is."""
    if hasattr(layer, "update_indexer"):
        return getattr(layer, "indexer", layer)
    return layer if isinstance(layer, LinearAttentionCacheLayerMixin) else None


def _is_dummy(layer: Any) -> bool:
    return type(layer).__name__ == "DummyLayer"
