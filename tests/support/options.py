"""The option objects of `spdk_kv.open` from flat keywords, for tests that vary one field or two."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from spdk_kv import EngineOptions, PageCacheOptions

_ENGINE = {field.name for field in fields(EngineOptions)}
_PAGE_CACHE = {field.name for field in fields(PageCacheOptions)}


def grouped(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``spdk_kv.open`` that ``options`` name: its own, and the option objects'
    fields; ``engine`` is the engine's name."""
    engine = {name: value for name, value in options.items() if name in _ENGINE}
    page_cache = {name: value for name, value in options.items() if name in _PAGE_CACHE}
    rest = {n: v for n, v in options.items() if n not in _ENGINE | _PAGE_CACHE | {"engine"}}
    engine.setdefault("name", options.get("engine"))
    return rest | {"engine": EngineOptions(**engine), "page_cache": PageCacheOptions(**page_cache)}
