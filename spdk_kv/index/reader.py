"""Reads an index that another process may be writing, without a lock and without a trace.

SQLite's own readers take locks in shared memory, which they have to make where it is missing, and
keep the writer from emptying its log and from removing it in the end. They cannot work where the
folder is read-only. A reader of a store needs a whole state only now and then: so it copies the
file and its log, and shows that what it copied is of one state.

Why that is shown: SQLite changes pages of the file only when it copies them from its log, committed
ones, and while they are in the log they stay there. Before it writes its log anew it gives it
another salt. So if the log had the same header before the file was read and after the log was, all
pages of the file that were written meanwhile are in the log as it was read, and pages in the log
replace those of the file. Where there is no log, or an empty one, everything is in the file, and
whoever changed that meanwhile had to commit: then the count of commits beside the index is another.
"""

from __future__ import annotations

import os
import stat
import time

from spdk_kv.errors import (
    CorruptionError,
    DeviceGone,
    DeviceTimeout,
    SpdkKvError,
    StoreMismatch,
    device_error,
    file_error,
)
from spdk_kv.index import descriptors
from spdk_kv.index.commits import counted_by, read_commit_count
from spdk_kv.index.creation import count_path
from spdk_kv.index.log import HEADER_NBYTES, apply_log, has_header
from spdk_kv.index.snapshot import IndexSnapshot

# A copy takes milliseconds, and SQLite begins its log anew after 1000 pages at the earliest: a few
# attempts in a row are enough, unless somebody opens and closes the store all the time.
_ATTEMPTS = 100
_PAUSE_S = 0.002


class _Amid(Exception):
    """The count of commits was read while it was written."""


class IndexReader:
    """Takes snapshots of the index at ``path``. Thread-safe but for :meth:`close`; writes nothing.

    Raises StoreMismatch where there is no index, DeviceError where it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._uuid = ""
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreMismatch(f"there is no index {path}") from None
        except OSError as refused:
            raise file_error("open", path, refused) from refused
        found = os.fstat(self._file)
        self._identity = (found.st_dev, found.st_ino)

    def take(self) -> IndexSnapshot:
        """The index after its last commit. Blocks on its disk.

        Raises CorruptionError where it is damaged or lost commits, StoreMismatch where a newer
        version wrote it, DeviceGone where it was removed or replaced, DeviceTimeout where it is
        written faster than it can be read, DeviceError.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S)
            self.check_place()
            copied = self._copy()
            if copied is None:
                continue
            image, count = copied
            snapshot = IndexSnapshot(self.path, image, trusted=bool(self._uuid))
            try:
                self._check(snapshot, count)
            except _Amid:
                snapshot.close()
                continue
            except BaseException:
                snapshot.close()
                raise
            self._uuid = snapshot.uuid
            return snapshot
        raise DeviceTimeout(
            f"index {self.path} was written anew during each of {_ATTEMPTS} attempts to read it",
            op="read",
        )

    def _check(self, snapshot: IndexSnapshot, count: bytes | None) -> None:
        """That ``snapshot`` is not older than the ``count`` of commits that was read before."""
        if self._uuid and snapshot.uuid != self._uuid:
            raise DeviceGone(f"{self.path} is another store's now", op="read")
        path = count_path(self.path)
        try:
            counted = counted_by(count, path, snapshot.uuid)
        except CorruptionError as damaged:
            if count != read_commit_count(path):
                raise _Amid from damaged
            raise
        if snapshot.commits < counted:
            raise CorruptionError(
                f"index {self.path}: it lost {counted - snapshot.commits} commits: it counts "
                f"{snapshot.commits}, {path} {counted}. Its log is damaged or gone, or it is an "
                "old copy"
            )

    def has_news(self, commits: int) -> bool:
        """Whether more than ``commits`` were made by now. Reads 100 bytes.

        Raises DeviceGone where the index was removed or replaced, DeviceError.
        """
        self.check_place()
        path = count_path(self.path)
        try:
            return counted_by(read_commit_count(path), path, self._uuid) > commits
        except CorruptionError:
            return True  # read amid a write, or damaged: take() finds that out

    def check_place(self) -> None:
        """DeviceGone unless the index is where it was."""
        try:
            found = os.stat(self.path)
            what = "was replaced"
        except FileNotFoundError:
            found, what = None, "was removed or renamed"
        except OSError as refused:
            raise file_error("read", self.path, refused) from refused
        if found is None or (found.st_dev, found.st_ino) != self._identity:
            raise DeviceGone(
                f"{self.path} {what} while it was open to be read: close this store, and open it "
                "again where it is now",
                op="read",
            )

    def close(self) -> None:
        """May be called twice."""
        file, self._file = self._file, -1
        if file >= 0:
            descriptors.close(file)

    # -- copies ---------------------------------------------------------------------------------

    def _copy(self) -> tuple[bytearray, bytes | None] | None:
        """The file with what its log has, and the count of commits, which was read before. None
        where file and log did not stay of one state meanwhile."""
        before, header = self._mark(), self._read_log(HEADER_NBYTES)
        image = _read_all(self._file, self.path)
        log = self._read_log()
        after, later = self._mark(), self._read_log(HEADER_NBYTES)
        if not header == log[:HEADER_NBYTES] == later:
            return None
        if before != after and not has_header(header):
            return None
        apply_log(image, log)
        return image, before[-1]

    def _mark(self) -> tuple[int, int, bytes | None]:
        """What changes with every commit, and with whatever is copied into the file."""
        found = os.fstat(self._file)
        count = read_commit_count(count_path(self.path))
        return (found.st_size, found.st_mtime_ns, count)

    def _read_log(self, nbytes: int | None = None) -> bytes:
        """The log, or its first bytes; nothing where there is none."""
        path = f"{self.path}-wal"
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        except OSError as refused:
            raise file_error("open", path, refused) from refused
        try:
            if nbytes is None:
                return bytes(_read_all(file, path))
            return os.pread(file, nbytes, 0)
        except OSError as refused:
            raise device_error("read", 0, 0, refused.errno or 0, path) from refused
        finally:
            os.close(file)


def _read_all(file: int, path: str) -> bytearray:
    """All bytes of an open file, which may grow or shrink meanwhile."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise StoreMismatch(f"{path} is not a file")
    image = bytearray(found.st_size)
    at = 0
    try:
        while at < len(image):
            count = os.preadv(file, [memoryview(image)[at:]], at)
            if not count:
                break
            at += count
    except OSError as refused:
        failure: SpdkKvError = device_error("read", at, 0, refused.errno or 0, path)
        raise failure from refused
    return image[:at]
