"""Locations: the URIs that say where a store keeps its bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
_PCI_ADDRESS = re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
# What a URI gives another meaning, and what no terminal shows; surrogates stand for bytes that are
# not UTF-8.
_ODD = re.compile("[%?#\x00-\x1f\x7f\udc80-\udcff]")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f]")
_FORMS = {
    "file": "file:///DIR (a folder that holds the data file and the index)",
    "block": "block:///dev/NODE (a partition or a whole drive)",
    "ng": "ng:///dev/ngXnY (a drive's generic node, for NVMe commands through the kernel)",
    "spdk": "spdk://0000:01:00.0/1 (a drive bound to vfio-pci, by PCI address and namespace)",
    "spdk+tcp": "spdk+tcp://HOST:PORT/NQN[/NAMESPACE] (an NVMe/TCP target)",
    "spdk+vfiouser": "spdk+vfiouser:///DIR/NQN[/NAMESPACE] (a vfio-user target's socket folder)",
    "ram": "ram:// (memory; gone when it is closed)",
    "null": "null:// (keeps no bytes: measures the software alone)",
    "auto": "auto (a folder of the user's cache directory)",
}


@dataclass(frozen=True)
class Location:
    """A parsed location.

    ``path``: absolute, or empty; of ``spdk`` the PCI address, of ``spdk+vfiouser`` the folder.
    ``host``, ``port``, ``nqn`` and the namespace number ``nsid`` belong to the NVMe forms.
    """

    scheme: str
    path: str
    host: str = ""
    port: int = 0
    nqn: str = ""
    nsid: int = 0

    def __str__(self) -> str:
        if self.scheme == "spdk":
            return f"spdk://{self.path}/{self.nsid}"
        if self.scheme == "spdk+tcp":
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"spdk+tcp://{host}:{self.port}/{self.nqn}/{self.nsid}"
        if self.scheme == "spdk+vfiouser":
            return f"spdk+vfiouser://{self.path}/{self.nqn}/{self.nsid}"
        return f"{self.scheme}://{_ODD.sub(_escape, self.path)}"

    @property
    def is_nvme(self) -> bool:
        """Whether SPDK drives it."""
        return self.scheme.startswith("spdk")


def understood() -> str:
    """One line per form of location that is understood here."""
    return "\n".join(f"  {form}" for form in _FORMS.values())


def parse_location(location: str | os.PathLike[str]) -> Location:
    """Parses a URI; a bare path means ``file://``. Raises ValueError that lists the known forms.

    A path object (or bytes) is a folder, whatever it is called; text that is a path begins with
    ``/``, ``./``, ``../`` or ``~``.
    """
    text = os.fsdecode(location)
    if not isinstance(location, str):
        return _parse_path(text)
    if text == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Location("file", os.path.join(os.path.abspath(base), "spdk_kv"))
    if "://" not in text:
        if text.startswith(("/", "./", "../", "~")):
            return _parse_path(text)
        hint = f"; for a folder write ./{text}" if _NAME.fullmatch(text) else ""
        raise ValueError(f"not a location: {text!r}{hint}; understood are\n{understood()}")
    if _UNSEEN.search(text):  # urlsplit would leave them out, which is another folder
        raise ValueError(f"location {text!r}: write control characters as %XX")
    parts = urlsplit(text)
    path = unquote(parts.path, errors="surrogateescape")
    if parts.scheme not in _FORMS or parts.scheme == "auto":
        raise ValueError(f"unknown scheme in location {text!r}; understood are\n{understood()}")
    if parts.query or parts.fragment:
        raise ValueError(f"location {text!r}: options are arguments of open(), not part of the URI")
    if parts.scheme in ("ram", "null"):
        if parts.netloc or path not in ("", "/"):
            raise ValueError(f"location {text!r} takes no path: write {parts.scheme}://")
        return Location(parts.scheme, "")
    if parts.scheme.startswith("spdk"):
        return _parse_nvme(text, parts.scheme, parts.netloc, path)
    if parts.netloc:
        raise ValueError(
            f"location {text!r} names a host ({parts.netloc}); a local path has three slashes: "
            f"{parts.scheme}:///{parts.netloc}{path}"
        )
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"location {text!r} has no absolute path; understood are\n{understood()}")
    return Location(parts.scheme, os.path.normpath(path))


def _parse_path(text: str) -> Location:
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _FORMS and rest[:1] in ("", "/"):
        # pathlib makes one slash of two.
        raise ValueError(f"{text!r} looks like a URI in a path object: pass it as text")
    if "\0" in text:
        raise ValueError(f"not a location: {text!r}; a path has no zero bytes")
    return Location("file", os.path.abspath(os.path.expanduser(text)))


def _escape(odd: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(odd[0]))


def _parse_nvme(text: str, scheme: str, netloc: str, path: str) -> Location:
    bad = ValueError(f"not a location: {text!r}; it is written {_FORMS[scheme]}")
    if scheme == "spdk":
        # The PCI address has colons, so it is not to be taken for host and port.
        nsid = path.removeprefix("/") or "1"
        if not _PCI_ADDRESS.fullmatch(netloc) or not _is_nsid(nsid):
            raise bad
        return Location(scheme, netloc.lower(), nsid=int(nsid))
    names = path.split("/")
    nsid = names.pop() if len(names) > 2 and _is_nsid(names[-1]) else "1"
    nqn = names.pop()
    if not nqn.startswith("nqn.") or len(nqn) > 223:
        raise bad
    folder = "/".join(names)
    if scheme == "spdk+vfiouser":
        if netloc or not folder.startswith("/"):
            raise bad
        return Location(scheme, os.path.normpath(folder), nqn=nqn, nsid=int(nsid))
    host, _, port = netloc.rpartition(":")
    if folder or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise bad
    return Location(scheme, "", host=host.strip("[]"), port=int(port), nqn=nqn, nsid=int(nsid))


def _is_nsid(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 0xFFFFFFFF
