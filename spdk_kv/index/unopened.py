"""Why SQLite could not open its file: it says only that, not which of many reasons it had."""

from __future__ import annotations

import errno
import os

# What an index takes while it is opened: two connections with a file and a log each, the memory
# that they share, the count of commits, and the folder, which is flushed.
_DESCRIPTORS = 8


def why_unopened(path: str) -> OSError | None:
    """What keeps the system from opening the index at ``path`` or a file beside it, or None.

    The index itself is not opened: closing any descriptor of it would drop SQLite's locks on it.
    """
    try:
        os.stat(path)
    except OSError as refused:
        return refused
    folder = os.path.dirname(path)
    beside = [f"{path}{suffix}" for suffix in ("-wal", "-shm")]
    for place in (folder, path, *filter(os.path.exists, beside)):
        wanted = os.R_OK | os.W_OK | (os.X_OK if place == folder else 0)
        if not os.access(place, wanted, effective_ids=True):
            readonly = os.statvfs(folder).f_flag & os.ST_RDONLY
            number = errno.EROFS if readonly else errno.EACCES
            return OSError(number, os.strerror(number), place)
    return _no_descriptors()


def _no_descriptors() -> OSError | None:
    spare: list[int] = []
    try:
        for _ in range(_DESCRIPTORS):
            spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as refused:
        return OSError(refused.errno, refused.strerror)
    finally:
        for descriptor in spare:
            os.close(descriptor)
    return None
