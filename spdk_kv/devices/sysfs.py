"""Lenient readers of sysfs and procfs, for display: what cannot be read is None."""

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
    """Whether ``path`` exists; False where permission to check is missing."""
    return os.path.exists(path)  # Path.exists() raises PermissionError


def parse_count(text: str | None) -> int | None:
    """``text`` as a number; None unless it is at most 20 decimal digits, as 64 bits need."""
    # int() would also accept "1_000", "-5" and digits of other scripts.
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 20:
        return None
    return int(text)


def read_count(path: Path) -> int | None:
    """The content of ``path`` as a number; None where it cannot be read or is not one."""
    return parse_count(read_text(path))


def link_name(path: Path) -> str | None:
    """The last component of the target of link ``path`` (a driver, a group), or None."""
    try:
        return path.readlink().name
    except OSError:
        return None


def entries(path: Path) -> tuple[str, ...]:
    """The sorted names in folder ``path``; empty where it is missing or unreadable."""
    try:
        return tuple(sorted(entry.name for entry in path.iterdir()))
    except OSError:
        return ()
