"""A cache for ``model.generate`` that reads from the drive only what matters to each token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers.cache import OffloadedKVCache
from spdk_kv.integrations.transformers.identity import config_of, root_of
from spdk_kv.integrations.transformers.layers import OFFLOADED, OffloadedIndexedLayer, window_of
from spdk_kv.integrations.transformers.options import StreamOptions
from spdk_kv.integrations.transformers.refusal import layer_templates
from spdk_kv.integrations.transformers.sparse.hooks import hook
from spdk_kv.integrations.transformers.sparse.lasting import StoredSelection
from spdk_kv.integrations.transformers.sparse.steps import Steps
from spdk_kv.integrations.transformers.sparse.stream import SparseStream
from spdk_kv.integrations.transformers.sparse.structure import refused
from spdk_kv.integrations.transformers.sparse.trial import structure_of
from spdk_kv.integrations.transformers.states import type_of
from spdk_kv.integrations.transformers.stream import LayerStream
from spdk_kv.integrations.transformers.text import Ids
from spdk_kv.sparse import Settings, load_adapters, preset
from spdk_kv.store import KVStore
from spdk_kv.units import parse_nbytes


class SparseKVCache(OffloadedKVCache):
    """An :class:`OffloadedKVCache` of which a decode step reads a part: of each layer a few hundred
    tokens, those that matter to the token being computed.

    What matters is estimated from a small code of every key that stays in memory. While one layer
    computes, the next one's query is predicted from its input, and the groups of tokens that this
    query wants are read from the drive, unless they are resident from earlier steps. Prompts, and
    whatever else has more than one new token, attend to everything and read all of it, as does a
    step for which nothing was selected. With ``tokens`` at least the length, decoding is dense
    decoding to the last bit. Layers with a sliding window read their window.

    Selection may be wrong, which costs quality; the bytes of what is read never are: a read that
    fails or does not fit its checksum is an error, and one that is late is waited for.

    It serves what OffloadedKVCache serves, with models whose decoder layers have an attention with
    ``q_proj`` or ``qkv_proj`` and RoPE, if any, from the model: Llama, Qwen, Mistral, Gemma, Phi-3,
    OLMo, SmolLM3 and those built alike. Whether a model is so is tried when its first cache is
    made, with a forward pass of four tokens; not while it is used in another thread.

    Args:
        store: Where the tokens go.
        model: The model itself. It is kept alive.
        tokens: How many of the tokens on the drive a step attends to, per layer and row of the
            batch, a multiple of ``settings.group_tokens``; 256 by default. The newest ones come on
            top (``settings.recent``).
        selector: Name of the settings to take, one of :func:`~spdk_kv.sparse.presets`: ``codes``
            by default; ``kvswap`` is KVSwap as released.
        settings: All of them, in place of ``selector``.
        adapters: For ``lowrank`` keys: the file that ``spdk-kv fit`` wrote; or by number of the
            layer float32 ``[kv_heads * head_dim, rank]``. Without them a projection is fitted to
            the prompt's own keys.
        memory: What resident groups, newest tokens and codes may take of host memory, in bytes or
            as ``"2 GiB"``; by default what the machine has left.
        options: Those of :class:`OffloadedKVCache` but ``granularity``. Layers that
            ``resident_layers`` keeps in memory are attended to as a whole.

    Raises:
        ShapeMismatch: The model cannot be served; says what it lacks.
        ValueError: A setting is out of range; or the settings go with another selector.
        StoreMismatch: What is stored as ``name`` is another model's, or not laid out in groups.
        CapacityError: Memory is too small for a prompt, which is told before it is computed; or
            whatever else is too small, as for :class:`OffloadedKVCache`.
        SpdkKvError: Whatever else the store raises.
    """

    def __init__(
        self,
        store: KVStore,
        model: nn.Module,
        *,
        tokens: int | None = None,
        selector: str | None = None,
        settings: Settings | None = None,
        adapters: Mapping[int, Any] | str | os.PathLike[str] | None = None,
        memory: int | str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ShapeMismatch("a SparseKVCache takes the model itself, not its configuration")
        if options.pop("granularity", None) not in (None, "token"):
            raise ValueError("a SparseKVCache lies by tokens: leave granularity= out")
        self.settings = _settings(settings, selector, tokens)
        if isinstance(adapters, str | os.PathLike):
            adapters = load_adapters(adapters)
        self._adapters = dict(adapters or {})
        self._memory_nbytes = None if memory is None else parse_nbytes(memory)
        self._kept_alive = model
        whole = self._find_layers(model)
        self._structure = structure_of(root_of(model), type_of(config_of(model)), whole)
        self._selection: StoredSelection | None = None
        super().__init__(store, model, **options)
        self.steps = Steps(self._structure, self.sparse, self._numbers)
        self._unhook = hook(self, self._structure)

    def _find_layers(self, model: nn.Module) -> list[int]:
        """The layers that attend to all tokens. ShapeMismatch where they select by themselves."""
        config = config_of(model)
        name, templates = type_of(config), layer_templates(config)
        if getattr(config, "is_encoder_decoder", False):
            raise refused(name, "it is an encoder-decoder")
        numbers = [n for n, each in enumerate(templates) if type(each) in OFFLOADED]
        for number in numbers:
            if OFFLOADED[type(templates[number])] is OffloadedIndexedLayer:
                raise refused(name, f"layer {number} selects tokens by itself")
        self._numbers = {number: place for place, number in enumerate(numbers)}
        return [number for number in numbers if window_of(templates[number]) is None]

    def _stream_of(self, store: KVStore, options: StreamOptions) -> LayerStream:
        queries, numbers = self._structure.queries, self._numbers
        return SparseStream(
            store,
            options,
            self.settings,
            {numbers[number]: query.scaling for number, query in queries.items()},
            {numbers[number]: each for number, each in self._adapters.items()},
            self._memory_nbytes,
        )

    def _take_up(self, name: str, model: Any, ids: Ids | None, tag: str | None) -> None:
        super()._take_up(name, model, ids, tag)
        if self.history is None:
            return
        self._selection = StoredSelection(self.store, name, self.history.identity, self)
        if self.saved_tokens:
            self._selection.find(self.history.text.ids)

    @property
    def sparse(self) -> SparseStream:
        """For :class:`StoredSelection`: the stream, which reads parts."""
        assert isinstance(self._stream, SparseStream)
        return self._stream

    def empty_twin(self) -> SparseKVCache:
        options = self._stream.options
        return SparseKVCache(
            self._store,
            self._kept_alive,
            settings=self.settings,
            adapters=self._adapters,
            memory=self._memory_nbytes,
            max_tokens=options.max_tokens,
            resident_layers=options.resident_layers,
        )

    def stats(self) -> dict[str, Any]:
        """What the cache holds and did.

        Returns:
            What :meth:`OffloadedKVCache.stats` does, and of the steps that read a part:
            ``selected_tokens``, attended to per token, layer and row, the newest ones included;
            ``read_nbytes_per_token``, bytes asked of the drive per token and row, in those layers;
            ``hits`` and ``misses``, groups that were resident and that were not; ``corrections``,
            rows of layers in which what the true query asked for was fetched, and ``coverage``,
            the mean share of it that had been selected (None where ``settings.correction`` is
            None); ``resident_nbytes``, of K and V in host memory, and ``metadata_nbytes``, of what
            groups are selected by. ``read_wait_s`` is of all reads.
        """
        found, part, stream = super().stats(), self.sparse.part, self.sparse
        rows = max(1, part.row_layers)
        found["read_nbytes"] += part.read_nbytes
        found["read_wait_s"] += part.read_wait_s
        return {
            **found,
            "selected_tokens": part.selected_tokens / rows,
            "read_nbytes_per_token": part.read_nbytes * len(stream.scalings) / rows,
            "hits": part.hits,
            "misses": part.misses,
            "corrections": part.corrections,
            "coverage": part.coverage / part.coverages if part.coverages else None,
            "resident_nbytes": stream.resident_nbytes,
            "metadata_nbytes": stream.metadata_nbytes,
        }

    def close(self) -> None:
        """As :meth:`OffloadedKVCache.close`. What groups are selected by is stored with the tokens
        of a cache with a name."""
        if self._selection is not None:
            self._selection.end()
        super().close()
        if self._stream.options.name is not None:
            self._unhook()


def _settings(settings: Settings | None, selector: str | None, tokens: int | None) -> Settings:
    changes: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
    if settings is None:
        return preset(selector or Settings.selector, **changes)
    if selector not in (None, settings.selector):
        raise ValueError(f"settings= is for the selector {settings.selector!r}, not {selector!r}")
    return replace(settings, **changes)
