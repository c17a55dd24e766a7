"""What an engine's configuration may say about the store under it, and how that is opened."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from spdk_kv.store import EngineOptions, KVStore, PageCacheOptions
from spdk_kv.store import open as open_store

# All that a store may be opened with, but where it lies and how.
_SETTINGS = tuple(
    name
    for name, parameter in inspect.signature(open_store).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "read_only"
)
_OPTIONS = ("location", *_SETTINGS, "read_only", "identity")
# What is said for who writes, in a configuration that readers get as well.
_WRITERS = ("capacity", "create", "write_budget")
# In plain data an object is a table of its fields.
_OBJECTS: Mapping[str, type[Any]] = {"engine": EngineOptions, "page_cache": PageCacheOptions}


@dataclass(frozen=True)
class Opening:
    """A store to be opened.

    Attributes:
        location: Where it is, as in :func:`spdk_kv.open`.
        read_only: Find and load only, beside the process that writes.
        identity: Text that tells apart what the engine's own keys do not, such as the revision of a
            fine-tuned model.
        settings: Further keywords of :func:`spdk_kv.open`.
    """

    location: str
    read_only: bool = False
    identity: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def open(self, location: str | None = None, *, read_only: bool | None = None) -> KVStore:
        """The store, or the one at ``location``. Blocks on the drive; raises what
        :func:`spdk_kv.open` does: StoreLocked, with its PID, where another process has it."""
        read_only = self.read_only if read_only is None else read_only
        settings = dict(self.settings)
        if read_only:
            for name in _WRITERS:
                settings.pop(name, None)
        return open_store(location or self.location, read_only=read_only, **settings)


def read_opening(
    given: Mapping[str, Any], where: str, others: Sequence[str] = ()
) -> tuple[Opening, dict[str, Any]]:
    """The options in ``given``, plain data: of the store, and those of ``others`` that are there.

    ``engine`` and ``page_cache`` may be tables of the fields of EngineOptions and PageCacheOptions.
    ValueError says what is wrong, and that it is in ``where``.
    """
    known = (*_OPTIONS, *others)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{where}: no option {name!r}{hint}; there are {', '.join(known)}")
    location = given.get("location")
    if not isinstance(location, str) or not location:
        raise ValueError(
            f'{where}: "location" is needed, such as "file:///var/cache/kv": a folder or drive for '
            "the store"
        )
    read_only, identity = given.get("read_only", False), given.get("identity", "")
    if not isinstance(read_only, bool):
        raise ValueError(f"{where}: read_only is true or false, not {read_only!r}")
    if not isinstance(identity, str):
        raise ValueError(f"{where}: identity is text, not {identity!r}")
    settings = {name: given[name] for name in _SETTINGS if name in given}
    for name, kind in _OBJECTS.items():
        if isinstance(fields := settings.get(name), Mapping):
            try:
                settings[name] = kind(**fields)
            except (TypeError, ValueError) as wrong:
                raise ValueError(f"{where}: {name}: {wrong}") from None
    opening = Opening(location, read_only, identity, settings)
    return opening, {name: given[name] for name in others if name in given}
