"""All blobs of an index in one file, so that a store of millions opens without reading each row.

It is written when a store is closed, and says the same as the rows, and in which order blobs were
used, and which of them since they were put. Each transaction that changes rows of blobs appends
them (`changes.py`), as long as they are not many. It is never needed: what is damaged, incomplete
or of another state of the index is passed by, and the rows are read. So it is not flushed either.

That it is of this very state the index says itself: its last transaction notes the number that was
drawn for the file, how much of it counts and the checksum of that, and how many commits the index
had made. Whoever changes rows of blobs otherwise, as an older program does, leaves the note as it
is, so that the count of commits does not fit any more.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, NamedTuple

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.table import BlobTable, kinds_of, packed, unpack_into
from spdk_kv.index.changes import apply_changes

Kind = tuple[int, str, tuple[int, ...]]

log = logging.getLogger(__name__)

SUMMARY = "summary"
"""The name in the index of the :class:`Note`."""

LEAST_BLOBS = 1
"""Of fewer there is nothing to say. Rows of a few thousand are read as fast, but do not tell which
blobs were used since they were put."""

# A section is the length and the checksum of what follows. Each checksum continues that of the one
# before, so that the sections are of one file, and in order.
_HEAD = struct.Struct("<II")
_SECTION_NBYTES = 1 << 20
_MOST_NBYTES = 1 << 31
_FORMAT = 1
# Changes may take as much as the blobs do that they are changes of, or this much: they take longer
# to read, and none of their room comes back before the store is closed.
_LEAST_CHANGES_NBYTES = 1 << 20
# What stays free on the filesystem: the index itself needs it more.
_LEFT_NBYTES = 64 << 20


class Note(NamedTuple):
    """What an index says of its summary."""

    number: str
    """That was drawn for the file."""
    nbytes: int
    """Of the file that count. What follows is of a transaction that did not come to an end."""
    crc: int
    """Of these bytes."""
    left_nbytes: int
    """That changes may still take."""

    def __str__(self) -> str:
        return f"{self.number} {self.nbytes} {self.crc} {self.left_nbytes}"

    @classmethod
    def parse(cls, text: str) -> Note | None:
        """None for what is no note, or that of an earlier version, which said less."""
        number, *rest = text.split(" ")
        if len(rest) != 3 or not all(each.isdecimal() for each in rest):
            return None
        return cls(number, *map(int, rest))


def summary_path(path: str) -> str:
    """The file with the summary of the index at ``path``."""
    return f"{path}-blobs"


def write_summary(path: str, identity: str, blobs: BlobTable[Any], changes: int) -> Note | None:
    """Writes the summary of ``blobs`` for the index ``identity`` at ``path``. Returns what the
    index is to note, or None where there are few, or no room for it. OSError; RuntimeError where
    they are not as they were after so many ``changes``.

    Interrupted at any moment, the file is whole, or not there, or the one before.
    """
    if len(blobs) < LEAST_BLOBS:
        with suppress(FileNotFoundError):
            os.unlink(summary_path(path))
        return None
    number = uuid.uuid4().hex
    new = f"{summary_path(path)}.new"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(file, "wb", buffering=0) as out:
            os.fchmod(file, 0o600)  # whatever the umask
            crc = nbytes = 0
            for section in _sections(identity, number, blobs, changes):
                if not has_room(file, len(section)):
                    log.info("%s: no room for a summary; the next open takes longer", path)
                    os.unlink(new)
                    return None
                head, crc = section_head(section, crc)
                nbytes += len(head) + len(section)
                for part in (head, section):
                    _write_all(out, part)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    os.rename(new, summary_path(path))
    return Note(number, nbytes, crc, max(_LEAST_CHANGES_NBYTES, nbytes))


def section_head(section: bytes, crc: int) -> tuple[bytes, int]:
    """What goes before a section, after sections whose checksum is ``crc``; theirs with it."""
    crc = crc32c(section, crc)
    return _HEAD.pack(len(section), crc), crc


def _sections(identity: str, number: str, blobs: BlobTable[Any], changes: int) -> Iterator[bytes]:
    header = {
        "format": _FORMAT,
        "index": identity,
        "number": number,
        "blobs": len(blobs),
        "kinds": kinds_of(blobs),
    }
    yield json.dumps(header).encode()
    yield from packed(blobs, _SECTION_NBYTES, changes)


def has_room(file: int, nbytes: int) -> bool:
    """Whether the filesystem has room for so many bytes more, and what the index needs."""
    space = os.fstatvfs(file)
    return not space.f_blocks or space.f_bavail * space.f_frsize > nbytes + _LEFT_NBYTES


def _write_all(out: IO[bytes], part: bytes) -> None:
    left = memoryview(part)
    while left:
        left = left[out.write(left) :]


def read_summary(path: str, identity: str, note: Note, blobs: BlobTable[Any]) -> bool:
    """Adds the blobs of the summary that ``note`` is of to ``blobs``, which has none. False where
    there is no such summary, or it is damaged: ``blobs`` is of no use then."""
    try:
        with open(summary_path(path), "rb", buffering=0) as file:
            return _read(file, identity, note, blobs)
    except FileNotFoundError:
        return False
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        OverflowError,
        struct.error,
    ) as error:
        log.warning("the summary of %s is damaged, so its rows are read: %s", path, error)
        return False


def has_summary(path: str, note: Note) -> bool:
    """Whether the file at its place begins and ends as :func:`read_summary` wants it."""
    try:
        with open(summary_path(path), "rb", buffering=0) as file:
            is_long = os.fstat(file.fileno()).st_size >= note.nbytes
            return is_long and bool(_header(file)[0]["number"] == note.number)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(file: IO[bytes], identity: str, note: Note, blobs: BlobTable[Any]) -> bool:
    header, crc = _header(file)
    if (
        header["format"] != _FORMAT
        or header["index"] != identity
        or header["number"] != note.number
    ):
        return False
    kinds = [_kind(each) for each in header["kinds"]]
    count = int(header["blobs"])
    if not 0 <= count <= os.fstat(file.fileno()).st_size:
        raise ValueError(f"it cannot have {count} blobs")
    blobs.expect(count)
    while len(blobs) < count:
        section, crc = _section(file, crc)
        unpack_into(blobs, section, kinds)
    if len(blobs) != count:
        raise ValueError(f"it has not {count} blobs")
    while file.tell() < note.nbytes:
        section, crc = _section(file, crc)
        apply_changes(blobs, section)
    if file.tell() != note.nbytes or crc != note.crc:
        raise ValueError("it is of another state")
    return True


def open_summary(path: str) -> int:
    """The file of the summary of the index at ``path``, for :func:`append_changes`. OSError."""
    return os.open(summary_path(path), os.O_WRONLY | os.O_CLOEXEC)


def append_changes(file: int, note: Note, changes: bytes) -> Note | None:
    """Appends ``changes`` (:func:`pack_changes`) to the summary in ``file``; what the index is to
    note of it then. None where it may not grow as much. OSError."""
    head, crc = section_head(changes, note.crc)
    nbytes = len(head) + len(changes)
    if nbytes > note.left_nbytes or not has_room(file, nbytes):
        return None
    left = memoryview(head + changes)
    at = note.nbytes
    while left:
        count = os.pwrite(file, left, at)
        left, at = left[count:], at + count
    return Note(note.number, at, crc, note.left_nbytes - nbytes)


def _header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    section, crc = _section(file, 0)
    header = json.loads(section)
    if not isinstance(header, dict):
        raise ValueError("it has no header")
    return header, crc


def _section(file: IO[bytes], crc: int) -> tuple[bytearray, int]:
    head = _read_all(file, _HEAD.size)
    nbytes, expected = _HEAD.unpack(head)
    if nbytes > _MOST_NBYTES or nbytes > os.fstat(file.fileno()).st_size:
        raise ValueError("a section is too long")
    section = _read_all(file, nbytes)
    crc = crc32c(section, crc)
    if crc != expected:
        raise ValueError("a checksum does not match")
    return section, crc


def _read_all(file: IO[bytes], nbytes: int) -> bytearray:
    found = bytearray(nbytes)
    left = memoryview(found)
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it ends too soon")
        left = left[count:]
    return found


def _kind(found: Any) -> Kind | None:
    if found is None:
        return None
    nbytes, dtype, shape = found
    if not isinstance(dtype, str) or not all(
        isinstance(n, int) and n >= 0 for n in [nbytes, *shape]
    ):
        raise ValueError(f"{found} is no kind of blob")
    return nbytes, dtype, tuple(shape)
