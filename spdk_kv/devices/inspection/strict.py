"""Strict readers, for decisions: a missing file is None, and an unreadable one is an error.

The lenient readers of sysfs.py, which treat both alike, are for display.
"""

from __future__ import annotations

import os
from pathlib import Path

MAX_NBYTES = 16 << 20
# /proc raises ProcessLookupError for a process that ended after its file was opened.
_ABSENT = (FileNotFoundError, NotADirectoryError, ProcessLookupError)


class Unreadable(Exception):
    """Something that a decision depends on cannot be read; the message says what and why."""


def optional_text(path: Path) -> str | None:
    """The content of ``path``, None if there is no such file. Raises Unreadable.

    Bytes that are not UTF-8 come as ``\\xNN``.
    """
    try:
        with path.open("rb") as file:
            data = b""
            # In pieces, because /proc/sys fails a single read of 4 MiB or more with ENOMEM.
            while len(data) <= MAX_NBYTES and (piece := file.read(1 << 16)):
                data += piece
    except _ABSENT:
        return None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    if len(data) > MAX_NBYTES:
        raise Unreadable(f"{path}: larger than {MAX_NBYTES} bytes")
    return data.decode(errors="backslashreplace")


def required_text(path: Path) -> str:
    """The stripped content of ``path``. Raises Unreadable, also if there is no such file."""
    text = optional_text(path)
    if text is None:
        raise Unreadable(f"{path}: does not exist")
    return text.strip()


def required_count(path: Path) -> int:
    """The content of ``path`` as a count. Raises Unreadable."""
    text = required_text(path)
    if not (text.isascii() and text.isdigit()):
        raise Unreadable(f"{path}: not a count: {text[:40]!r}")
    return int(text)


def listing(path: Path) -> tuple[str, ...]:
    """The sorted names in folder ``path``; none if it does not exist. Raises Unreadable."""
    try:
        return tuple(sorted(os.listdir(path)))
    except _ABSENT:
        return ()
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error


def optional_link(path: Path) -> str | None:
    """The target of link ``path``; None if it does not exist. Raises Unreadable."""
    try:
        return os.readlink(path)
    except _ABSENT:
        return None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error


def optional_link_name(path: Path) -> str | None:
    """The last component of the target of link ``path``; None if it does not exist."""
    target = optional_link(path)
    return None if target is None else target.rstrip("/").rpartition("/")[2]
