"""Every error that spdk_kv raises, when it is raised, and what to do about it.

:func:`device_error` turns the errno of a drive's command into one of them, :func:`file_error` that
of a call for a file or folder.
"""

from __future__ import annotations

import errno
import os
from typing import Any


class SpdkKvError(Exception):
    """The base of all errors of spdk_kv; catch it to catch them all."""


class KeyNotFound(SpdkKvError, KeyError):
    """No blob or sequence of that name is stored.

    Raised where something is to be read or deleted, also if it was evicted meanwhile. Remedy: treat
    it as a cache miss, and compute and store the data again.
    """

    def __str__(self) -> str:  # KeyError would show the repr of its argument
        return str(self.args[0]) if self.args else "key not found"


class ShapeMismatch(SpdkKvError, ValueError):
    """A tensor's shape, dtype or size does not fit.

    Raised before any I/O, so nothing was changed. Remedy: pass what the message says is expected.
    """


class CapacityError(SpdkKvError):
    """The store, the drive or the memory pool has no room for what was asked.

    Nothing is evicted for a request that cannot be met even then. Remedy: delete sequences or
    blobs, free space on the filesystem, or open the store with a larger ``capacity`` or
    ``staging``.
    """


class WriteBudgetSpent(CapacityError):
    """The store's ``write_budget`` has nothing left just now.

    Nothing was written or evicted. Remedy: treat it as a full cache, try again later, or open the
    store with a larger ``write_budget``.
    """


