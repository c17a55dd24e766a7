"""How many commits an index has made, counted beside it, so that an older state is noticed.

SQLite silently ends its log at the first frame whose checksum fails. A flipped bit there brings
back an earlier state, in which a key names bytes that were overwritten or deleted since. A lost
log and an older copy of the index do the same. Therefore every transaction counts itself inside
the index, and the count is also written here once the transaction is on the medium.

The count itself is not flushed. It is written after its commit is on the medium, so it is never
ahead of the index. After a kill it is behind by one commit at most. After a power cut it is behind
by what the kernel had not yet written, and a flipped bit among exactly those commits goes
unnoticed: two faults at once.

A file that is missing, or has no good copy, is refused, because an older index would look the same.
No single fault causes that: the file is flushed before its index exists, and the copies are in
different pages, so that neither a flipped bit nor a bad sector takes both.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib

from spdk_kv.errors import CorruptionError, device_error, file_error

log = logging.getLogger(__name__)

_COPY_OFFSETS = (0, 4096)
_COUNT = struct.Struct("<32sQ")  # the index's uuid, commits; then the checksum of both
_CRC = struct.Struct("<I")
_COPY_NBYTES = _COUNT.size + _CRC.size


class CommitCount:
    """The count in the file at ``path`` for the index ``uuid``, which itself counts ``commits``.

    CorruptionError where the index counts fewer than the file, or the file has no good count.
    DeviceError where it cannot be read. Not thread-safe.
    """

    def __init__(self, path: str, uuid: str, commits: int) -> None:
        self.path = path
        self._uuid = uuid
        try:
            self._file = io.FileIO(path, "r+")
        except FileNotFoundError:
            raise CorruptionError(f"{path} is missing; {_UNKNOWN}") from None
        except OSError as error:
            raise file_error("open", path, error) from error
        # The count is not brought up to date here: the last commit of a killed process may not be
        # on the medium yet, and this file must not get there first. The next commit flushes both.
        try:
            try:
                content = self._file.read()
            except OSError as error:
                raise device_error("read", 0, 0, error.errno or 0, path) from error
            counted = counted_by(content, path, uuid)
            if commits < counted:
                raise CorruptionError(
                    f"the index lost {counted - commits} commits: it counts {commits}, {path} "
                    f"{counted}. Its log is damaged or gone, or it is an old copy"
                )
        except BaseException:
            self._file.close()
            raise

    def write(self, commits: int) -> None:
        """Records that the index made ``commits``, the last of which is on the medium."""
        copy = _pack(self._uuid, commits)
        try:
            for offset in _COPY_OFFSETS:
                os.pwrite(self._file.fileno(), copy, offset)
        except OSError as error:
            # The commit stands, so this is not its error. The next one writes the count again.
            log.warning("%s stays behind its index: %s", self.path, error)

    def close(self) -> None:
        self._file.close()


_UNKNOWN = (
    "so nothing shows whether the index is the latest. Put the file back, or remove the store to "
    "start empty"
)


def read_commit_count(path: str) -> bytes | None:
    """What the file at ``path`` says, for :func:`counted_by`; None where it is missing."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise file_error("open", path, error) from error
    try:
        return os.pread(file, _COPY_OFFSETS[-1] + _COPY_NBYTES, 0)
    except OSError as error:
        raise device_error("read", 0, 0, error.errno or 0, path) from error
    finally:
        os.close(file)


def counted_by(content: bytes | None, path: str, uuid: str) -> int:
    """How many commits ``content``, the bytes of the file at ``path``, gives the index ``uuid``.
    CorruptionError where it has no good count; both may also have been read amid a write."""
    if content is None:
        raise CorruptionError(f"{path} is missing; {_UNKNOWN}")
    counts = []
    for offset in _COPY_OFFSETS:
        copy = content[offset : offset + _COPY_NBYTES]
        if len(copy) == _COPY_NBYTES:
            commits = int(_COUNT.unpack_from(copy)[1])
            if copy == _pack(uuid, commits):
                counts.append(commits)
    if not counts:
        raise CorruptionError(f"{path} is damaged, or of another index; {_UNKNOWN}")
    return max(counts)  # a kill between the two writes leaves one behind


def create_commit_count(path: str, uuid: str) -> None:
    """Creates a count of 0 for the new index ``uuid``, on the medium except for its folder."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(file, 0o600)  # whatever the umask
        for offset in _COPY_OFFSETS:
            os.pwrite(file, _pack(uuid, 0), offset)
        os.fsync(file)
    finally:
        os.close(file)


def _pack(uuid: str, commits: int) -> bytes:
    fields = _COUNT.pack(uuid.encode(), commits)
    return fields + _CRC.pack(zlib.crc32(fields))
