"""Which names live caches write: one at a time for each."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from spdk_kv.errors import NameInUse
from spdk_kv.store import KVStore

_lock = threading.Lock()


class _Names:
    """Those of one store: who writes each, and how often it changed hands."""

    def __init__(self) -> None:
        self.writers: dict[str, weakref.ref[Any]] = {}
        self.claims: dict[str, int] = {}


_names: weakref.WeakKeyDictionary[KVStore, _Names] = weakref.WeakKeyDictionary()


def claim(store: KVStore, name: str, cache: Any) -> None:
    """``cache`` writes the sequence ``name`` from now on, until :func:`let_go` or its end.

    Raises NameInUse where another live cache does.
    """
    with _lock:
        names = _names.setdefault(store, _Names())
        other = names.writers[name]() if name in names.writers else None
        if other is not None and other is not cache:
            raise NameInUse(
                f"{name!r} is being written by another live cache of this process, the "
                f"{type(other).__name__} at {id(other):#x}: close that one, or drop it"
            )
        names.writers[name] = weakref.ref(cache)
        names.claims[name] = names.claims.get(name, 0) + 1


def let_go(store: KVStore, name: str, cache: Any) -> None:
    """``cache`` does not write ``name`` any more. Nothing where another one does."""
    with _lock:
        names = _names.get(store)
        writer = None if names is None else names.writers.get(name)
        if names is not None and writer is not None and writer() in (cache, None):
            del names.writers[name]


def writer_of(store: KVStore, name: str) -> tuple[Any, int]:
    """The live cache that writes ``name``, or None; and how often the name was claimed so far."""
    with _lock:
        names = _names.get(store)
        if names is None:
            return None, 0
        writer = names.writers[name]() if name in names.writers else None
        return writer, names.claims.get(name, 0)
