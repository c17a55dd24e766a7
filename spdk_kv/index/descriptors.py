"""Descriptors of an index's file beside SQLite's own, closed only where that takes no lock away.

When a process closes any descriptor of a file, POSIX drops every lock that the process has on it
(fcntl(2)), SQLite's included. A store and a reader of it may be open in one process. So while the
store's index is open, what its readers close is kept, and closed with it.
"""

from __future__ import annotations

import os
import threading
from collections import Counter

Identity = tuple[int, int]
"""A file's device and inode."""

_lock = threading.Lock()
_users: Counter[Identity] = Counter()
_left: dict[Identity, list[int]] = {}


def locks_taken(path: str) -> Identity:
    """SQLite is about to lock the file at ``path``. Give what this returns to
    :func:`locks_dropped`. OSError."""
    found = os.stat(path)
    identity = (found.st_dev, found.st_ino)
    with _lock:
        _users[identity] += 1
    return identity


def locks_dropped(identity: Identity) -> None:
    """SQLite has closed the file that :func:`locks_taken` was told of."""
    with _lock:
        _users[identity] -= 1
        if _users[identity] <= 0:
            del _users[identity]
            for descriptor in _left.pop(identity, ()):
                os.close(descriptor)


def close(descriptor: int) -> None:
    """Closes a descriptor of an index's file, now or once SQLite has closed that in this
    process."""
    found = os.fstat(descriptor)
    identity = (found.st_dev, found.st_ino)
    with _lock:
        if identity in _users:
            _left.setdefault(identity, []).append(descriptor)
        else:
            os.close(descriptor)


def _forget() -> None:
    """A child has none of its parent's locks, so there is nothing to be kept."""
    for descriptors in _left.values():
        for descriptor in descriptors:
            os.close(descriptor)
    _left.clear()
    _users.clear()
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)
