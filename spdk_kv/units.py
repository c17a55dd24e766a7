"""Byte counts as people write them, and alignment arithmetic."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {
    "": 1,
    "B": 1,
    "K": KIB,
    "KB": 10**3,
    "KIB": KIB,
    "M": MIB,
    "MB": 10**6,
    "MIB": MIB,
    "G": GIB,
    "GB": 10**9,
    "GIB": GIB,
    "T": 1 << 40,
    "TB": 10**12,
    "TIB": 1 << 40,
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_nbytes(value: int | str) -> int:
    """Parses a byte count: ``64 GiB``, ``64G``, ``500 MB`` or a plain number.

    K, M, G and T are powers of 1024, as are KiB, MiB, GiB and TiB; KB, MB, GB and TB are powers of
    1000. Raises ValueError.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"a byte count is an int or a string like '64 GiB', not {value!r}")
    if isinstance(value, int):
        nbytes = value
    else:
        match = _PATTERN.fullmatch(value)
        factor = _FACTORS.get(match[2].upper()) if match else None
        if match is None or factor is None:
            raise ValueError(f"not a byte count: {value!r} (write it like '64 GiB', '512 MiB')")
        # Integers stay exact; only a fraction needs floating point.
        nbytes = int(match[1]) * factor if "." not in match[1] else int(float(match[1]) * factor)
    if nbytes < 0:
        raise ValueError(f"a byte count cannot be negative: {value!r}")
    return nbytes


def format_nbytes(nbytes: float) -> str:
    """Formats a byte count: ``68719476736`` becomes ``64.0 GiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` that is at most ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is at least ``value``."""
    return -(-value // alignment) * alignment
