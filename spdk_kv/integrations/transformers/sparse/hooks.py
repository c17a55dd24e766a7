"""Tells a cache of every decode step of a model that is given it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spdk_kv.integrations.transformers.sparse.steps import Steps
from spdk_kv.integrations.transformers.sparse.structure import Structure
from spdk_kv.integrations.transformers.sparse.trial import hidden_of, rope_key


class _Hook:
    """One hook. Holds neither the cache nor the model; a model that is copied or saved meanwhile
    does not take it along."""

    def __init__(self, cache: Any, tell: Callable[..., object]) -> None:
        self._cache = weakref.ref(cache)
        self._tell = tell

    # Not for torch.compile: it reads from a drive.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any
    ) -> Any:
        cache = self._cache()
        return None if cache is None else self._tell(cache, args, kwargs, *output)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _no_hook, ()


def _nothing(*_: object) -> None:
    return None


def _no_hook() -> object:
    return _nothing


def hook(cache: Any, structure: Structure) -> Callable[[], object]:
    """From now on ``cache.steps`` is told of the forward passes of the model of ``structure`` that
    are given ``cache``. Returns what ends this; it ends by itself when the cache is gone."""
    owner = structure.owner
    handles = [
        owner.register_forward_pre_hook(_Hook(cache, _begin), with_kwargs=True),
        owner.register_forward_hook(_Hook(cache, _end), with_kwargs=True, always_call=True),
    ]
    for number, module in enumerate(structure.rotary):
        told = _Hook(cache, _turning(number))
        handles.append(module.register_forward_hook(told, with_kwargs=True))
    for place, decoder in enumerate(structure.decoders):
        told = _Hook(cache, _entering(place))
        handles.append(decoder.register_forward_pre_hook(told, with_kwargs=True))
    for place in structure.queries:
        told, attention = _Hook(cache, _attending(place)), structure.layers[place].attention
        handles.append(attention.register_forward_pre_hook(told, with_kwargs=True))
    ending = weakref.finalize(cache, _remove, handles)
    ending.atexit = False
    return ending


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _is_given(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(given is cache for given in (*kwargs.values(), *args))


def _begin(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _is_given(cache, args, kwargs):
        cache.steps.begin(kwargs.get("attention_mask"))


def _end(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *_: object) -> None:
    if _is_given(cache, args, kwargs):
        cache.steps.end()


def _turning(number: int) -> Callable[..., None]:
    def tell(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        steps: Steps = cache.steps
        steps.turn(rope_key(number, args, kwargs), output)

    return tell


def _entering(place: int) -> Callable[..., None]:
    def tell(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps: Steps = cache.steps
        steps.enter(place, hidden_of(args, kwargs))

    return tell


def _attending(place: int) -> Callable[..., object]:
    def tell(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        steps: Steps = cache.steps
        mask = kwargs.get("attention_mask")
        picked = steps.attend(place, hidden_of(args, kwargs), mask)
        return None if picked is mask else (args, {**kwargs, "attention_mask": picked})

    return tell
