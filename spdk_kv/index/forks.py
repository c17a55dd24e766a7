"""Locks around calls of SQLite, taken before a fork: a child finds SQLite between two calls.

SQLite has mutexes of its own. One that another thread holds at the moment of a fork is held in the
child for ever, and the child's first use of SQLite, on whatever file, would wait for it.
"""

from __future__ import annotations

import os
import threading
import weakref

# A call that waits for a dead drive must not keep this process from forking.
_TIMEOUT_S = 1.0

_all: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
_registry = threading.Lock()
_taken: list[threading.Lock] = []


def sqlite_lock() -> threading.Lock:
    """A lock that is to be held around every call of SQLite on one connection."""
    lock = threading.Lock()
    with _registry:
        _all.add(lock)
    return lock


def _before() -> None:
    _registry.acquire()
    _taken.extend(lock for lock in list(_all) if lock.acquire(timeout=_TIMEOUT_S))


def _after() -> None:
    while _taken:
        _taken.pop().release()
    _registry.release()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
