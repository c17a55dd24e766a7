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
"""The name of ``generate``'s argument for the cache in the installed release of transformers. Newer
ones warn of the old name."""


class OffloadedKVCache(Cache):  # type: ignore[misc]
    """The KV cache of one ``generate`` at a time, on the drive instead of in memory.

    ``model.generate(..., past_key_values=OffloadedKVCache(store, model.config))`` returns the
    tokens that DynamicCache would; newer releases of transformers say ``cache=``
    (:data:`CACHE_ARGUMENT`). The K/V of every new token goes to a sequence of ``store``; while one
    layer computes, the next one's K/V is read. It serves greedy decoding, sampling, beam search,
    assisted decoding, padded batches, chunked prefill, and full, sliding-window and chunked
    attention in any mixture.

    Blocks in the model's attention while the drive reads. Batch, dtype and device are those of the
    first forward pass until :meth:`reset`. A context manager. Not thread-safe.

    Args:
        store: Where the tokens go.
        config: The model's configuration.
        max_tokens: Capacity in tokens per row of the batch, reserved on the store at the first use,
            in one piece, and fixed from then on. By default the cache grows as tokens come.
        resident_layers: Layers whose K/V may be in memory at once, including the one being
            computed and the one being read ahead. With more than two, the first
            ``resident_layers - 2`` stay in memory. Each layer's unfinished chunks, 16 KiB of K and
            of V (with granularity ``head`` of each head), stay there in any case.
        name: Makes the cache last: ``store.flush()`` or ``close()`` records it, and the next cache
            of that name takes it up again. The caller makes sure that model and text are the same.
            Without a name the cache is gone with :meth:`close`, or with the last reference to it.
        granularity: ``layer`` or ``head``, for a new sequence. By default what the first forward
            pass computes on decides: ``head`` for the CPU, ``layer`` for a GPU, and for models
            whose heads' unfinished chunks would hold more than 32 MiB.

    Raises:
        ShapeMismatch: The model cannot be served (see :func:`layer_windows`), or a tensor has
            another shape than at first.
        CapacityError: There are more than ``max_tokens`` tokens, or the store has no room.
        SpdkKvError: Whatever else the store raises.
    """

    def __init__(
        self,
        store: KVStore,
        config: Any,
        *,
        max_tokens: int | None = None,
        resident_layers: int = 2,
        name: str | None = None,
        granularity: Granularity | None = None,
    ) -> None:
        if resident_layers < 1:
            raise ValueError(f"resident_layers is 1 or more, not {resident_layers}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is 1 or more, not {max_tokens}")
        options = StreamOptions(
            windows=layer_windows(config),
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
        """What the cache holds and did.

        Returns:
            ``resident_layers`` (in memory now), ``resident_layers_peak``, ``kept_layers`` (those
            that stay there), ``prefetch_hits``, ``prefetch_misses``, ``appended_nbytes`` and
            ``read_nbytes`` of K/V, and ``read_wait_s``, the seconds spent waiting for reads.
        """
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
        """Removes the newest tokens. Blocks on the drive.

        Reaches back past a sliding window, since the drive has every token.

        Args:
            tokens_to_remove: Minus the number of tokens to remove, as in transformers.

        Raises:
            ShapeMismatch: The number is positive.
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
        """Repeats every row of the batch ``repeats`` times. Copies the cache on the drive, which
        needs room for both meanwhile."""
        self._stream.select([row for row in range(self._batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (numbers or a mask). Copies the cache unless the number of
        rows stays the same."""
        self._stream.select(torch.arange(self._batch)[indices.cpu()].tolist())

    @property
    def _batch(self) -> int:
        sequence = self._stream.sequence
        return 0 if sequence is None else sequence.shape.batch

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the memory, and deletes the tokens unless the cache has a name. May be called
        twice. Another forward pass begins a new cache."""
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
            "an OffloadedKVCache is on the drive and not copied by copy.deepcopy; crop() goes back "
            "to a shared prompt"
        )


class OffloadedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of an :class:`OffloadedKVCache`, as models and masks see it.

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
        """How many tokens attention sees after ``query_length`` new ones, and the position of the
        first."""
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
    """For each layer of the model, how many tokens its attention sees at most, or None for all.

    Raises:
        ShapeMismatch: One sequence cannot hold the model's K/V: it is an encoder-decoder, or has
            layers with recurrent or convolutional state, with an indexer, without a cache of their
            own (K/V shared between layers), or with different numbers of KV heads.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ShapeMismatch(f"{name} is an encoder-decoder: only decoders can be offloaded")
    text_config = config.get_text_config(decoder=True)
    for field in ("num_key_value_heads", "head_dim"):
        layers = getattr(text_config, "per_layer_config", ())
        if len({getattr(layer, field, None) for layer in layers}) > 1:
            raise ShapeMismatch(
                f"{name} has layers that differ in {field}: use DynamicCache for it"
            )
    windows: list[int | None] = []
    # DynamicCache decides what each layer is, so that the two always agree.
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
