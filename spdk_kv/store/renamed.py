"""The keywords of :func:`spdk_kv.open` that option objects took over, accepted for one release.

Each use raises a DeprecationWarning that names the replacement.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, TypedDict

from spdk_kv.store.options import EngineOptions, PageCacheOptions


class RenamedKeywords(TypedDict, total=False):
    """What :func:`spdk_kv.open` took before it had option objects."""

    depth: int
    segment: int | str
    staging: int | str
    hugepages: bool
    queue_pairs: int
    discard: bool | None
    residency: str
    page_cache_dir: str | os.PathLike[str] | None
    mmap: bool


# Old keyword -> field of the option object.
_ENGINE_FIELDS = {
    name: name for name in ("depth", "segment", "staging", "hugepages", "queue_pairs", "discard")
}
_PAGE_CACHE_FIELDS = {
    "residency": "policy",
    "page_cache": "memory",
    "page_cache_dir": "folder",
    "mmap": "mmap",
}
# From a warning up to the caller of `open`: _take, option_objects, open.
_STACK_LEVEL = 4


def option_objects(
    engine: str | EngineOptions | None,
    page_cache: PageCacheOptions | int | str | None,
    renamed: Mapping[str, Any],
) -> tuple[EngineOptions, PageCacheOptions]:
    """The option objects that the arguments of ``open`` amount to, old keywords included.

    TypeError for an unknown keyword, and where an old keyword and its option object are both given.
    """
    unknown = renamed.keys() - RenamedKeywords.__annotations__.keys()
    if unknown:
        raise TypeError(f"open() got an unexpected keyword argument {min(unknown)!r}")
    old = dict(renamed)
    if page_cache is not None and not isinstance(page_cache, PageCacheOptions):
        old["page_cache"] = page_cache
    for_engine = _take(old, _ENGINE_FIELDS, "engine", engine, EngineOptions)
    for_page_cache = _take(old, _PAGE_CACHE_FIELDS, "page_cache", page_cache, PageCacheOptions)
    if not isinstance(engine, EngineOptions):
        engine = EngineOptions(engine, **for_engine)
    if not isinstance(page_cache, PageCacheOptions):
        page_cache = PageCacheOptions(**for_page_cache)
    return engine, page_cache


def _take(
    old: Mapping[str, Any], fields: Mapping[str, str], argument: str, given: object, kind: type
) -> dict[str, Any]:
    """The old keywords that became fields of ``kind``, by their new names; warns of each."""
    taken = {}
    for keyword, value in old.items():
        if keyword not in fields:
            continue
        new = f"{argument}=spdk_kv.{kind.__name__}({fields[keyword]}=...)"
        if isinstance(given, kind):
            raise TypeError(
                f"{keyword}= was given beside {argument}=spdk_kv.{kind.__name__}(...), which has "
                f"it as {fields[keyword]}="
            )
        warnings.warn(
            f"{keyword}= of spdk_kv.open goes away in the next release; use {new}",
            DeprecationWarning,
            stacklevel=_STACK_LEVEL,
        )
        taken[fields[keyword]] = value
    return taken
