"""A cache for ``model.generate`` of transformers, kept on a store."""

from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.utils import ALL_CACHE_NAMES

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers.layers import layers_with_kv, offloaded, window_of
from spdk_kv.integrations.transformers.refusal import layer_templates
from spdk_kv.integrations.transformers.states import LayerStates
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
    attention in any mixture. Layers without K/V (linear attention, Mamba, convolution) keep their
    states in memory, where DynamicCache has them, beside those on the drive.

    Blocks in the model's attention while the drive reads. Batch, dtype and device are those of the
    first forward pass until :meth:`reset`. A context manager. Not thread-safe. Of an
    encoder-decoder it holds the decoder's self-attention: see
    :class:`OffloadedEncoderDecoderCache`.

    Args:
        store: Where the tokens go.
        config: The model's configuration.
        max_tokens: Capacity in tokens per row of the batch, reserved on the store at the first use,
            in one piece, and fixed from then on. By default the cache grows as tokens come.
        resident_layers: Layers whose K/V may be in memory at once, including the one being
            computed and the one being read ahead. With more than two, the first
            ``resident_layers - 2`` stay in memory. Each layer's unfinished chunks, 16 KiB of K and
            of V, stay there in any case.
        name: Makes the cache last: ``store.flush()`` or ``close()`` records it, and the next cache
            of that name takes it up again. The caller makes sure that model and text are the same.
            Without a name the cache is gone with :meth:`close`, or with the last reference to it.
        granularity: ``layer`` or ``head``, for a new sequence.

    Raises:
        ShapeMismatch: The model cannot be served (see :func:`layer_templates`), or not by a lasting
            cache, since it has states beside K/V; or a tensor has another shape than at first.
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
        granularity: Granularity = "layer",
    ) -> None:
        if resident_layers < 1:
            raise ValueError(f"resident_layers is 1 or more, not {resident_layers}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is 1 or more, not {max_tokens}")
        templates = layer_templates(config)
        options = StreamOptions(
            windows=tuple(window_of(layer) for layer in layers_with_kv(templates)),
            max_tokens=max_tokens,
            resident_layers=resident_layers,
            name=name,
            granularity=granularity,
        )
        self._config = config
        self._refuse_lasting_states(templates, name)
        self._stream = LayerStream(store, options)
        super().__init__(layers=offloaded(templates, self._stream))
        self._states = LayerStates(self.layers, self._model_type)

    @property
    def _model_type(self) -> str:
        return str(getattr(self._config, "model_type", type(self._config).__name__))

    def _refuse_lasting_states(self, templates: list[Any], name: str | None) -> None:
        if name is not None and LayerStates(templates, self._model_type):
            raise ShapeMismatch(
                f"{self._model_type} has layers with states beside K/V, and a cache with a name "
                "stores K/V alone: make it without name="
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

    # -- one layer of a forward pass ------------------------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens to a layer and returns what its attention sees; see
        :meth:`LayerStream.update`."""
        self._states.begin(layer_idx, "kv")
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._states.end(layer_idx, "kv")
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As DynamicCache does."""
        self._states.read(layer_idx, f"convolution {state_idx} read")
        state: torch.Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As DynamicCache does."""
        self._states.read(layer_idx, f"recurrence {state_idx} read")
        state: torch.Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As DynamicCache does."""
        call = f"convolution {state_idx}"
        self._states.begin(layer_idx, call)
        self._states.spoil()
        states: torch.Tensor = super().update_conv_state(
            conv_states, layer_idx, state_idx, **kwargs
        )
        self._states.end(layer_idx, call)
        return states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As DynamicCache does."""
        call = f"recurrence {state_idx}"
        self._states.begin(layer_idx, call)
        self._states.spoil()
        states: torch.Tensor = super().update_recurrent_state(
            recurrent_states, layer_idx, state_idx, **kwargs
        )
        self._states.end(layer_idx, call)
        return states

    # -- changing: all layers at once -----------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens; the next forward pass may have another batch and dtype."""
        self._states.spoil()
        self._stream.clear()
        self._renew_layers()

    def _renew_layers(self) -> None:
        recording = [self.is_recording_past(number) for number in range(len(self.layers))]
        self.layers[:] = offloaded(layer_templates(self._config), self._stream)
        for layer, record_past in zip(self.layers, recording, strict=True):
            if record_past:
                layer.activate_past_recording()
        self._states = LayerStates(self.layers, self._model_type)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens. Blocks on the drive.

        Reaches back past a sliding window, since the drive has every token. Layers with states
        set the same limits as in DynamicCache: convolutional ones go back as far as the last crop
        after ``activate_past_recording()``, recurrent ones only to the beginning.

        Args:
            tokens_to_remove: Minus the number of tokens to remove, as in transformers.

        Raises:
            ShapeMismatch: The number is positive.
            SpdkKvError: A layer has states that do not reach back so far, or that an interrupted
                pass left half-way. Nothing is changed.
        """
        if tokens_to_remove > 0:
            raise ShapeMismatch(
                f"crop takes minus the number of tokens to remove, not {tokens_to_remove}"
            )
        count, tokens = -tokens_to_remove, self._stream.tokens(0)
        if self._states and count >= tokens > 0:
            self.reset()
            return
        self._states.check_croppable(count, tokens)
        with self._states.changing():
            self._stream.truncate(count)
            self._states.crop(count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``b`` becomes what row ``beam_idx[b]`` was. No I/O."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch ``repeats`` times. Copies the cache on the drive, which
        needs room for both meanwhile."""
        self._select([row for row in range(self._batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (numbers or a mask). Copies the cache unless the number of
        rows stays the same."""
        self._select(torch.arange(self._batch)[indices.cpu()].tolist())

    def _select(self, rows: list[int]) -> None:
        with self._states.changing():
            self._stream.select(rows)
            self._states.select(rows)

    @property
    def _batch(self) -> int:
        sequence = self._stream.sequence
        return 0 if sequence is None else sequence.shape.batch

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the memory, and deletes the tokens unless the cache has a name. May be called
        twice. Another forward pass begins a new cache."""
        self._states.spoil()
        self._stream.release()
        self._renew_layers()

    def __enter__(self) -> OffloadedKVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __copy__(self) -> OffloadedKVCache:
        raise TypeError(
            "an OffloadedKVCache is on the drive and not copied by copy.copy: two caches cannot "
            "write the same tokens; use this one itself, or make another"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an OffloadedKVCache is on the drive and not saved by pickle or torch.save: make it "
            "with name=, close it, and open it by that name in the other process"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedKVCache:
        raise TypeError(
            "an OffloadedKVCache is on the drive and not copied by copy.deepcopy; crop() goes back "
            "to a shared prompt"
        )
