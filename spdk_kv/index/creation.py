"""A new index, with its count of commits."""

from __future__ import annotations

import os
import sqlite3
import uuid
from contextlib import closing

from spdk_kv.errors import CorruptionError, file_error
from spdk_kv.index.checks import SCHEMA, VERSION, write_meta
from spdk_kv.index.commits import create_commit_count
from spdk_kv.index.connection import typed_errors, use_log


def create_index(path: str) -> None:
    """Creates an empty index at ``path``. Interrupted at any moment, it is whole or not there."""
    new = f"{path}.new"
    try:
        if os.path.exists(f"{path}-wal"):
            # SQLite would replay the log of the lost index into the new one.
            raise CorruptionError(f"index {path} is gone, but its log {path}-wal is not")
        for leftover in (new, f"{new}-journal", f"{new}-wal", f"{new}-shm"):
            if os.path.exists(leftover):
                os.unlink(leftover)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        # Whatever the umask. SQLite gives its log and shared memory the mode of this file.
        os.chmod(new, 0o600)
        identity = uuid.uuid4().hex
        with typed_errors(path, new), closing(sqlite3.connect(new, isolation_level=None)) as fresh:
            fresh.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                fresh.execute(statement)
            write_meta(fresh, "uuid", identity)
            write_meta(fresh, "generation", "0")
            write_meta(fresh, "commits", "0")
            fresh.execute(f"PRAGMA user_version = {VERSION}")
            fresh.execute("COMMIT")
            # Not left to the first open: a kill in the middle would leave a rollback journal, which
            # a read-only fresh cannot play back.
            use_log(fresh)
        create_commit_count(count_path(path), identity)
        _sync_folder(path)  # no index without its count, even after a power cut
        os.rename(new, path)
        _sync_folder(path)
    except OSError as error:
        raise file_error("create", path, error) from error


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def count_path(path: str) -> str:
    """The file with the count of commits of the index at ``path``."""
    return f"{path}-commits"
