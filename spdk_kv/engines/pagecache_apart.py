"""A page cache for a drive that the kernel's does not reach: that of an unnamed file elsewhere."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from dataclasses import replace

from spdk_kv._native.transfer import DISCARD
from spdk_kv.engines.base import EngineOptions
from spdk_kv.engines.pagecache import BesidePageCacheEngine
from spdk_kv.errors import EngineUnavailable
from spdk_kv.units import format_nbytes

# f_type of filesystems that keep files in memory (linux/magic.h).
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
_STATFS_NBYTES = 256
_PATIENCE_S = 30.0
# What opening an unnamed file (O_TMPFILE) ends with where the filesystem or kernel has none.
_NO_UNNAMED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}


class ApartPageCacheEngine(BesidePageCacheEngine):
    """Buffered I/O on a sparse file in ``folder`` that has no name.

    It is as long as ``capacity_nbytes`` says, so that its offsets may be those of a drive of that
    size. Nobody else can open it, and with the process it is gone, whatever ends that.
    EngineUnavailable where ``folder`` will not do; see :func:`check_folder`.
    """

    def __init__(self, folder: str, capacity_nbytes: int, options: EngineOptions) -> None:
        self._file_nbytes = capacity_nbytes
        # Hugepages are left to the drive's own engine, which may need them.
        super().__init__(folder, replace(options, hugepages=False, queue_pairs=1))

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
        """Forgets a range: punches a hole, so that neither memory nor the disk below keeps it.

        Blocks for that. DeviceError; DeviceTimeout if it may still happen later.
        """
        transfer = self.transfer(DISCARD)
        transfer.add(offset, 0, nbytes)
        status = transfer.run(_PATIENCE_S)
        if status == errno.EOPNOTSUPP:
            super().drop(offset, nbytes)
        elif status:
            raise self.error(transfer)


def check_folder(folder: str) -> None:
    """EngineUnavailable unless a page cache can be kept in ``folder``."""
    os.close(_open_unnamed(folder))


def _open_unnamed(folder: str) -> int:
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise EngineUnavailable(f"page_cache_dir is a folder, which {folder} is not")
        fd = _create(folder)
    except FileNotFoundError as missing:
        raise EngineUnavailable(
            f"page_cache_dir {folder} does not exist: mkdir it, on a drive with room for what the "
            "page cache is to hold"
        ) from missing
    except OSError as refused:
        raise EngineUnavailable(
            f"no file can be made in page_cache_dir {folder} ({refused.strerror}): use a folder "
            "that this user may write to"
        ) from refused
    kind = _in_memory(fd)
    if kind is not None:
        os.close(fd)
        raise EngineUnavailable(
            f"page_cache_dir {folder} is on {kind}, whose files are memory that the kernel cannot "
            "take back, and no page cache: use a folder on a drive"
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
    """The name of the filesystem, if it is one that has no drive below."""
    answer = ctypes.create_string_buffer(_STATFS_NBYTES)
    if ctypes.CDLL(None).fstatfs(fd, answer):
        return None
    kind = ctypes.c_long.from_buffer(answer).value
    return _IN_MEMORY.get(kind & 0xFFFFFFFF)
