"""Descriptors under the file engines: opening, growing, and what kind of node it is."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Any

from spdk_kv.engines.base import Engine, QueueOptions
from spdk_kv.errors import (
    CapacityError,
    ClosedError,
    EngineUnavailable,
    StoreLocked,
    device_error,
    file_error,
)
from spdk_kv.units import align_up, format_nbytes

# Alignment of direct I/O: a page, which every drive's logical block (512 or 4096 bytes) divides.
DIRECT_BLOCK_NBYTES = 4096
# The data file grows by this much, so that writes seldom wait for the filesystem.
_GROWTH_NBYTES = 256 << 20
# Growth leaves this much of the filesystem, for the index beside the data: where that cannot be
# written, not even room can be made, since a blob is only gone when the index says so.
_LEFT_NBYTES = 8 << 20
# What st_blocks counts, whatever the filesystem's own blocks are (stat(2)).
_SECTOR_NBYTES = 512
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
# statx(2): struct statx and its flags, which Python's os module does not have.
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_NBYTES = 256
_DIO_MEM_ALIGN_AT = 152


class FileEngine(Engine):
    """A regular file or a block device, through one descriptor.

    ``read_only``: it has to be there, nothing is written, and others may have it open, exclusively
    as well.
    """

    failed_flush_is_final = True
    exclusive = True
    """Whether a block device is opened exclusively (O_EXCL)."""

    def __init__(self, path: str, options: QueueOptions, read_only: bool = False) -> None:
        super().__init__(path, options)
        self.read_only = read_only
        self.fd = self._open_file(path)
        try:
            if self.direct:
                self.block_nbytes, self.align_nbytes = _direct_alignment(self.fd)
            self._is_block = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self._backend = self._open_backend()
            self._lone = self._open_lone()
            lone = None if self._lone is None else self._lone.backend
            self._start(self._backend.backend, (self._backend, self._lone), lone)
        except BaseException:
            # The next engine that is tried opens the drive too, and it is open exclusively here.
            self._close_files()
            raise

    def _open_file(self, path: str) -> int:
        """Opens what ``path`` names, or raises a typed error."""
        if self.read_only:
            return _open_to_read(path, self.direct, self.name)
        return _open(path, self.direct, self.name, self.exclusive)

    def _open_backend(self) -> Any:
        """The native side over ``fd``; EngineUnavailable where it cannot run here."""
        raise NotImplementedError

    def _open_lone(self) -> Any:
        """The native side for a queue's ``lone``, or None where any thread may use the first."""
        return None

    def _release(self) -> None:
        for backend in (self._backend, self._lone):
            if backend is not None:
                backend.close()
        self._close_files()

    def _close_files(self) -> None:
        with self._lock:
            # Within: an interrupt may come when the lock is given back, and nobody would close it.
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)

    @property
    def capacity_nbytes(self) -> int | None:
        if not self._is_block:
            return None
        packed = fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8))
        return int(struct.unpack("Q", packed)[0])

    @property
    def identity(self) -> str:
        if not self._is_block:
            return ""
        device = os.fstat(self.fd).st_rdev
        sysfs = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        for name in ("wwid", "device/serial", "device/wwid", "../device/serial", "../wwid"):
            try:
                found = (sysfs / name).read_text().strip()
            except OSError:
                continue
            if found:
                return found
        return ""

    @property
    def geometry(self) -> str:
        # A partition may be enlarged below its store; what is too small is refused by size.
        if not self._is_block:
            return ""
        packed = fcntl.ioctl(self.fd, _BLKSSZGET, bytes(4))
        return f"blocks of {struct.unpack('I', packed)[0]} bytes"

    def ensure(self, nbytes: int, limit_nbytes: int | None = None, index_nbytes: int = 0) -> None:
        if self._is_block:
            return
        size = os.fstat(self.fd).st_size
        if nbytes <= size:
            return
        # First a generous step, then exactly what is needed.
        last_error: OSError | None = None
        free_nbytes, left_nbytes = self._free_nbytes(), _LEFT_NBYTES + index_nbytes
        # The generous step at most takes half, so that the index beside the data can grow as well.
        for step_nbytes, share in ((_GROWTH_NBYTES, 2), (1 << 20, 1)):
            target = align_up(nbytes, step_nbytes)
            if limit_nbytes is not None:
                target = max(nbytes, min(target, limit_nbytes))
            if (target - size) * share > free_nbytes - left_nbytes:
                continue
            try:
                os.posix_fallocate(self.fd, size, target - size)
            except OSError as refused:
                if refused.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise device_error(
                        "allocation", size, target - size, refused.errno or 0, self.where
                    ) from refused
                os.ftruncate(self.fd, size)  # a failed fallocate may have grown it in part
                last_error = refused
            else:
                return
        raise CapacityError(
            f"no room for {self.where} to grow to {format_nbytes(nbytes)}: the filesystem has "
            f"{format_nbytes(free_nbytes)} free, of which {format_nbytes(left_nbytes)} are left "
            "for the index"
        ) from last_error

    def back(self, offset: int, nbytes: int, index_nbytes: int = 0) -> None:
        if self._is_block:
            return
        found = os.fstat(self.fd)
        # No more than the file lacks in all: what is said to be a hole may have its blocks.
        lacking = max(0, min(nbytes, found.st_size - found.st_blocks * _SECTOR_NBYTES))
        left_nbytes = _LEFT_NBYTES + index_nbytes
        refusal: OSError | None = None
        if not lacking or lacking <= self._free_nbytes() - left_nbytes:
            try:
                os.posix_fallocate(self.fd, offset, nbytes)
            except OSError as refused:
                if refused.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise device_error(
                        "allocation", offset, nbytes, refused.errno or 0, self.where
                    ) from refused
                refusal = refused
            else:
                return
        raise CapacityError(
            f"no room for {format_nbytes(lacking)} that {self.where} gave back to its filesystem, "
            f"which has {format_nbytes(self._free_nbytes())} free, of which "
            f"{format_nbytes(left_nbytes)} are left for the index"
        ) from refusal

    def shrink(self, nbytes: int) -> None:
        # Through a descriptor of its own: close() may come between, and its number be another's.
        with self._lock:
            if self.fd < 0:
                raise ClosedError(f"the {self.name} engine of {self.where} is closed")
            fd = os.dup(self.fd)
        try:
            if not self._is_block and os.fstat(fd).st_size > nbytes:
                os.ftruncate(fd, nbytes)
        except OSError as refused:
            raise device_error("truncation", nbytes, 0, refused.errno or 0, self.where) from refused
        finally:
            os.close(fd)

    @property
    def file_nbytes(self) -> int | None:
        return None if self._is_block else os.fstat(self.fd).st_size

    @property
    def stored_nbytes(self) -> int | None:
        return None if self._is_block else os.fstat(self.fd).st_blocks * _SECTOR_NBYTES

    def growable_to(self, index_nbytes: int = 0) -> int | None:
        if self._is_block:
            return None
        size = os.fstat(self.fd).st_size
        return size + max(0, self._free_nbytes() - _LEFT_NBYTES - index_nbytes)

    def _free_nbytes(self) -> int:
        """What the filesystem has free."""
        free = os.fstatvfs(self.fd)
        return free.f_bavail * free.f_frsize


