"""Room for the index on its filesystem: never so little that not even deletions could be committed.

A transaction goes into SQLite's log, which is copied into the file later. Where the file could not
grow for that, the log could not begin anew; it would grow until the filesystem is full, and then
nothing can be committed any more, deletions included. So a transaction that might come to that is
refused before it begins.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence

from spdk_kv.errors import CapacityError
from spdk_kv.index.records import Row
from spdk_kv.units import format_nbytes

# SQLite copies its log into the file, and begins it anew, from 1000 pages of 4 KiB on; a batch of
# deletions may come on top. This much stays for it, but of a small filesystem at most that share.
_LOG_NBYTES = 5 << 20
_LOG_SHARE = 8
# What a row changes of pages that are there already: in the table, in its index, in the old place.
_PAGES_OF_A_ROW = 3
# So few deletions are tried in any case.
LEAST_ROWS = 16


class IndexFull(CapacityError):
    """The filesystem of the index has no room for more records. Deletions can make some."""


def check_space(connection: sqlite3.Connection, path: str, rows: Sequence[Row]) -> None:
    """IndexFull if a transaction of ``rows`` could leave too little of the filesystem to copy it
    from the log into the file at ``path``, or, once the file has grown, for deletions."""
    try:
        space = os.statvfs(os.path.dirname(path) or ".")
    except OSError:  # SQLite will say what is wrong
        return
    if not space.f_blocks:  # in memory, say: it has no size
        return
    pages, page_nbytes, unused = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "page_size", "freelist_count")
    )
    new = _nbytes_in_file(rows)
    if not new and len(rows) <= LEAST_ROWS:
        return
    log_nbytes = new + min(_PAGES_OF_A_ROW * len(rows), pages) * page_nbytes
    # By what earlier transactions added, as far as that is in the log only, and by these rows.
    growth = pages * page_nbytes - file_nbytes(path) + max(0, new - unused * page_nbytes)
    free = space.f_bavail * space.f_frsize
    left = 0
    if new > unused * page_nbytes:
        left = min(_LOG_NBYTES, space.f_blocks * space.f_frsize // _LOG_SHARE) - file_nbytes(
            f"{path}-wal"
        )
    if log_nbytes + max(0, growth) + max(0, left) > free:
        raise IndexFull(
            f"index {path}: its filesystem is full: {format_nbytes(free)} are free, which "
            "deletions need: free space on it"
        )


def _nbytes_in_file(rows: Sequence[Row]) -> int:
    """About what the rows that put take up: the key twice, in pages that are two thirds full."""
    puts = [row for row in rows if row.record is not None]
    return sum(128 + 5 * len(row.key) // 2 + 3 * len(row.record or b"") // 2 for row in puts)


def file_nbytes(path: str) -> int:
    """Size of the file at ``path``; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
