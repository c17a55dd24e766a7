"""Small attribute files and links of sysfs and procfs; what cannot be read is None."""

from __future__ import annotations

import os
from pathlib import Path


def read_text(path: Path) -> str | None:
    """The stripped content of ``path``, or None where it cannot be read.

    Bytes that are not UTF-8 come as ``\\xNN``, so the result can always be printed.
    """
    try:
        return path.read_text(encoding="utf-8", errors="backslashreplace").strip()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None


def exists(path: Path) -> bool:
    """Whether ``path`` is there; False where that may not be asked."""
    return os.path.exists(path)  # Path.exists() raises PermissionError


def parse_count(text: str | None) -> int | None:
    """``text`` as a count, or None where it is not plain decimal digits of at most 64 bits."""
    # int() alone would take "1_000", "-5" and digits of other scripts.
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 20:
        return None
    return int(text)


def read_count(path: Path) -> int | None:
    """The content of ``path`` as a count, or None where it cannot be read or is not one."""
    return parse_count(read_text(path))


def link_name(path: Path) -> str | None:
    """The last component of what the link ``path`` points to (a driver, a group), or None."""
    try:
        return path.readlink().name
    except OSError:
        return None


def entries(path: Path) -> tuple[str, ...]:
    """The sorted names in directory ``path``; empty where there is none or it is unreadable."""
    try:
        return tuple(sorted(entry.name for entry in path.iterdir()))
    except OSError:
        return ()
