"""The page cache of an unnamed file, for copies of what lies on a drive that has no page cache."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from dataclasses import replace

from spdk_kv._native.transfer import DISCARD
from spdk_kv.engines.base import QueueOptions
from spdk_kv.engines.pagecache.shared import SharedPageCacheEngine
from spdk_kv.errors import EngineUnavailable
from spdk_kv.units import format_nbytes

# f_type of filesystems whose files lie in memory (statfs(2), linux/magic.h).
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
# More than struct statfs has on any architecture; f_type comes first.
_STATFS_NBYTES = 256
# A hole is punched in milliseconds; the default of Engine.close for a drive that hangs.
_DROP_TIMEOUT_S = 30.0
# What open(O_TMPFILE) fails with where the filesystem or the kernel lacks it (open(2)).
_NO_UNNAMED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}


class CopyPageCacheEngine(SharedPageCacheEngine):
    """Buffered I/O on a sparse, unnamed file in a folder (``page_cache_dir``).

    Nobody else can open the file, and it is gone when the process ends, however it ends.

    Args:
        folder: Where the file is made.
        capacity_nbytes: Length of the file: the size of the drive, so that both use the same
            offsets.
        options: Of the drive's engine.

    Raises:
        EngineUnavailable: ``folder`` cannot be used; see :func:`check_page_cache_dir`.
    """

    def __init__(self, folder: str, capacity_nbytes: int, options: QueueOptions) -> None:
        self._file_nbytes = capacity_nbytes
        super().__init__(folder, replace(options, queue_pairs=1))

    def _open_file(self, path: str) -> int:
        fd = _open_unnamed(path)
        try:
            os.ftruncate(fd, self._file_nbytes)
        except OSError as refused:
            os.close(fd)
            raise EngineUnavailable(
                f"{path} takes no sparse file of {format_nbytes(self._file_nbytes)}, the size of "
                f"the drive ({refused.strerror}); use a folder on XFS or ext4"
            ) from refused
        return fd

    def drop(self, offset: int, nbytes: int) -> None:
        """Punches a hole: neither memory nor the drive below keeps the range. Blocks until then.

        Raises:
            DeviceTimeout: It was not done in time, and may still happen later.
            DeviceError: The filesystem failed.
        """
        transfer = self.transfer(DISCARD)
        transfer.add(offset, 0, nbytes)
        status = transfer.run(_DROP_TIMEOUT_S)
        if status == errno.EOPNOTSUPP:
            super().drop(offset, nbytes)
        elif status:
            raise self.error(transfer)


def check_page_cache_dir(folder: str) -> None:
    """Checks that ``folder`` can hold copies.

    Raises:
        EngineUnavailable: It is missing, no folder, not writable, or on a filesystem in memory.
    """
    os.close(_open_unnamed(folder))


def _open_unnamed(folder: str) -> int:
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise EngineUnavailable(f"the page cache's folder has to be a folder; {folder} is none")
        fd = _create(folder)
    except FileNotFoundError as missing:
        raise EngineUnavailable(
            f"the page cache's folder {folder} does not exist: make it, on a drive with room for "
            "what the page cache will hold"
        ) from missing
    except OSError as refused:
        raise EngineUnavailable(
            f"no file can be made in the page cache's folder {folder} ({refused.strerror}): use "
            "one that this user may write to"
        ) from refused
    kind = _in_memory(fd)
    if kind is not None:
        os.close(fd)
        raise EngineUnavailable(
            f"the page cache's folder {folder} is on {kind}, whose files are memory that the "
            "kernel cannot take back, and no page cache: use a folder on a drive"
        )
    return fd


def _create(folder: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
    except OSError as refused:
        if refused.errno not in _NO_UNNAMED:
            raise
    name = os.path.join(folder, f".spdk_kv-{secrets.token_hex(8)}")
    fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    os.unlink(name)
    return fd


def _in_memory(fd: int) -> str | None:
    """The name of the filesystem if its files lie in memory, or None."""
    answer = ctypes.create_string_buffer(_STATFS_NBYTES)
    if ctypes.CDLL(None).fstatfs(fd, answer):
        return None
    kind = ctypes.c_long.from_buffer(answer).value
    return _IN_MEMORY.get(kind & 0xFFFFFFFF)