def _direct_alignment(fd: int) -> tuple[int, int]:
    """The alignment of offsets and of addresses that direct I/O needs, in bytes.

    Linux 6.1 and newer report it (statx with STATX_DIOALIGN). An NVMe drive needs addresses aligned
    to 4 bytes only, so that no tensor has to be copied. Unknown counts as a page.
    """
    answer = ctypes.create_string_buffer(_STATX_NBYTES)
    statx = getattr(ctypes.CDLL(None), "statx", None)
    memory = offset = 0
    if statx is not None and statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) == 0:
        (mask,) = struct.unpack_from("=I", answer, 0)
        if mask & _STATX_DIOALIGN:
            memory, offset = struct.unpack_from("=II", answer, _DIO_MEM_ALIGN_AT)
    return max(DIRECT_BLOCK_NBYTES, offset), memory or DIRECT_BLOCK_NBYTES


def _open(path: str, direct: bool, name: str, exclusive: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    # A missing device node must not become a file in /dev; /dev/shm is for files.
    create = not path.startswith("/dev/") or path.startswith("/dev/shm/")
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            # Exclusive: the kernel refuses while the device is mounted, swapped on, or in use
            # by dm, md or another opener of this kind.
            flags |= os.O_EXCL if exclusive else 0
        create = False
    except FileNotFoundError:
        pass
    if create:
        flags |= os.O_CREAT
    try:
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)
        if create:
            os.fchmod(fd, 0o600)  # whatever the umask
    except OSError as refused:
        if direct and refused.errno == errno.EINVAL:
            raise _no_direct(path, name) from refused
        if refused.errno == errno.EBUSY:
            raise StoreLocked(
                f"{path} is in use (mounted, swapped on, or held by another program); see "
                f"`lsblk {path}` and `fuser -v {path}`"
            ) from refused
        raise file_error("open", path, refused) from refused
    return fd


def _open_to_read(path: str, direct: bool, name: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except OSError as refused:
        if direct and refused.errno == errno.EINVAL:
            raise _no_direct(path, name) from refused
        raise file_error("open", path, refused) from refused


def _no_direct(path: str, name: str) -> EngineUnavailable:
    return EngineUnavailable(
        f"{path}: this filesystem has no O_DIRECT, which the {name} engine needs; use the "
        "pagecache engine, or a folder on ext4 or XFS"
    )
