"""Every error that spdk_kv raises on purpose, and the one door from status codes to them."""

from __future__ import annotations

import errno
import os


class SpdkKvError(Exception):
    """Base of all errors of spdk_kv."""


class KeyNotFound(SpdkKvError, KeyError):
    """No blob or sequence of that name is stored."""

    def __str__(self) -> str:  # KeyError would show the repr of its argument
        return str(self.args[0]) if self.args else "key not found"


class ShapeMismatch(SpdkKvError, ValueError):
    """A tensor's shape, dtype or size does not fit; raised before any I/O."""


class CapacityError(SpdkKvError):
    """The store, the drive or the memory pool has no room for what was asked."""


class DeviceError(SpdkKvError):
    """The device failed a command.

    Attributes: ``op``, ``offset`` and ``nbytes`` of the command (None where there is no single
    one), and ``status``, an errno or the device's own status code.
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
    """A transfer outlived its deadline; its memory stays out of use until the device lets go."""


class DeviceGone(DeviceError):
    """The device was removed, or stopped answering for good."""


class CorruptionError(SpdkKvError):
    """Stored bytes are not the bytes that were put: a checksum or a count does not match."""


class StoreLocked(SpdkKvError):
    """Another process (or another store object of this one) owns the store.

    Attribute: ``pid`` of the owner, or None where it is not known.
    """

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StoreMismatch(SpdkKvError):
    """The data and the index, or the device and its superblock, do not belong together."""


class EngineUnavailable(SpdkKvError):
    """An engine cannot run here; the message says what is missing and what mends it."""


class ClosedError(SpdkKvError):
    """The store, sequence or engine was closed, or belongs to the process before a fork."""


_HINTS = {
    errno.ENOSPC: "the filesystem is full: free space or lower the store's capacity",
    errno.EIO: "the drive reported a failed read or write: look at `dmesg` and its SMART log",
    errno.EINVAL: "offset, length or address is not aligned as the device wants it",
    errno.ENOMEM: "not enough memory, or RLIMIT_MEMLOCK is too low: see `spdk-kv doctor`",
    errno.EROFS: "the filesystem is mounted read-only",
    errno.EACCES: "permission denied: see `spdk-kv doctor`",
    errno.EPERM: "not permitted here: see `spdk-kv doctor`",
}
_GONE = {errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN, errno.ENOTCONN}
# What the kernel makes of a drive's failed read of its medium; the rest may be better next time.
_UNREADABLE = {errno.EIO, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG}


def is_unreadable(failure: BaseException) -> bool:
    """Whether a read failed because the stored bytes are lost, damaged or cannot be read."""
    return isinstance(failure, CorruptionError) or (
        type(failure) is DeviceError and failure.status in _UNREADABLE
    )


def device_error(op: str, offset: int, nbytes: int, status: int, where: str = "") -> SpdkKvError:
    """The error for a command that ended with errno ``status`` (positive)."""
    name = errno.errorcode.get(status, str(status))
    place = f" of {where}" if where else ""
    message = (
        f"{op} of {nbytes} bytes at offset {offset}{place} failed: {name} ({os.strerror(status)})"
    )
    if status in _HINTS:
        message += f"; {_HINTS[status]}"
    if status in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(message)
    kind = DeviceError
    if status in _GONE:
        kind = DeviceGone
    elif status in (errno.ETIME, errno.ETIMEDOUT):
        kind = DeviceTimeout
    return kind(message, op=op, offset=offset, nbytes=nbytes, status=status)
