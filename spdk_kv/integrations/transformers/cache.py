"""A cache for ``model.generate`` of transformers, kept on a store."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation.utils import ALL_CACHE_NAMES

from spdk_kv.errors import CapacityError, ShapeMismatch
from spdk_kv.integrations.transformers.forks import fork_of
from spdk_kv.integrations.transformers.history import History
from spdk_kv.integrations.transformers.identity import (
    config_of,
    identity_of,
    length_limit,
)
from spdk_kv.integrations.transformers.lasting import Found, LastingStates
from spdk_kv.integrations.transformers.layers import offloaded, windows_of
from spdk_kv.integrations.transformers.live import claim, let_go
from spdk_kv.integrations.transformers.options import StreamOptions
from spdk_kv.integrations.transformers.refusal import layer_templates
from spdk_kv.integrations.transformers.states import LayerStates, type_of
from spdk_kv.integrations.transformers.stream import LayerStream
from spdk_kv.integrations.transformers.tables import tell
from spdk_kv.integrations.transformers.taking_up import RESERVED, ids_of, stored_note
from spdk_kv.integrations.transformers.text import Ids, Text
from spdk_kv.integrations.transformers.watch import watch
from spdk_kv.sequence import Sequence
from spdk_kv.store import KVStore
from spdk_kv.types import Granularity

CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
"""The name of ``generate``'s argument for the cache in the installed release of transformers. Newer
ones warn of the old name."""


class OffloadedKVCache(Cache):  # type: ignore[misc]
    """The KV cache of one ``generate`` at a time, on the drive instead of in memory.

    ``model.generate(..., past_key_values=OffloadedKVCache(store, model))`` returns the tokens that
    DynamicCache would; newer releases of transformers say ``cache=`` (:data:`CACHE_ARGUMENT`). The
    K/V of every new token goes to a sequence of ``store``; while one layer computes, the next one's
    K/V is read. It serves greedy decoding, sampling, beam search, assisted decoding, padded
    batches, chunked prefill, and full, sliding-window and chunked attention in any mixture. Layers
    without K/V (linear attention, Mamba, convolution) keep their states in memory, where
    DynamicCache has them, beside those on the drive.

    Blocks in the model's attention while the drive reads. Batch, dtype and device are those of the
    first forward pass until :meth:`reset`. A context manager. Not thread-safe. Of an
    encoder-decoder it holds the decoder's self-attention: see
    :class:`OffloadedEncoderDecoderCache`.

    A cache with a name lasts, with what it was computed from: configuration and weights of the
    model, and the token ids. A later one of that name goes on from the longest beginning that its
    ``input_ids`` have in common with them. States cannot go back: with layers that keep some it
    goes on where ``input_ids`` begin with all tokens of the last time, and begins anew otherwise.

    Args:
        store: Where the tokens go.
        model: The model; without a name, its configuration will do as well.
        max_tokens: Capacity in tokens per row of the batch, reserved on the store at the first use,
            in one piece, and fixed from then on. By default the cache grows as tokens come.
        resident_layers: Layers whose K/V may be in memory at once, including the one being
            computed and the one being read ahead. With more than two, the first
            ``resident_layers - 2`` stay in memory. Each layer's unfinished chunks, 16 KiB of K and
            of V (with granularity ``head`` of each head), stay there in any case.
        name: Makes the cache last: ``store.flush()`` or ``close()`` records it. Without a name the
            cache is gone with :meth:`close`, or with the last reference to it. One live cache of a
            name at a time.
        input_ids: The text, ``[batch, tokens]``, that the cache named ``name`` is to hold in the
            end. What it has of the beginning is kept, all but the last token at most, since one has
            to be computed; what differs is cropped. Without it, or with a bare configuration, a
            name begins anew, and its first tokens replace what was stored.
        attention_mask: For ``input_ids`` that are padded on the left, as ``generate`` takes it.
        tag: Anything else that K and V depend on; another tag is another model.
        granularity: ``layer`` or ``head``, for a new sequence. By default what the first forward
            pass computes on decides: ``head`` for the CPU, ``layer`` for a GPU, and for models
            whose heads' unfinished chunks would hold more than 32 MiB.

    Raises:
        ShapeMismatch: The model cannot be served (see :func:`layer_templates`), or a tensor has
            another shape than at first.
        StoreMismatch: What is stored as ``name`` is another model's; says in what.
        NameInUse: Another live cache of this process has the name.
        CapacityError: There are more than ``max_tokens`` tokens, or the store has no room.
        SpdkKvError: Whatever else the store raises.
    """

    def __init__(
        self,
        store: KVStore,
        model: Any,
        *,
        max_tokens: int | None = None,
        resident_layers: int = 2,
        name: str | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tag: str | None = None,
        granularity: Granularity | None = None,
    ) -> None:
        if resident_layers < 1:
            raise ValueError(f"resident_layers is 1 or more, not {resident_layers}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is 1 or more, not {max_tokens}")
        if input_ids is not None and name is None:
            raise ValueError("input_ids= is for a cache with a name=")
        if name is not None and name.startswith(RESERVED):
            raise ValueError(f"names that begin with {RESERVED!r} are those of a PromptCache")
        config = config_of(model)
        templates = layer_templates(config)
        options = StreamOptions(
            windows=windows_of(templates),
            max_tokens=max_tokens,
            resident_layers=resident_layers,
            name=name,
            granularity=granularity,
        )
        self._config = config
        self._stream = self._stream_of(store, options)
        super().__init__(layers=offloaded(templates, self._stream))
        self._states = LayerStates(self.layers, self._model_type)
        self._store = store
        self._history: History | None = None
        self._lasting: LastingStates | None = None
        self._unwatch: Callable[[], object] | None = None
        self._saved_tokens = 0
        self._model: weakref.ref[nn.Module] | None = None
        if name is not None:
            claim(store, name, self)
            ids = None if input_ids is None else ids_of(input_ids, attention_mask)
            self._take_up(name, model, ids, tag)

    @property
    def _model_type(self) -> str:
        return type_of(self._config)

    def _stream_of(self, store: KVStore, options: StreamOptions) -> LayerStream:
        return LayerStream(store, options)

    def _take_up(self, name: str, model: Any, ids: Ids | None, tag: str | None) -> None:
        identity = identity_of(model, self._stream.options.windows, tag)
        limit = length_limit(config_of(model))
        note = stored_note(self._store, name, identity, ids, limit)
        found: Found | None = None
        if self._states:
            self._lasting = LastingStates(self._store, name, identity, self, model)
            found = None if note is None else self._lasting.find(note.ids)
            note = None if note is None or found is None else replace(note, ids=found.ids)
        if note is None:
            self.remember(model, History(identity))
            return
        self._saved_tokens = self._stream.resume(name, len(note.ids))
        if found is not None:
            self._states.attributes = found.layers
        history = History(identity, Text(note.ids), note.hits + 1)
        self.remember(model, history)
        tell(self._store, name, history.as_note())

    def remember(self, model: Any, history: History, sequence: Sequence | None = None) -> None:
        """For :class:`PromptCache`: ``history`` notes from now on which tokens it holds, at first
        those of ``sequence``, which it takes over."""
        if sequence is not None:
            self._saved_tokens = self._stream.adopt(sequence, len(history.text))
        self._history = history
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else None
        self._stream.before_append = history.before_append
        if isinstance(model, nn.Module):
            self._unwatch = watch(model, self, history)

    @property
    def model(self) -> nn.Module | None:
        """For a fork: whose forward passes are noted, if it is still there."""
        return None if self._model is None else self._model()

    @property
    def parts(self) -> tuple[LayerStream, LayerStates]:
        """For a fork: what it holds on the drive, and in memory."""
        return self._stream, self._states

    def empty_twin(self) -> OffloadedKVCache:
        """For a fork: a cache like this one, without a name and without tokens."""
        options = self._stream.options
        return OffloadedKVCache(
            self._store,
            self._config,
            max_tokens=options.max_tokens,
            resident_layers=options.resident_layers,
            granularity=options.granularity,
        )

    @property
    def history(self) -> History | None:
        """For :class:`PromptCache`: which tokens it holds, if that is noted."""
        return self._history

    @property
    def store(self) -> KVStore:
        """Where the tokens are."""
        return self._store

    @property
    def saved_tokens(self) -> int:
        """How many tokens per row were there already when the cache was made."""
        return self._saved_tokens

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
        with self._changing():
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
        with self._states.changing(), self._changing():
            self._stream.truncate(count)
            self._states.crop(count)
        if self._history is not None and self.sequence is not None:
            self._history.cut(self.sequence, self._stream.tokens(0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``b`` becomes what row ``beam_idx[b]`` was. No I/O."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch ``repeats`` times. No I/O but for a cache with a name,
        which is copied on the drive and needs room for both meanwhile."""
        self._select([row for row in range(self._batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices`` (numbers or a mask). As :meth:`batch_repeat_interleave`."""
        self._select(torch.arange(self._batch)[indices.cpu()].tolist())

    def _select(self, rows: list[int]) -> None:
        if self._history is None or rows == list(range(self._batch)):
            self._select_rows(rows)
            return
        text, batch = self._history.forget(self.sequence), range(self._batch)
        try:
            self._select_rows(rows)
        except (ShapeMismatch, CapacityError):  # nothing was changed
            self._history.select(self.sequence, text, batch)
            raise
        self._history.select(self.sequence, text, rows)

    def _select_rows(self, rows: list[int]) -> None:
        with self._states.changing():
            self._stream.select(rows)
            self._states.select(rows)

    def _changing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._history is None else self._history.changing()

    @property
    def _batch(self) -> int:
        sequence = self._stream.sequence
        return 0 if sequence is None else sequence.shape.batch

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees the memory, and deletes the tokens unless the cache has a name: then the states of
        layers that keep some are stored, which blocks on the drive. May be called twice. Another
        forward pass begins a new cache, unless it has a name: that is free then."""
        if self._lasting is not None:
            self._lasting.end()
        self._states.spoil()
        self._stream.release()
        self._renew_layers()
        if self._unwatch is not None:
            self._unwatch()
        name = self._stream.options.name
        if name is not None:
            let_go(self._store, name, self)
            if self._history is not None:
                tell(self._store, name, self._history.as_note())

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

    def fork(self, tokens: int | None = None) -> OffloadedKVCache:
        """Another cache without a name, which begins with the first tokens of this one. Both have
        them where they are: nothing is copied but unfinished chunks (and states, which are in
        memory). Either goes on, or is closed, first. ``copy.deepcopy`` does the same.

        Args:
            tokens: How many tokens per row; all by default.

        Returns:
            The new cache: for another answer to the same prompt, or a branch of a search.

        Raises:
            ShapeMismatch: There are fewer tokens.
            SpdkKvError: A layer has states that do not reach back so far, or whatever else the
                store raises. Blocks on the drive.
        """
        return fork_of(self, tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedKVCache:
        return self.fork()