class DeviceError(SpdkKvError):
    """The drive, or the kernel on its behalf, failed a command.

    Remedy: the message has a hint where there is one; `dmesg` and the drive's SMART log say more.
    Reads that failed because of damaged media will fail again; store the data anew.

    Attributes:
        op: "read", "write" and the like; None where there is no single command, as for the others.
        offset: byte offset of the command.
        nbytes: its length in bytes.
        status: an errno, or the drive's own status code.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        offset: int | None = None,
        nbytes: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.op = op
        self.offset = offset
        self.nbytes = nbytes
        self.status = status


class DeviceTimeout(DeviceError, TimeoutError):
    """A transfer outlived its deadline.

    Its memory stays in quarantine until the drive lets go of it. Remedy: try again, or pass a
    longer ``timeout_s``; if it recurs, the drive hangs or is overloaded.
    """


class DeviceGone(DeviceError):
    """The drive was removed, or stopped answering for good.

    Remedy: close the store, bring the drive back, and open the store again.
    """


class CorruptionError(SpdkKvError):
    """Stored bytes are not the bytes that were put: a checksum or a count does not match.

    Raised instead of returning other bytes. Remedy: delete the blob or sequence, and store it
    again; if it recurs, suspect the drive or the memory.
    """


class NameInUse(SpdkKvError):
    """Something else has the name, or uses it just now.

    Nothing was changed. Remedy: take another name, or delete or close what has it.
    """


class StoreLocked(SpdkKvError):
    """Another process, or another store object of this process, has the store or drive open.

    Remedy: close it there, or end that process.

    Attributes:
        pid: process ID of the owner, or None where it is not known.
    """

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class ReadOnlyStore(SpdkKvError):
    """A change was asked of a store that is open to be read only.

    Raised before anything is changed. Remedy: make the change in the process that has the store
    open to write, or open it here without ``read_only=True`` once that one has closed it.
    """


class StoreMismatch(SpdkKvError):
    """What was found is not the store that was asked for.

    Raised when the data and the index, or the drive and its superblock, do not belong together,
    where a store is missing that must exist, and where a named cache is another model's. Nothing is
    overwritten. Remedy: check the location and ``index_dir``; to give up what is there, remove the
    index and clear the drive's superblocks.
    """


class EngineUnavailable(SpdkKvError):
    """An engine cannot run here.

    Remedy: the message says what is missing, and the command that adds it; `spdk-kv doctor` shows
    all engines at once.
    """


class ClosedError(SpdkKvError):
    """The store, sequence or engine was closed, or was opened before a fork.

    Remedy: open it again; a child process opens its own.
    """


_HINTS = {
    errno.ENOSPC: "the filesystem is full: free space or lower the store's capacity",
    errno.EIO: "the drive reported a failed read or write: look at `dmesg` and its SMART log",
    errno.EINVAL: "offset, length or address is not aligned as the drive requires",
    errno.ENOMEM: "not enough memory, or RLIMIT_MEMLOCK is too low: see `spdk-kv doctor`",
    errno.EROFS: "the filesystem is mounted read-only",
    errno.EACCES: "permission denied: see `spdk-kv doctor`",
    errno.EPERM: "not permitted here: see `spdk-kv doctor`",
}
_GONE = {errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.ENOTCONN}
# Errors that say that the stored bytes cannot be read; after any other a second try may succeed.
_UNREADABLE = {errno.EIO, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG}


def is_unreadable(failure: BaseException) -> bool:
    """Whether a read failed because the stored bytes are lost, damaged or unreadable."""
    return isinstance(failure, CorruptionError) or (
        type(failure) is DeviceError and failure.status in _UNREADABLE
    )


def device_error(op: str, offset: int, nbytes: int, status: int, where: str = "") -> SpdkKvError:
    """The error for a command that failed.

    Args:
        op: what was done, for the message: "read", "open" ...
        offset: byte offset of the command.
        nbytes: its length in bytes.
        status: a positive errno.
        where: name of the drive or file.

    Returns:
        The error, to be raised: CapacityError, DeviceGone, DeviceTimeout or DeviceError.
    """
    name = errno.errorcode.get(status, str(status))
    place = f" of {where}" if where else ""
    # A flush has no range, and "0 bytes at offset 0" would be read as one.
    span = f" of {nbytes} bytes at offset {offset}" if nbytes else ""
    message = f"{op}{span}{place} failed: {name} ({os.strerror(status)})"
    if status in _HINTS:
        message += f"; {_HINTS[status]}"
    return _typed(message, status, op=op, offset=offset, nbytes=nbytes)


def file_error(what: str, path: str, refused: OSError) -> SpdkKvError:
    """The error for a file, folder or device node that the system refuses.

    Args:
        what: what was tried, for the message: "open", "create", "lock" ...
        path: the file's name.
        refused: the system's answer.

    Returns:
        The error, to be raised: CapacityError, DeviceGone, DeviceTimeout or DeviceError.
    """
    status = refused.errno or 0
    name = errno.errorcode.get(status, str(status))
    hint = _missing(path) if status == errno.ENOENT else _FILE_HINTS.get(status, "")
    if status in (errno.ENOTDIR, errno.EEXIST):
        hint = _not_a_folder(path)
    message = f"cannot {what} {path}: {os.strerror(status)} ({name})"
    return _typed(f"{message}; {hint}" if hint else message, status, op=what)


def no_descriptors(status: int | None) -> str:
    """What to do where no file can be opened any more; empty for any other errno."""
    return _FILE_HINTS[status] if status in (errno.EMFILE, errno.ENFILE) else ""


_FILE_HINTS = {
    errno.EACCES: "this user may not: `namei -l` shows which folder or file on the way refuses",
    errno.EPERM: "not permitted here: see `spdk-kv doctor`, and `lsattr` for files made immutable",
    errno.EROFS: "its filesystem is mounted read-only: remount it, or choose another folder",
    errno.ENOSPC: "its filesystem is full: free space there (`df -h`; `df -i` counts its inodes)",
    errno.EDQUOT: "this user's quota there is used up: free space, or have it raised",
    errno.EMFILE: "this process has too many files open: raise its limit (`ulimit -n`, or "
    "LimitNOFILE= of a service), or close some",
    errno.ENFILE: "the machine has too many files open: raise the sysctl fs.file-max",
    errno.ENOMEM: "not enough memory: see `spdk-kv doctor`",
    errno.ENAMETOOLONG: "the name is longer than its filesystem takes: choose a shorter one",
    errno.ELOOP: "its symbolic links lead in a circle: remove one of them",
    errno.EISDIR: "it is a folder, where a file belongs: choose another place",
    errno.EINVAL: "its filesystem takes no such name or file: choose another folder",
    errno.ENOLCK: "its filesystem has no file locks: choose a folder on a local drive",
    errno.EOPNOTSUPP: "its filesystem cannot do that: choose a folder on a local drive",
    errno.ESTALE: "the file server no longer knows it: mount its filesystem anew",
    errno.EIO: "the drive reported an error: look at `dmesg` and its SMART log",
    errno.ENXIO: "no drive is behind it any more: bring it back",
    errno.ENODEV: "no drive is behind it any more: bring it back",
}


def _missing(path: str) -> str:
    """Which part of ``path`` does not exist, and what helps."""
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):
        return "there is no such device node; `lsblk` lists the disks, `ls /dev/ng*` generic nodes"
    while (above := os.path.dirname(path)) not in ("", path) and not os.path.exists(above):
        path = above
    if os.path.islink(path):
        return f"{path} is a symbolic link to {os.readlink(path)}, which does not exist"
    return f"there is no {path}: create it, or mount the drive that it belongs on"


def _not_a_folder(path: str) -> str:
    while not os.path.lexists(path) and os.path.dirname(path) not in ("", path):
        path = os.path.dirname(path)
    return f"{path} is not a folder: choose another place, or move it away"


def _typed(message: str, status: int, **command: Any) -> SpdkKvError:
    if status in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(message)
    kind = DeviceError
    if status in _GONE:
        kind = DeviceGone
    elif status in (errno.ETIME, errno.ETIMEDOUT):
        kind = DeviceTimeout
    return kind(message, status=status, **command)
