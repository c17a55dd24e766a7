"""A cache for ``model.generate`` of transformers, kept on a store."""

from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.generation.utils import ALL_CACHE_NAMES

from spdk_kv.errors import ShapeMismatch, SpdkKvError
from spdk_kv.integrations.transformers.stream import LayerStream, StreamOptions
from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.types import Granularity

CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
"""What ``generate`` of the installed transformers calls the cache; newer releases warn of the old
name."""


class OffloadedKVCache(Cache):  # type: ignore[misc]
    """The KV cache of one ``generate`` at a time, on the drive instead of in memory.

    ``model.generate(..., past_key_values=OffloadedKVCache(store, model.config))`` gives the tokens
    that DynamicCache gives; newer releases say ``cache=`` (:data:`CACHE_ARGUMENT`). Every new
    token's K/V goes to a sequence of ``store``; while a layer computes, the next one's K/V is
    read. Greedy, sampling, beam search, assisted decoding, padded batches, chunked prefill, and
    full, sliding-window and chunked attention, in any mixture.

    ``config``: the model's. ``max_tokens``: capacity per row of the batch, reserved on the store
    at the first use and fixed from then on; by default the model's ``max_position_embeddings``,
    or as many as half of the store's capacity holds. ``resident_layers``: layers whose K/V may
    be in memory at once, the one being computed and the one being read ahead included; with more
    than two, the first ``resident_layers - 2`` stay in memory. (Besides, each layer keeps its
    unfinished last chunks in memory, 16 KiB of K and of V.) ``name``: makes the cache last: it is
    recorded by ``store.flush()`` or ``close()``, and taken up again by the next cache of that name;
    the caller sees to it that model and text are the same. Without it, the cache is gone with
    :meth:`close`, or with the last reference to it. ``granularity``: of a new sequence.

    Blocks in the model's attention while the drive reads. Batch, dtype and device are those of
    the first forward pass; :meth:`reset` makes them free again. Raises ShapeMismatch for a model
    that it cannot serve (see :func:`layer_windows`) and for other shapes than at first,
    CapacityError beyond ``max_tokens`` and where the store has no room for it, and the store's
    errors. Not thread-safe. A context manager.
    """

    def __init__(
        self,
        store: KVStore,
        config: Any,
        *,
        max_tokens: int | None = None,
        resident_layers: int = 2,
        name: str | None = None,
        granularity: Granularity = "layer",
    ) -> None:
        if resident_layers < 1:
            raise ValueError(f"resident_layers is 1 or more, not {resident_layers}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is 1 or more, not {max_tokens}")
        text_config = config.get_text_config(decoder=True)
        options = StreamOptions(
            windows=layer_windows(config),
            most_tokens=getattr(text_config, "max_position_embeddings", None),
            max_tokens=max_tokens,
            resident_layers=resident_layers,
            name=name,
            granularity=granularity,
        )
        self._stream = LayerStream(store, options)
        super().__init__(
            layers=[OffloadedLayer(self._stream, number) for number in range(len(options.windows))]
        )

    @property
    def sequence(self) -> Sequence | None:
        """The sequence that holds the tokens; None before the first forward pass."""
        return self._stream.sequence

    def stats(self) -> dict[str, Any]:
        """Layers in memory now and at most so far (``resident_layers``, ``resident_layers_peak``),
        layers that stay there (``kept_layers``), ``prefetch_hits`` and ``prefetch_misses``, bytes
        of K/V appended and read back, and ``read_wait_s``, spent waiting for reads."""
        return {
            "resident_layers": self._stream.resident_layers,
            "kept_layers": self._stream.kept_layers,
            **asdict(self._stream.counters),
        }

    # -- changing: all layers at once -----------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens; the next forward pass may have another batch and dtype."""
        self._stream.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens (0 or negative, as in transformers).

        Reaches back past a sliding window: the drive has every token. Blocks on the drive.
        """
        if tokens_to_remove > 0:
            raise ShapeMismatch(
                f"crop takes minus the number of tokens to remove, not {tokens_to_remove}"
            )
        self._stream.truncate(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``b`` becomes what row ``beam_idx[b]`` was. No I/O."""
        self._stream.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch ``repeats`` times. Copies the cache on the drive, and needs its
        room twice meanwhile."""
        self._stream.select([row for row in range(self._batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (numbers or a mask). Copies the cache unless their number
        stays the same."""
        self._stream.select(torch.arange(self._batch)[indices.cpu()].tolist())

    @property
    def _batch(self) -> int:
        sequence = self._stream.sequence
        return 0 if sequence is None else sequence.shape.batch

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives memory back and deletes the tokens, unless the cache has a name. May be called
        twice; another forward pass would begin a new cache."""
        self._stream.release()

    def __enter__(self) -> OffloadedKVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedKVCache:
        raise TypeError(
            "an OffloadedKVCache lives on the drive and is not copied with copy.deepcopy; crop() "
            "goes back to a shared prompt"
        )


class OffloadedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of an :class:`OffloadedKVCache`: what models and masks ask of it.

    It holds no tensors; ``keys`` and ``values`` are always None.
    """

    is_compileable = False
    is_croppable = True
    # A sequence can only be created with the batch and dtype of the real K/V.
    supports_early_init = False

    def __init__(self, stream: LayerStream, number: int) -> None:
        super().__init__()
        self._stream = stream
        self._number = number
        window = stream.options.windows[number]
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the first :meth:`update` creates the sequence."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens and returns what attention sees; see :meth:`LayerStream.update`."""
        return self._stream.update(self._number, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens per row so far."""
        return self._stream.tokens(self._number)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that attention sees after ``query_length`` new ones, and the first one's place."""
        past = self.get_seq_length()
        window = self._stream.options.windows[self._number]
        first = 0 if window is None else max(0, past - window + 1)
        return past - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 where there is none, as DynamicCache says it."""
        return self._stream.options.windows[self._number] or -1

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise SpdkKvError("the layers of an OffloadedKVCache change together: call this on it")

    reset = crop = reorder_cache = offload = prefetch = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Per layer of the model, the tokens that its attention sees at most, or None for all.

    Raises ShapeMismatch for models that one sequence cannot hold: encoder-decoders, layers with
    recurrent or convolutional state, with an indexer, without a cache of their own (K/V shared
    between layers), or with unlike numbers of KV heads.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ShapeMismatch(f"{name} is an encoder-decoder: only decoders can be offloaded")
    text_config = config.get_text_config(decoder=True)
    for field in ("num_key_value_heads", "head_dim"):
        layers = getattr(text_config, "per_layer_config", ())
        if len({getattr(layer, field, None) for layer in layers}) > 1:
            raise ShapeMismatch(f"{name} has layers with unlike {field}: use DynamicCache for it")
    windows: list[int | None] = []
    # DynamicCache decides what each layer is, so that the two can never differ.
    for number, layer in enumerate(DynamicCache(config=text_config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            raise ShapeMismatch(
                f"layer {number} of {name} is cached as {type(layer).__name__}: only layers that "
                "keep K/V of their own can be offloaded; use DynamicCache for this model"
            )
    if not windows:
        raise ShapeMismatch(f"{name} has no layers with a KV cache")
    return tuple(windows)
