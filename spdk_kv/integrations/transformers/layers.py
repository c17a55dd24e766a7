"""The layers of an OffloadedKVCache, as models and masks see them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from spdk_kv.errors import SpdkKvError
from spdk_kv.integrations.transformers.stream import LayerStream


class OffloadedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer whose K/V is on the drive.

    It holds no tensors: ``keys`` and ``values`` are read from the drive whenever somebody asks.
    What reaches the drive stays outside a compiled model: torch.compile breaks its graph there.

    Args:
        stream: Where K/V goes.
        number: The layer's number among those of the stream.
        template: What DynamicCache has in its place.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, stream: LayerStream, number: int, template: Any) -> None:
        self._stream = stream
        self._number = number
        super().__init__()
        # Read by models and masks, compiled ones too: plain attributes.
        self.is_sliding = bool(template.is_sliding)
        self._window = int(template.sliding_window) if self.is_sliding else None
        if self._window is not None:
            self.sliding_window = self._window
        self.is_initialized = stream.tokens(number) > 0

    @property
    def keys(self) -> torch.Tensor | None:
        """What DynamicCache would hold, or None without tokens. Blocks on the drive."""
        pair = self._stream.held(self._number)
        return None if pair is None else pair[0]

    @keys.setter
    def keys(self, nothing: None) -> None:
        """For transformers, which says None when a layer is made."""

    @property
    def values(self) -> torch.Tensor | None:
        """As :attr:`keys`."""
        pair = self._stream.held(self._number)
        return None if pair is None else pair[1]

    @values.setter
    def values(self, nothing: None) -> None:
        """As for :attr:`keys`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first :meth:`update` creates the sequence."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens and returns what attention sees; see :meth:`LayerStream.update`."""
        pair = self._stream.update(self._number, key_states, value_states)
        self.is_initialized = True
        return pair

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get_seq_length(self) -> int:
        """Tokens per row so far."""
        return self._stream.tokens(self._number)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens attention sees after ``query_length`` new ones, and the position of the
        first."""
        past = self._stream.tokens(self._number)
        first = 0 if self._window is None else max(0, past - self._window + 1)
        return past - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 where there is none, as DynamicCache says it."""
        return self._window or -1

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise SpdkKvError("the layers of an OffloadedKVCache change together: call this on it")

    reset = crop = reorder_cache = offload = prefetch = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a layer of an OffloadedKVCache is on the drive and cannot be copied")


class OffloadedIndexedLayer(OffloadedLayer):
    """A layer of sparse attention: K/V on the drive, its indexer's keys in memory."""

    def __init__(self, stream: LayerStream, number: int, template: Any) -> None:
        super().__init__(stream, number, template)
        # It never gets K/V, so that it changes nothing but the indexer's keys.
        self.indexer = DynamicIndexedLayer()

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Adds the indexer's keys, ``[batch, tokens, width]``, and returns all of them."""
        keys: torch.Tensor = self.indexer.update_indexer(indexer_key_states)
        return keys

    @property
    def is_indexer_initialized(self) -> bool:
        return bool(self.indexer.is_indexer_initialized)

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        keys: torch.Tensor | None = self.indexer.indexer_keys
        return keys

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """``[dimensions, batch, tokens]``; some models keep them here."""
        return getattr(self.indexer, "indexer_position_ids", None)

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor | None) -> None:
        self.indexer.indexer_position_ids = positions


class OffloadedMixedLayer(LinearAttentionLayer, OffloadedLayer):  # type: ignore[misc]
    """A layer with both: K/V on the drive, convolutional and recurrent states in memory.

    ``crop`` and ``reorder_cache`` change its states only.
    """

    is_compileable = False

    def __init__(self, stream: LayerStream, number: int, template: Any) -> None:
        OffloadedLayer.__init__(self, stream, number, template)
        LinearAttentionLayer.__init__(self, number_of_states=template.number_of_states)


OFFLOADED: dict[type, Callable[[LayerStream, int, Any], OffloadedLayer]] = {
    DynamicLayer: OffloadedLayer,
    DynamicSlidingWindowLayer: OffloadedLayer,
    DynamicIndexedLayer: OffloadedIndexedLayer,
    LinearAttentionAndFullAttentionLayer: OffloadedMixedLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: OffloadedMixedLayer,
}
"""What stands in the place of each kind of DynamicCache's layers that has K/V."""

# Older releases leave the layers without a cache out.
IN_MEMORY = {LinearAttentionLayer, getattr(cache_utils, "DummyLayer", LinearAttentionLayer)}
"""The kinds that stay as they are: they have no K/V."""


def layers_with_kv(templates: list[Any]) -> list[Any]:
    """Those of DynamicCache's layers whose K/V is offloaded, in order."""
    return [layer for layer in templates if type(layer) in OFFLOADED]


def window_of(template: Any) -> int | None:
    """How many tokens the layer's attention sees at most; None for all."""
    return int(template.sliding_window) if template.is_sliding else None


def offloaded(templates: list[Any], stream: LayerStream) -> list[Any]:
    """A cache's layers: those with K/V are the stream's, the others stay."""
    numbers = count()
    return [
        OFFLOADED[type(layer)](stream, next(numbers), layer) if type(layer) in OFFLOADED else layer
        for layer in templates
    ]
