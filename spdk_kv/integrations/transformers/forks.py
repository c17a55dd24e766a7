"""A fork of a cache: the same beginning, without a copy."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Protocol, TypeVar

from torch import nn

from spdk_kv.errors import ShapeMismatch
from spdk_kv.integrations.transformers.history import History
from spdk_kv.integrations.transformers.states import OWN, LayerStates
from spdk_kv.integrations.transformers.stream import LayerStream
from spdk_kv.integrations.transformers.text import Text


class Forkable(Protocol):
    """An OffloadedKVCache."""

    layers: list[Any]

    @property
    def parts(self) -> tuple[LayerStream, LayerStates]: ...
    @property
    def model(self) -> nn.Module | None: ...
    @property
    def history(self) -> History | None: ...
    def remember(self, model: Any, history: History) -> None: ...
    def empty_twin(self) -> Any: ...


Cache = TypeVar("Cache", bound=Forkable)


def fork_of(cache: Cache, tokens: int | None) -> Cache:
    """See :meth:`OffloadedKVCache.fork`."""
    stream, states = cache.parts
    held = stream.tokens(0)
    tokens = held if tokens is None else tokens
    if not 0 <= tokens <= held:
        raise ShapeMismatch(f"the cache has {held} tokens per row, not {tokens}")
    states.check_croppable(held - tokens, held)
    twin: Cache = cache.empty_twin()
    own, own_states = twin.parts
    for mine, its in zip(cache.layers, twin.layers, strict=True):
        for name, value in vars(mine).items():
            if name not in OWN:
                setattr(its, name, deepcopy(value))
    own_states.crop(held - tokens)
    own.take_fork(stream, tokens)
    if cache.history is not None:
        text = Text(cache.history.text.ids[:tokens])
        twin.remember(cache.model, History(cache.history.identity, text))
    return twin
