"""Whether what a lock guards is used with that lock held only; needs no second thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

# What makes and shows an object is not a use of it.
_NO_USE = ("__init__", "__new__", "__repr__", "__getattribute__", "__class_getitem__", "__eq__")


class Guard:
    """Notes in ``missed`` every use of what it watches while nobody holds ``lock``; of an RLock,
    while this thread does not."""

    def __init__(self, lock: Any) -> None:
        self.missed: list[str] = []
        self._is_held: Callable[[], bool] = getattr(lock, "_is_owned", None) or lock.locked

    def watch(self, thing: Any, *only: str) -> Any:
        """``thing``, watched from now on; of a container a copy that is, to be put in its place.
        ``only``: the methods that are uses, if not all are."""
        base = type(thing)
        uses: dict[str, Any] = {}
        for name, value in vars(base).items():
            if name in _NO_USE or (only and name not in only):
                continue
            if isinstance(value, property):
                uses[name] = property(self._noting(f"{base.__name__}.{name}", value.fget))
            elif callable(value) and not isinstance(value, type):
                uses[name] = self._noting(f"{base.__name__}.{name}", value)
        watched = type(base.__name__, (base,), uses)
        if isinstance(thing, (dict, list, set, deque)):
            return watched(thing)
        thing.__class__ = watched
        return thing

    def stand_in(self, thing: Any, *only: str) -> Any:
        """What passes everything on to ``thing``, of a compiled class, which cannot be watched
        itself. ``only``: the methods that are uses."""

        def passed(name: str) -> Any:
            return lambda _, *arguments: getattr(thing, name)(*arguments)

        def found(_: Any, name: str) -> Any:
            value = getattr(thing, name)
            if name not in only:
                return value
            noting = self._noting(f"{type(thing).__name__}.{name}", value)
            return lambda *arguments: noting(*arguments)

        operators = ("__len__", "__contains__", "__getitem__", "__iter__", "__reversed__")
        uses: dict[str, Any] = {name: passed(name) for name in operators}
        return type("StandIn", (), {**uses, "__getattr__": found})()

    def _noting(self, name: str, use: Any) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            if not self._is_held():
                self.missed.append(name)
            return use(*arguments, **options)

        return noted
