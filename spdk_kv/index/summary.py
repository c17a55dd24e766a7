"""All blobs of an index in one file, so that a store of millions opens without reading each row.

It is written when a store is closed, and says the same as the rows, and in which order blobs were
used. It is never needed: what is damaged, incomplete or of another state of the index is passed by,
and the rows are read. So it is not flushed either.

That it is of this very state the index says itself: its last transaction notes the number that was
drawn for the file, and how many commits the index had made. Whoever changes rows of blobs leaves
the note as it is, so that the count does not fit any more, and so does an older program.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from spdk_kv._native.checksum import crc32c
from spdk_kv._native.table import BlobTable, kinds_of, packed, unpack_into

Kind = tuple[int, str, tuple[int, ...]]

log = logging.getLogger(__name__)

SUMMARY = "summary"
"""The name in the index of the note: commits, and the number of the file."""

LEAST_BLOBS = 10_000
"""Rows of fewer are read as fast."""

# A section is the length and the checksum of what follows. Each checksum continues that of the one
# before, so that the sections are of one file, and in order.
_HEAD = struct.Struct("<II")
_SECTION_NBYTES = 1 << 20
_MOST_NBYTES = 1 << 31
_FORMAT = 1
# What stays free on the filesystem: the index itself needs it more.
_LEFT_NBYTES = 64 << 20


def summary_path(path: str) -> str:
    """The file with the summary of the index at ``path``."""
    return f"{path}-blobs"


def write_summary(path: str, identity: str, blobs: BlobTable[Any], changes: int) -> str | None:
    """Writes the summary of ``blobs`` for the index ``identity`` at ``path``. Returns its number,
    or None where there are few, or no room for it. OSError; RuntimeError where they are not as they
    were after so many ``changes``.

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
            crc = 0
            for section in _sections(identity, number, blobs, changes):
                if not _has_room(file, len(section)):
                    log.info("%s: no room for a summary; the next open takes longer", path)
                    os.unlink(new)
                    return None
                crc = crc32c(section, crc)
                for part in (_HEAD.pack(len(section), crc), section):
                    _write_all(out, part)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    os.rename(new, summary_path(path))
    return number


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


def _has_room(file: int, nbytes: int) -> bool:
    space = os.fstatvfs(file)
    return not space.f_blocks or space.f_bavail * space.f_frsize > nbytes + _LEFT_NBYTES


def _write_all(out: IO[bytes], part: bytes) -> None:
    left = memoryview(part)
    while left:
        left = left[out.write(left) :]


def read_summary(path: str, identity: str, number: str, blobs: BlobTable[Any]) -> bool:
    """Adds the blobs of the summary with that ``number`` to ``blobs``, which has none. False where
    there is no such summary, or it is damaged: ``blobs`` is of no use then."""
    try:
        with open(summary_path(path), "rb", buffering=0) as file:
            return _read(file, identity, number, blobs)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        log.warning("the summary of %s is damaged, so its rows are read: %s", path, error)
        return False


def has_summary(path: str, number: str) -> bool:
    """Whether the file at its place begins as :func:`read_summary` wants it."""
    try:
        with open(summary_path(path), "rb", buffering=0) as file:
            return bool(_header(file)[0]["number"] == number)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(file: IO[bytes], identity: str, number: str, blobs: BlobTable[Any]) -> bool:
    header, crc = _header(file)
    if header["format"] != _FORMAT or header["index"] != identity or header["number"] != number:
        return False
    kinds = [_kind(each) for each in header["kinds"]]
    count = int(header["blobs"])
    if not 0 <= count <= os.fstat(file.fileno()).st_size:
        raise ValueError(f"it cannot have {count} blobs")
    blobs.expect(count)
    while len(blobs) < count:
        section, crc = _section(file, crc)
        unpack_into(blobs, section, kinds)
    if len(blobs) != count or file.read(1):
        raise ValueError(f"it has not {count} blobs")
    return True


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
