"""Locations: the URIs that say where a store keeps its bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_FORMS = {
    "file": "file:///DIR (a folder that holds the data file and the index)",
    "block": "block:///dev/NODE (a partition or a whole drive)",
    "ram": "ram:// (memory; gone when it is closed)",
    "null": "null:// (keeps no bytes: measures the software alone)",
    "auto": "auto (a folder of the user's cache directory)",
}


@dataclass(frozen=True)
class Location:
    """A parsed location: ``scheme`` is file, block, ram or null; ``path`` is absolute or empty."""

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


def understood() -> str:
    """One line per form of location that is understood here."""
    return "\n".join(f"  {form}" for form in _FORMS.values())


def parse_location(location: str | os.PathLike[str]) -> Location:
    """Parses a URI; a bare path means ``file://``. Raises ValueError that lists the known forms."""
    text = os.fspath(location)
    if text == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Location("file", os.path.join(os.path.abspath(base), "spdk_kv"))
    if "://" not in text:
        if text.startswith(("/", "./", "../", "~")):
            return Location("file", os.path.abspath(os.path.expanduser(text)))
        raise ValueError(f"not a location: {text!r}; understood are\n{understood()}")
    parts = urlsplit(text)
    path = unquote(parts.path)
    if parts.scheme not in _FORMS or parts.scheme == "auto":
        raise ValueError(f"unknown scheme in location {text!r}; understood are\n{understood()}")
    if parts.query or parts.fragment:
        raise ValueError(f"location {text!r}: options are arguments of open(), not part of the URI")
    if parts.scheme in ("ram", "null"):
        if parts.netloc or path not in ("", "/"):
            raise ValueError(f"location {text!r} takes no path: write {parts.scheme}://")
        return Location(parts.scheme, "")
    if parts.netloc:
        raise ValueError(
            f"location {text!r} names a host ({parts.netloc}); a local path has three slashes: "
            f"{parts.scheme}:///{parts.netloc}{path}"
        )
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"location {text!r} has no absolute path; understood are\n{understood()}")
    return Location(parts.scheme, os.path.normpath(path))
