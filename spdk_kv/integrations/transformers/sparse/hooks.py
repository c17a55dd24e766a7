"""Tells a cache of every decode step of a model that is given it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from spdk_kv.integrations.transformers.hook import CacheHook, ended_with, if_given
from spdk_kv.integrations.transformers.sparse.steps import Steps
from spdk_kv.integrations.transformers.sparse.structure import Structure
from spdk_kv.integrations.transformers.sparse.trial import hidden_of, rope_key

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def hook(cache: Any, structure: Structure) -> Callable[[], object]:
    """From now on ``cache.steps`` is told of the forward passes of the model of ``structure`` that
    are given ``cache``. Returns what ends this; it ends by itself when the cache is gone."""
    owner = structure.owner
    handles = [
        owner.register_forward_pre_hook(CacheHook(cache, if_given(_begin)), with_kwargs=True),
        owner.register_forward_hook(
            CacheHook(cache, if_given(_end)), with_kwargs=True, always_call=True
        ),
    ]
    for number, module in enumerate(structure.rotary):
        told = CacheHook(cache, _turning(number))
        handles.append(module.register_forward_hook(told, with_kwargs=True))
    for place, decoder in enumerate(structure.decoders):
        told = CacheHook(cache, _entering(place))
        handles.append(decoder.register_forward_pre_hook(told, with_kwargs=True))
    for place in structure.queries:
        told, attention = CacheHook(cache, _attending(place)), structure.layers[place].attention
        handles.append(attention.register_forward_pre_hook(told, with_kwargs=True))
    return ended_with(cache, handles)


def _begin(cache: Any, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    cache.steps.begin(kwargs.get("attention_mask"))


def _end(cache: Any, *_: object) -> None:
    cache.steps.end()


def _turning(number: int) -> Callable[..., None]:
    def tell(cache: Any, _: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
        steps: Steps = cache.steps
        steps.turn(rope_key(number, args, kwargs), output)

    return tell


def _entering(place: int) -> Callable[..., None]:
    def tell(cache: Any, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
        steps: Steps = cache.steps
        steps.enter(place, hidden_of(args, kwargs))

    return tell


def _attending(place: int) -> Callable[..., object]:
    def tell(cache: Any, _: nn.Module, args: Args, kwargs: Kwargs) -> object:
        steps: Steps = cache.steps
        mask = kwargs.get("attention_mask")
        picked = steps.attend(place, hidden_of(args, kwargs), mask)
        return None if picked is mask else (args, {**kwargs, "attention_mask": picked})

    return tell
