"""Hooks of a model that tell a cache of its forward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Tell = Callable[..., Any]
"""Is given the cache, the module, its arguments by position and by name, and its output if any."""


class CacheHook:
    """Called with the forward passes of a module. Holds neither the cache nor the model.

    A model that is copied or saved meanwhile does not take the hook along.
    """

    def __init__(self, cache: Any, tell: Tell) -> None:
        self._cache = weakref.ref(cache)
        self._tell = tell

    # Not for torch.compile: what it does depends on the values of tensors, or reads from a drive.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any
    ) -> Any:
        cache = self._cache()
        return None if cache is None else self._tell(cache, module, args, kwargs, *output)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _no_hook, ()


def _nothing(*_: object) -> None:
    return None


def _no_hook() -> object:
    return _nothing


def if_given(tell: Tell) -> Tell:
    """``tell``, but only of passes that are given the cache."""

    def ask(cache: Any, module: Any, args: Any, kwargs: Any, *output: Any) -> Any:
        if any(given is cache for given in (*kwargs.values(), *args)):
            return tell(cache, module, args, kwargs, *output)
        return None

    return ask


def ended_with(cache: Any, handles: Iterable[RemovableHandle]) -> Callable[[], object]:
    """Removes the hooks behind ``handles`` when it is called, or when the cache is gone."""
    ending = weakref.finalize(cache, _remove, tuple(handles))
    ending.atexit = False
    return ending


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
