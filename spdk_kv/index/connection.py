"""SQLite's part of the index: how a file is opened and made durable, and its errors as ours."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from spdk_kv.errors import CorruptionError, DeviceError, StoreLocked, StoreMismatch, file_error
from spdk_kv.index.checks import VERSION
from spdk_kv.index.space import IndexFull
from spdk_kv.index.unopened import why_unopened

# The file is ours alone, so a lock on it is a backup tool's or a mistake.
_BUSY_TIMEOUT_S = 1.0

_DURABLE = (
    "PRAGMA synchronous = FULL",
    # A stray pointer in a damaged page must find zeroes, not a row that was deleted.
    "PRAGMA secure_delete = ON",
    "PRAGMA cell_size_check = ON",
    "PRAGMA temp_store = MEMORY",  # keys are private and must not reach /tmp
)


@contextmanager
def typed_errors(path: str, opened: str = "") -> Iterator[None]:
    """Turns SQLite's errors into ours, with the file's name in each. ``opened``: the file that is
    opened, where that is not ``path``."""
    try:
        yield
    except (CorruptionError, StoreMismatch) as error:
        raise type(error)(f"index {path}: {error}") from error
    except UnicodeDecodeError as error:  # damaged text in SQLite's own tables
        raise CorruptionError(f"index {path}: {error}") from error
    except sqlite3.Error as error:
        # By message, because Python 3.10 does not give SQLite's code.
        text = str(error)
        if "is locked" in text:
            raise StoreLocked(f"index {path} is in use by another program: {text}") from error
        if "is full" in text:
            raise IndexFull(f"index {path}: {text}: free space on its filesystem") from error
        if "unable to open" in text or "readonly" in text:
            if (refused := why_unopened(opened or path)) is not None:
                raise file_error("open", refused.filename or path, refused) from error
            raise DeviceError(f"index {path}: {text}", op="index") from error
        if "I/O error" in text:
            raise DeviceError(
                f"index {path}: {text}: look at `dmesg` and its drive's SMART log", op="index"
            ) from error
        raise CorruptionError(f"index {path}: {text}") from error


def connect(path: str, mode: str) -> sqlite3.Connection:
    """The index at ``path``, which has to be there; ``mode``: "ro" or "rw"."""
    # A URI, whose mode does not create: an index that vanished must not become a blank one.
    uri = f"file:{quote(os.fsencode(path))}?mode={mode}"
    return sqlite3.connect(
        uri, _BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True
    )


def make_durable(connection: sqlite3.Connection) -> None:
    """What is committed is on the medium from now on."""
    for pragma in _DURABLE:
        connection.execute(pragma)
    use_log(connection)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < VERSION:
        # An earlier release, which would not know the rows to come, is to refuse it from now on.
        connection.execute(f"PRAGMA user_version = {VERSION}")


def use_log(connection: sqlite3.Connection) -> None:
    """Makes it have a write-ahead log."""
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise DeviceError(f"the index's filesystem cannot hold a write-ahead log ({mode})")
